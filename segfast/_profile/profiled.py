"""One pass under torch's profiler: copies and casts inside layers, the memory that each holds, kernels."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..commands._memory import profiler_silenced
from .facts import CAST, LAYOUT_COPY
from .passes import Plan, Task, watched_pass

PREFIX = "segfast span "
# cuDNN's kernels that bring images into another layout and back.
_LAYOUT_KERNELS = re.compile("nchwToNhwc|nhwcToNchw|tensorTransform", re.IGNORECASE)
_MOST_KERNELS = 100


class Copy(NamedTuple):
    """The copies of one kind that a layer makes: the part of its time that they take, and elements copied."""

    kind: str
    share: float
    elements: int


# By a leaf's number.
Copies = dict[int, list[Copy]]


class Profiled(NamedTuple):
    """By the leaf's number its copies and the most memory that it holds; kernels with calls and time."""

    copies: Copies
    peaks: dict[int, int]
    kernels: tuple[tuple[str, int, float], ...]


def profiled_pass(task: Task, plan: Plan, wants_kernels: bool) -> Profiled:
    """Run one pass under the profiler."""
    on_gpu = task.device.type == "cuda"
    watch = plan.watch(_no_clock, annotate=lambda span: record_function(f"{PREFIX}{span.index}"))
    profiler = profiler_of(task.device, record_shapes=True, profile_memory=not on_gpu)
    with profiler_silenced(), profiler:
        plan.check(watched_pass(task, watch, _no_clock, _no_clock))
    copies: Copies = {}
    for event in profiler.events():
        index = _index(event.name)
        if index in plan.facts and event.device_type == torch.autograd.DeviceType.CPU:
            # Of a number that was given before to what was dropped, the last counts.
            copies[index] = _copies(event, on_gpu) if plan.keys[index].kind != LAYOUT_COPY else []
    peaks = _gpu_peaks(task, plan) if on_gpu else _peaks(profiler, plan)
    return Profiled(copies, peaks, kernels_of(profiler, on_gpu) if wants_kernels else ())


def profiler_of(device: torch.device, **options: Any) -> profile:
    """torch's profiler of a device, not yet begun."""
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=[ProfilerActivity.CPU, *on_gpu], **options)


def _no_clock() -> int:
    return 0


def _index(name: str) -> int:
    return int(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else -1


def device_us(event: Any, on_gpu: bool) -> float:
    """Microseconds of an operator, on a GPU of the kernels in it."""
    if not on_gpu:
        return event.time_range.elapsed_us()
    return sum(k.duration for k in event.kernels) + sum(
        device_us(child, True) for child in event.cpu_children
    )


def _copies(event: Any, on_gpu: bool) -> list[Copy]:
    whole = device_us(event, on_gpu)
    return summed(Copy(kind, us / whole, elements) for kind, us, elements in _copies_in(event, on_gpu))


def summed(copies: Iterable[Copy]) -> list[Copy]:
    """One of each kind."""
    found: dict[str, Copy] = {}
    for copy in copies:
        before = found.get(copy.kind, Copy(copy.kind, 0.0, 0))
        found[copy.kind] = Copy(copy.kind, before.share + copy.share, before.elements + copy.elements)
    return list(found.values())


def together(some: Copies, others: Copies) -> Copies:
    """The copies that were found in two ways."""
    return {index: summed([*some.get(index, []), *others.get(index, [])]) for index in {*some, *others}}


def _copies_in(event: Any, on_gpu: bool) -> Iterator[tuple[str, float, int]]:
    """Kind, microseconds and elements of each copy of more than a number; on a GPU if it ran a kernel."""
    for child in event.cpu_children:
        if child.name in ("aten::_to_copy", "aten::clone"):
            us, shape = device_us(child, on_gpu), child.input_shapes[0]
            if us > 0 and shape:
                yield _kind(child), us, math.prod(shape)
            continue
        laid_out = [kernel.duration for kernel in child.kernels if _LAYOUT_KERNELS.search(kernel.name)]
        if laid_out:
            yield LAYOUT_COPY, sum(laid_out), 0
        yield from _copies_in(child, on_gpu)


def _kind(event: Any) -> str:
    """A cast is asked for a dtype, its second argument."""
    return CAST if event.name == "aten::_to_copy" and event.concrete_inputs[1] is not None else LAYOUT_COPY


def _peaks(profiler: Any, plan: Plan) -> dict[int, int]:
    """The most memory that each leaf holds above what was held before it, by torch's own allocations."""
    events = profiler.profiler.kineto_results.events()
    allocated = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks = {}
    for event in events:
        index = _index(event.name())
        if index in plan.facts:
            held = peak = 0
            for when, size in allocated:
                if event.start_ns() <= when <= event.end_ns():
                    held += size
                    peak = max(peak, held)
            peaks[index] = peak
    return peaks


def _gpu_peaks(task: Task, plan: Plan) -> dict[int, int]:
    """By the leaf's number the most bytes that it holds above what was held before it."""

    def begin() -> int:
        torch.cuda.reset_peak_memory_stats(task.device)
        return torch.cuda.memory_allocated(task.device)

    def end() -> int:
        return torch.cuda.max_memory_allocated(task.device)

    found = watched_pass(task, plan.watch(begin, end), begin, end)
    plan.check(found)
    return {index: found.spans[index].end - found.spans[index].begin for index in plan.facts}


def kernels_of(profiler: Any, on_gpu: bool) -> tuple[tuple[str, int, float], ...]:
    """The kernels of a GPU, on a CPU the operators, with calls and microseconds; the longest first."""
    found = []
    for event in profiler.key_averages():
        ran_here = (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if ran_here and us > 0 and not event.key.startswith((PREFIX, "[memory]")):
            found.append((event.key, event.count, float(us)))
    return tuple(sorted(found, key=lambda kernel: -kernel[2])[:_MOST_KERNELS])
