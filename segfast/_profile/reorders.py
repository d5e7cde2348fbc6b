"""Copies that oneDNN makes within a layer on a CPU, of images and weights into its own layouts and back.

torch's profiler does not see them; oneDNN writes a line for each to stdout if it is asked to.
"""

import contextlib
import ctypes
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO

import torch

from .facts import CAST, LAYOUT_COPY
from .passes import Plan, Task, watched_pass
from .profiled import Copies, Copy, summed

# A line of a copy: the dtypes before and after it, the shape, and milliseconds.
_REORDER = re.compile(
    r"^onednn_verbose,.*\bexec,cpu,reorder,.*\bsrc:(\w+):.* dst:(\w+):.*,(\d+(?:x\d+)*),(\d[\d.e+-]*)$",
    re.MULTILINE,
)
# Passes, as one alone may be disturbed.
_PASSES = 3
# What oneDNN wrote during calls, and seconds.
_Read = tuple[bytes, float]


def reorders_of(task: Task, plan: Plan) -> tuple[Copies, Copies]:
    """The copies that oneDNN makes forward and backward; none on a GPU, or without oneDNN or stdout."""
    if task.device.type != "cpu" or not torch.backends.mkldnn.is_available() or sys.stdout is None:
        return {}, {}
    with _stdout_to_file() as (written, file):

        def now() -> tuple[int, float]:
            return written(), time.perf_counter()

        passes = []
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            for _ in range(_PASSES):
                passes.append(watched_pass(task, plan.watch(now), now, now))
                plan.check(passes[-1])
        written()
        file.seek(0)
        lines = file.read()
    read: tuple[dict[int, _Read], dict[int, _Read]] = ({}, {})
    for found in passes:
        spans = [(index, found.spans[index].begin, found.spans[index].end) for index in plan.facts]
        nodes = [(index, begin, end) for index, begin, end, _ in found.runs if index in plan.facts]
        for of, readings in zip(read, (spans, nodes), strict=True):
            for index, (first, begin), (last, end) in readings:
                text, seconds = of.get(index, (b"", 0.0))
                of[index] = (text + lines[first:last], seconds + end - begin)
    forward, backward = ({index: copies_told(*each, _PASSES) for index, each in of.items()} for of in read)
    return forward, backward


def copies_told(lines: bytes, seconds: float, calls: int) -> list[Copy]:
    """The copies that these lines tell of in a call; those of several, which took so many seconds in all."""
    found = []
    for source, target, shape, ms in _REORDER.findall(lines.decode(errors="replace")):
        kind = LAYOUT_COPY if source == target else CAST
        found.append(Copy(kind, 1e-3 * float(ms) / seconds, math.prod(map(int, shape.split("x")))))
    return [copy._replace(elements=copy.elements // calls) for copy in summed(found)]


@contextlib.contextmanager
def _stdout_to_file() -> Iterator[tuple[Callable[[], int], IO[bytes]]]:
    """Stdout goes to a file meanwhile; yields a function that tells how much was written, and the file."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
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
