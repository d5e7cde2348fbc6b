"""The rows of a profile, put together from times, facts, FLOPs and the device's roof."""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from .facts import BETWEEN, CAST, LAYOUT_COPY, Facts
from .passes import Flops, Plan
from .profiled import Copies, Copy
from .rows import Roof, Row
from .timed import Interval, Times

_FORWARD, _BACKWARD = 0, 1
_DIRECTIONS = ("forward", "backward")


Found = tuple[Row, Facts | None]


def rows_of(
    plan: Plan, times: Times, flops: Flops, copies: Sequence[Copies], peaks: dict[int, int], roof: Roof
) -> list[Found]:
    """All rows: forward in call order, then backward in the order in which autograd came by.

    Each with the facts of the layer's call that it is of, if it is of one. `copies` are those that layers
    make forward and backward, `peaks` the most memory that each holds, by the leaf's number.
    """
    forward = list(_forward(plan, times, flops, copies[_FORWARD], peaks))
    backward = sorted(_backward(plan, times, flops, copies[_BACKWARD]), key=lambda found: found[0].start_us)
    long = times.long_gaps()
    taken = [*times.forward.values(), *[times.gaps[index] for index in long]]
    forward.append(_between("", _FORWARD, times.rest(_FORWARD, taken)))
    if times.whole[_BACKWARD]:
        rest = times.rest(_BACKWARD, list(times.backward.values()))
        backward.append(_between("", _BACKWARD, rest))
    return [(with_roof(row, roof), facts) for row, facts in (*forward, *backward)]


def with_roof(row: Row, roof: Roof) -> Row:
    """The row with what bounds it, and its share of that roof.

    Work that would at the roof be done in less than any call takes has no share: the launch bounds it.
    """
    if row.kind == BETWEEN:
        return replace(row, bound="launch")
    dtype = row.dtype if row.dtype in roof.flops_per_s else next(iter(roof.flops_per_s), "")
    compute = 1e6 * row.flops / roof.flops_per_s.get(dtype, math.inf)
    memory = 1e6 * row.bytes / roof.bytes_per_s
    least = max(compute, memory)
    is_measurable = least > roof.call_us
    if row.kind in (LAYOUT_COPY, CAST):
        bound = "layout copy"
    elif is_measurable:
        bound = "compute" if compute >= memory else "memory"
    else:
        bound = "launch"
    return replace(row, bound=bound, roof_share=least / row.us if is_measurable and row.us else None)


def _forward(
    plan: Plan, times: Times, flops: Flops, copies: Copies, peaks: dict[int, int]
) -> Iterator[Found]:
    before = 0
    long = times.long_gaps()
    for index, facts in plan.facts.items():
        key, interval = plan.keys[index], times.forward[index].interval()
        if index in long:
            yield _between(plan.enclosing(before or index, index), _FORWARD, long[index])
        before = index
        rest = yield from _copied(key.name, _FORWARD, facts, interval, copies.get(index, []))
        row = Row(
            key.name,
            _kind(key.kind, facts),
            _DIRECTIONS[_FORWARD],
            *rest,
            flops=flops.forward[index],
            bytes=facts.bytes,
            peak_bytes=peaks.get(index),
            parameters=facts.parameters,
            **_told(facts),
        )
        yield row, facts


def _backward(plan: Plan, times: Times, flops: Flops, copies: Copies) -> Iterator[Found]:
    for (index, copied), samples in times.backward.items():
        facts, key = plan.facts[index], plan.keys[index]
        made = [] if copied else copies.get(index, [])
        rest = yield from _copied(key.name, _BACKWARD, facts, samples.interval(), made)
        row = Row(
            key.name,
            copied or _kind(key.kind, facts),
            _DIRECTIONS[_BACKWARD],
            *rest,
            flops=0 if copied else flops.backward[index],
            bytes=2 * math.prod(facts.output) * _size(facts.dtype) if copied else facts.backward_bytes,
            **_told(facts),
        )
        yield row, None


def _copied(
    name: str, direction: int, facts: Facts, interval: Interval, copies: Sequence[Copy]
) -> Generator[Found, None, Interval]:
    """The rows of the copies that a layer makes of what it is given; returns the time that is its own."""
    total = sum(copy.share for copy in copies)
    for copy in copies:
        cast = copy.kind == CAST
        sizes = _size(facts.given_dtype) + _size(facts.dtype if cast else facts.given_dtype)
        row = Row(
            name,
            copy.kind,
            _DIRECTIONS[direction],
            # Timed in a pass of its own, they may seem to be more than all.
            *_part(interval, copy.share / max(1.0, total)),
            bytes=copy.elements * sizes,
            dtype=f"{facts.given_dtype} to {facts.dtype}" if cast else facts.given_dtype,
        )
        yield row, None
    return _part(interval, max(0.0, 1 - total))


def _between(name: str, direction: int, interval: Interval) -> Found:
    return Row(name, BETWEEN, _DIRECTIONS[direction], *interval), None


def _kind(kind: str, facts: Facts) -> str:
    """A function that copies makes a cast where the dtype is another one after it."""
    return CAST if kind == LAYOUT_COPY and facts.given_dtype != facts.dtype else kind


def _told(facts: Facts) -> dict[str, Any]:
    return {"output": facts.output, "dtype": facts.dtype, "memory_format": facts.memory_format}


def _part(interval: Interval, share: float) -> Interval:
    """The part of an interval that one row has; it begins with it."""
    return Interval(interval.start, share * interval.us, share * interval.p20, share * interval.p80)


def _size(dtype: str) -> int:
    return getattr(torch, dtype).itemsize if dtype else 0
