"""The profile of a model under `torch.compile`: a row for each kernel and operator of its graphs."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

from .._timing import quantiles
from ..commands._memory import profiler_silenced
from .called import flops_of_call
from .facts import BETWEEN, kind_of_name
from .passes import OWN_FLOPS, Stopwatch, Task, plain_pass
from .profiled import PREFIX, device_us, kernels_of, profiler_of
from .quantities import missing_flops
from .roof import roof_of
from .rows import Profile, Row
from .timed import Interval, Samples, Times, add_whole

_ROUNDS = 10
_UNKNOWN = (
    "Of compiled graphs the FLOPs are those of the operators that they call: of kernels that inductor wrote "
    "none are known, nor bytes, nor what bounds each."
)
# What ran, apart from the runtime around it: operators, and inductor's kernels.
_RAN = re.compile(r"(aten|mkldnn|onednn|segfast|quantized)::|graph_\d+_|triton_|cpp_fused")

Ran = tuple[int, str]


def compiled_profile(task: Task, title: str, seconds: float, wants_kernels: bool) -> Profile:
    """Compile the model and time it, under torch's profiler and without it in turns."""
    import torch._inductor.config as inductor  # which takes a second to import

    stopwatch = Stopwatch(task.device)
    times: dict[str, dict[Ran, Samples]] = {"forward": {}, "backward": {}}
    wholes = Times()
    with inductor.patch({"cpp.enable_kernel_profile": True}):
        compiled = replace(task, model=torch.compile(task.model))  # type: ignore[arg-type]
        for _ in range(2):
            plain_pass(compiled, stopwatch.now)
        begun = time.perf_counter()
        for turn in range(_ROUNDS):
            found = plain_pass(compiled, stopwatch.now)
            stopwatch.wait()
            add_whole(wholes.plain, found, stopwatch)
            profiler = profiler_of(task.device)
            with profiler_silenced(), profiler:
                found = plain_pass(compiled, stopwatch.now, _annotated)
                stopwatch.wait()
            add_whole(wholes.whole, found, stopwatch)
            for direction, parts in times.items():
                for ran, start, event in _ran_in(profiler, direction):
                    us = device_us(event, task.device.type == "cuda")
                    parts.setdefault(ran, Samples()).add(start, us)
            if turn + 1 >= 3 and time.perf_counter() - begun > seconds:
                break
        flops = _flops(compiled, stopwatch)
    rows: list[Row] = []
    for direction, walls in zip(times, wholes.whole, strict=True):
        rows += _rows(times[direction], direction, walls, flops)
    with FlopCounterMode(display=False, custom_mapping=OWN_FLOPS) as counter:
        plain_pass(task, stopwatch.now)
    dtypes = {t.dtype for t in (*task.model.parameters(), *task.model.buffers())}
    return Profile(
        title=title,
        rows=tuple(rows),
        roof=roof_of(task.device, dtypes),
        whole_us=wholes.whole_us(),
        plain_us=wholes.plain_us(),
        train=task.train,
        batch=task.batch(),
        kernels=kernels_of(profiler, task.device.type == "cuda") if wants_kernels else (),
        remarks=tuple(filter(None, [_UNKNOWN, missing_flops(rows, counter.get_total_flops())])),
    )


def _annotated(part: str) -> Any:
    return record_function(PREFIX + part)


def _ran_in(profiler: Any, direction: str) -> Iterator[tuple[Ran, float, Any]]:
    """Operators and kernels of a pass: how many of the name so far, and the name; the start; the event."""
    for event in profiler.events():
        if event.name != PREFIX + direction or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        before: dict[str, int] = {}
        for ran in _ran(event):
            turn = before[ran.name] = before.get(ran.name, 0) + 1
            yield (turn, ran.name), ran.time_range.start - event.time_range.start, ran


def _flops(compiled: Task, stopwatch: Stopwatch) -> dict[tuple[str, Ran], int]:
    """Those of each operator, of a pass whose arguments are recorded, which takes time and is not timed."""
    with profiler_silenced(), profiler_of(compiled.device, record_shapes=True) as profiler:
        plain_pass(compiled, stopwatch.now, _annotated)
        stopwatch.wait()
    return {
        (direction, ran): flops_of_call(event)
        for direction in ("forward", "backward")
        for ran, _, event in _ran_in(profiler, direction)
    }


def _ran(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        if _RAN.match(child.name):
            yield child
        else:
            yield from _ran(child)


def _rows(
    parts: dict[Ran, Samples], direction: str, walls: list[float], flops: dict[tuple[str, Ran], int]
) -> Iterator[Row]:
    if not walls:
        return
    intervals = {key: samples.interval() for key, samples in parts.items()}
    for ran, interval in sorted(intervals.items(), key=lambda item: item[1].start):
        name = ran[1]
        yield Row(name, kind_of_name(name), direction, *interval, flops=flops.get((direction, ran), 0))
    whole = quantiles(walls)
    rest = max(0.0, whole[0] - sum(interval.us for interval in intervals.values()))
    yield Row("", BETWEEN, direction, *Interval(whole[0], rest, rest, rest))
