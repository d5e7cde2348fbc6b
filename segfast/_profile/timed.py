"""The times of a model's leaves, and of what lies between them, over many passes."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .._timing import quantiles
from .facts import CAST, LAYOUT_COPY
from .passes import Pass, Plan, Stopwatch, Task, plain_pass, watched_pass

# What a gap must take of the whole to be a row of its own.
_LONG_GAP = 0.01
# How far from the whole the rows may be.
MOST_OFF = 0.05
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 100
# Autograd's nodes that undo a copy or a cast of the forward, each a row of its own.
_NODES = {"ToCopyBackward0": CAST, "CloneBackward0": LAYOUT_COPY}


class Interval(NamedTuple):
    """Medians and percentiles in microseconds, from the begin of the forward or backward pass."""

    start: float
    us: float
    p20: float
    p80: float


class Samples:
    """Starts and durations of one thing, one of each pass."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.us: list[float] = []

    def add(self, start: float, us: float) -> None:
        self.starts.append(start)
        self.us.append(us)

    def interval(self) -> Interval:
        """Their medians and percentiles."""
        return Interval(quantiles(self.starts)[0], *quantiles(self.us))


# Of the backward: the number of the leaf, and the kind where it is a copy that a layer made.
Part = tuple[int, str]


@dataclass
class Times:
    """The times of all passes: of leaves by number, of gaps by the leaf that follows, of the whole."""

    forward: dict[int, Samples] = field(default_factory=lambda: defaultdict(Samples))
    gaps: dict[int, Samples] = field(default_factory=lambda: defaultdict(Samples))
    backward: dict[Part, Samples] = field(default_factory=lambda: defaultdict(Samples))
    # Whole passes, forward and backward; watched and plain.
    whole: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    plain: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def whole_us(self) -> float:
        """The median of a watched pass, forward and backward."""
        return sum(quantiles(each)[0] for each in self.whole if each)

    def plain_us(self) -> float:
        """The median of a pass that nobody watched."""
        return sum(quantiles(each)[0] for each in self.plain if each)

    def long_gaps(self) -> dict[int, Interval]:
        """The gaps that are worth a row of their own."""
        intervals = {index: gap.interval() for index, gap in self.gaps.items()}
        return {i: gap for i, gap in intervals.items() if gap.us >= _LONG_GAP * self.whole_us()}

    def rest(self, direction: int, taken: list[Samples]) -> Interval:
        """The time that is left of the forward (0) or backward (1) beside `taken`.

        Medians need not add up. Where they are short of the whole by too much, what is missing is in it.
        """
        walls = self.whole[direction]
        left, p20, p80 = quantiles([us - sum(each.us[i] for each in taken) for i, us in enumerate(walls)])
        whole, found = quantiles(walls)[0], sum(quantiles(each.us)[0] for each in taken)
        if found + left < (1 - MOST_OFF) * whole:
            left = p80 = whole - found
        return Interval(whole, left, min(p20, left), p80)


def times_of(
    task: Task,
    plan: Plan,
    stopwatch: Stopwatch,
    budget_s: float,
    annotate: Any = None,
) -> Times:
    """Time passes that are watched and passes that are not, in turns, for about `budget_s` seconds.

    Raises:
        ValueError: the model's calls change from pass to pass.
    """
    times = Times()
    begin, rounds = time.perf_counter(), _MOST_ROUNDS
    done = 0
    while done < rounds:
        for watched in (True, False) if done % 2 else (False, True):
            stopwatch.wait()
            if watched:
                watch = plan.watch(stopwatch.now, annotate=annotate)
                found = watched_pass(task, watch, stopwatch.now, stopwatch.now)
                stopwatch.wait()
                plan.check(found)
                _add(times, found, plan, stopwatch)
            else:
                found = plain_pass(task, stopwatch.now)
                stopwatch.wait()
            add_whole(times.whole if watched else times.plain, found, stopwatch)
        done += 1
        spent = time.perf_counter() - begin
        rounds = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(budget_s / spent * done) if spent > 0 else done))
    return times


def add_whole(whole: tuple[list[float], list[float]], found: Pass, stopwatch: Stopwatch) -> None:
    """Add the microseconds of a pass that is over, forward and backward."""
    whole[0].append(stopwatch.us(*found.forward))
    if found.backward is not None:
        whole[1].append(stopwatch.us(*found.backward))


def _add(times: Times, found: Pass, plan: Plan, stopwatch: Stopwatch) -> None:
    before = start = found.forward[0]
    for index in plan.facts:
        span = found.spans[index]
        times.gaps[index].add(stopwatch.us(start, before), stopwatch.us(before, span.begin))
        times.forward[index].add(stopwatch.us(start, span.begin), stopwatch.us(span.begin, span.end))
        before = span.end
    if found.backward is None:
        return
    start = found.backward[0]
    sums: dict[Part, list[float]] = {}
    for index, begin, end, name in found.runs:
        if index in plan.facts:
            begun = stopwatch.us(start, begin)
            total = sums.setdefault((index, _NODES.get(name, "")), [begun, 0.0])
            total[1] += stopwatch.us(begin, end)
    for part, (begun, us) in sums.items():
        times.backward[part].add(begun, us)
