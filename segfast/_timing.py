"""Timing candidates side by side: warmed up, interleaved A B A B, L2 cold, median with p20 and p80.

`gpu_us` is device time between CUDA events, each call issued behind a short device sleep so that the host's
own cost stays out of it. `wall_us` is host time a call, back to back, caches warm. A CPU has only `wall_us`.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU there is
SLEEP_HZ = 2.0e9  # torch.cuda._sleep counts clock cycles: an upper estimate of the clock
MAX_SLEEP_S = 0.02
SLOW_S = 2.0  # a round longer than this is timed once, if the budget asks for no more


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians and 20th/80th percentiles in microseconds; NaN where a clock does not apply."""

    gpu_us: float
    gpu_p20: float
    gpu_p80: float
    wall_us: float
    wall_p20: float
    wall_p80: float
    runs: int

    @property
    def us(self) -> float:
        """Device time where there is one, else host time."""
        return self.wall_us if math.isnan(self.gpu_us) else self.gpu_us


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, p20 and p80; NaN of an empty list."""
    if not samples:
        return (math.nan,) * 3
    ordered = sorted(samples)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def interleave(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    budget_s: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time every callable of `runs` within about `budget_s` seconds; they must have run once already.

    On a CPU by `clock`, in seconds, where one is given.
    """
    if device.type == "cuda":
        return _interleave_cuda(runs, device, budget_s, min_rounds, max_rounds)
    samples = _wall(runs, budget_s, min_rounds, max_rounds, lambda: None, clock)
    nan = math.nan
    return {name: Timing(nan, nan, nan, *quantiles(values), len(values)) for name, values in samples.items()}


def _interleave_cuda(runs, device, budget_s, min_rounds, max_rounds) -> dict[str, Timing]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    issue, cost = {}, 0.0
    for name, run in runs.items():
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        issue[name] = time.perf_counter() - start
        torch.cuda.synchronize(device)
        cost += time.perf_counter() - start + issue[name] + 2e-4
    rounds = _rounds(0.6 * budget_s, cost, min_rounds, max_rounds)
    events: dict[str, list] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in _rotated(list(runs), turn):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(int(min(MAX_SLEEP_S, 1.5 * issue[name] + 2e-5) * SLEEP_HZ))
            begin.record()
            runs[name]()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize(device)
    del flush
    walls = _wall(runs, 0.3 * budget_s, 3, 9, lambda: torch.cuda.synchronize(device))
    return {
        name: Timing(
            *quantiles([1e3 * begin.elapsed_time(end) for begin, end in pairs]),
            *quantiles(walls[name]),
            len(pairs),
        )
        for name, pairs in events.items()
    }


def _wall(runs, budget_s, min_rounds, max_rounds, synchronize, clock=None) -> dict[str, list[float]]:
    """Host microseconds a call, in blocks long enough for the clock, one block of each candidate a round."""
    clock = clock or time.perf_counter
    calls, cost = {}, 0.0
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        synchronize()
        start = clock()
        run()
        synchronize()
        once = clock() - start
        calls[name] = max(1, min(200, int(0.002 / once)))
        cost += once * calls[name]
        if calls[name] == 1:
            samples[name].append(1e6 * once)
    rounds = _rounds(budget_s, cost, min_rounds, max_rounds)
    for turn in range(rounds):
        for name in _rotated(list(runs), turn):
            run, count = runs[name], calls[name]
            if len(samples[name]) > turn:
                continue  # a call that is a block by itself was timed already
            synchronize()
            start = clock()
            for _ in range(count):
                run()
            synchronize()
            samples[name].append(1e6 * (clock() - start) / count)
    return samples


def _rounds(budget_s: float, cost_s: float, least: int, most: int) -> int:
    """How often to time everything once, which takes `cost_s`; a round of seconds needs no repeating."""
    if cost_s > SLOW_S:
        least = 1
    return max(least, min(most, int(budget_s / cost_s)))


def _rotated(names: list[str], turn: int) -> list[str]:
    first = turn % len(names)
    return names[first:] + names[:first]


def graph_us(run: Callable[[], object], device: torch.device, *, rounds: int = 20) -> float:
    """Median microseconds of a CUDA-graph replay of `run`: host gaps gone, the L2 as the graph leaves it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)
