"""The one error a command reports in a line and exit code 2, and other errors told in a line."""


class UserError(Exception):
    """Something the caller of a command can put right: a path, a size, an option."""


def describe(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
