"""The one error a command reports in a line and exit code 2, and other errors told in a line."""

import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


class UserError(Exception):
    """Something the caller of a command can put right: a path, a size, an option."""


def do_each(items: Iterable[Item], work: Callable[[Item], None]) -> int:
    """Call `work` on every item, also after one could not be done: those are told on stderr at the end.

    Returns:
        The command's exit code: 0 if all were done, else 2.
    """
    failures = []
    for item in items:
        try:
            work(item)
        except UserError as error:
            failures.append(str(error))
    for failure in failures:
        print(f"segfast: {failure}", file=sys.stderr)
    return 2 if failures else 0


def describe(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
