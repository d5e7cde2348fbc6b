"""Calls timed beside processes that compute without end."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from segfast._timing import Timing, quantiles


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def in_turn(runs: Mapping[str, Callable[[], object]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each callable, called in turn so often, every other time in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(pairs):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def timing_of(seconds: Sequence[float]) -> Timing:
    """The quantiles of calls, as the report takes them."""
    nan = float("nan")
    return Timing(nan, nan, nan, *quantiles([1e6 * s for s in seconds]), len(seconds))
