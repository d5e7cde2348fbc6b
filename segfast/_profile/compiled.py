"""The profile of a model under `torch.compile`: a row for each kernel and operator of its graphs."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import record_function

from .._timing import quantiles
from ..commands._memory import profiler_silenced
from .facts import BETWEEN, kind_of_name
from .passes import Stopwatch, Task, plain_pass
from .profiled import PREFIX, device_us, kernels_of, profiler_of
from .roof import roof_of
from .rows import Profile, Row
from .timed import Interval, Samples, Times, add_whole

_ROUNDS = 10
# What ran, apart from the runtime around it: operators, and inductor's kernels.
_RAN = re.compile(r"(aten|mkldnn|onednn|segfast|quantized)::|graph_\d+_|triton_|cpp_fused")


def compiled_profile(task: Task, title: str, seconds: float, wants_kernels: bool) -> Profile:
    """Compile the model and time it, under torch's profiler and without it in turns."""
    import torch._inductor.config as inductor  # which takes a second to import

    stopwatch = Stopwatch(task.device)
    times: dict[str, dict[tuple[int, str], Samples]] = {"forward": {}, "backward": {}}
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
                found = plain_pass(compiled, stopwatch.now, lambda part: record_function(PREFIX + part))
                stopwatch.wait()
            add_whole(wholes.whole, found, stopwatch)
            for direction, parts in times.items():
                _collect(parts, profiler, direction, task.device.type == "cuda")
            if turn + 1 >= 3 and time.perf_counter() - begun > seconds:
                break
    rows: list[Row] = []
    for direction, walls in zip(times, wholes.whole, strict=True):
        rows += _rows(times[direction], direction, walls)
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
        remarks=("Of compiled graphs FLOPs and bytes are not known kernel by kernel, nor what bounds each.",),
    )


def _collect(parts: dict[tuple[int, str], Samples], profiler: Any, direction: str, on_gpu: bool) -> None:
    """Add what ran in one pass, each by how many of its name ran before it."""
    for event in profiler.events():
        if event.name != PREFIX + direction or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        before: dict[str, int] = {}
        for ran in _ran(event):
            turn = before[ran.name] = before.get(ran.name, 0) + 1
            start = ran.time_range.start - event.time_range.start
            parts.setdefault((turn, ran.name), Samples()).add(start, device_us(ran, on_gpu))


def _ran(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        if _RAN.match(child.name):
            yield child
        else:
            yield from _ran(child)


def _rows(parts: dict[tuple[int, str], Samples], direction: str, walls: list[float]) -> Iterator[Row]:
    if not walls:
        return
    intervals = {key: samples.interval() for key, samples in parts.items()}
    for (_, name), interval in sorted(intervals.items(), key=lambda item: item[1].start):
        yield Row(name, kind_of_name(name), direction, *interval)
    whole = quantiles(walls)
    rest = max(0.0, whole[0] - sum(interval.us for interval in intervals.values()))
    yield Row("", BETWEEN, direction, *Interval(whole[0], rest, rest, rest))
