"""Copies that oneDNN makes within a layer on a CPU, of images and weights into its own layouts and back.

torch's profiler does not see them; oneDNN writes a line for each to stdout if it is asked to.
"""

import contextlib
import ctypes
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO

import torch

from .facts import CAST, LAYOUT_COPY
from .passes import Plan, Task, watched_pass
from .profiled import Copies, Copy

# What oneDNN wrote during a call, and seconds.
_Read = tuple[bytes, float]


def reorders_of(task: Task, plan: Plan) -> tuple[Copies, Copies]:
    """The copies that oneDNN makes forward and backward; none on a GPU, or where torch has no oneDNN."""
    if task.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return {}, {}
    with _stdout_to_file() as (written, file):

        def now() -> tuple[int, float]:
            return written(), time.perf_counter()

        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            found = watched_pass(task, plan.watch(now), now, now)
        written()
        file.seek(0)
        lines = file.read()
    plan.check(found)
    read: tuple[dict[int, _Read], dict[int, _Read]] = ({}, {})
    spans = [(index, found.spans[index].begin, found.spans[index].end) for index in plan.facts]
    nodes = [(index, begin, end) for index, begin, end, _ in found.runs if index in plan.facts]
    for of, readings in zip(read, (spans, nodes), strict=True):
        for index, (first, begin), (last, end) in readings:
            text, seconds = of.get(index, (b"", 0.0))
            of[index] = (text + lines[first:last], seconds + end - begin)
    forward, backward = (
        {i: copies_told(*each) for i, each in of.items() if b"reorder" in each[0]} for of in read
    )
    return forward, backward


def copies_told(lines: bytes, seconds: float) -> list[Copy]:
    """The copies that these lines tell of, of a call that took so many seconds."""
    found: dict[str, Copy] = {}
    for line in lines.decode(errors="replace").splitlines():
        fields = line.split(",")
        if fields[0] != "onednn_verbose" or "exec" not in fields or "reorder" not in fields:
            continue
        source, target = (part.partition(":")[2].partition(":")[0] for part in fields[-5].split(" ")[:2])
        kind = LAYOUT_COPY if source == target else CAST
        before = found.get(kind, Copy(kind, 0.0, 0))
        elements = math.prod(int(size) for size in fields[-2].split("x"))
        found[kind] = Copy(
            kind, before.share + 1e-3 * float(fields[-1]) / seconds, before.elements + elements
        )
    return list(found.values())


@contextlib.contextmanager
def _stdout_to_file() -> Iterator[tuple[Callable[[], int], IO[bytes]]]:
    """Stdout goes to a file meanwhile; yields a function that tells how much was written, and the file."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 1)

            def written() -> int:
                library.fflush(None)
                return os.lseek(file.fileno(), 0, os.SEEK_END)

            try:
                yield written, file
            finally:
                library.fflush(None)
                os.dup2(saved, 1)
    finally:
        os.close(saved)
