"""Results are computed some rows at a time: a part of the cache, and pieces for a few threads."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .._threads import Task, threads_here

_ROWS_AT_ONCE = 16384


class Passes(NamedTuple):
    """How a filter computes a result [N, C]."""

    # Stages of tasks that do not depend on each other, to be done one stage after the other.
    stages: list[list[Task]]
    # What then returns some rows of the result.
    part: Callable[[slice], Tensor]
    # Called when the result has been read.
    end: Callable[[], None] = lambda: None


def chunks_of(count: int) -> list[slice]:
    """The rows 0 .. count in slices: few for one thread, as between two calls it waits for those beside it.

    For several threads, of many rows a multiple of eight, which two, four and eight share evenly.
    """
    if threads_here() == 1:
        return pieces_of(count, -(-count // (2 * _ROWS_AT_ONCE)))
    if count < _ROWS_AT_ONCE // 4:
        return pieces_of(count, 1)
    chunks = max(2, -(-count // _ROWS_AT_ONCE))
    return pieces_of(count, chunks if chunks == 2 else -(-chunks // 8) * 8)


def pieces_of(count: int, most: int = 8) -> list[slice]:
    """0 .. count in so many slices of about one size, none of them empty."""
    pieces = min(count, most)
    return [slice(count * i // pieces, count * (i + 1) // pieces) for i in range(pieces)]


def passes_of(values: Tensor) -> Passes:
    """The passes that hand out rows of `values` [N, C], which is computed already."""
    return Passes([], lambda rows: values[rows])
