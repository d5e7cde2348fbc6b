"""`segfast.profile`: running a model in all the passes that a profile is made of."""

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .._optimize.eligible import check_model
from .._optimize.verify import arguments, running_mode, undisturbed
from ..nn._rules import own_class
from .advice import Known, Optimized, optimized_copy, with_advice
from .assemble import rows_of
from .compiled import compiled_profile
from .facts import dtype_name
from .passes import Plan, Stopwatch, Task, flops_of, plan_of
from .profiled import profiled_pass, together
from .quantities import missing_flops
from .reorders import reorders_of
from .roof import roof_of
from .rows import Profile, Row
from .spans import Span
from .timed import MOST_OFF, times_of

# While one thread watches, the call of every module and stdout are not as they are: others wait for it.
_alone = threading.RLock()


def profile(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    train: bool = False,
    *,
    optimize: bool = False,
    compile: bool = False,
    kernels: bool = False,
    nvtx: bool = False,
    seconds: float = 5.0,
    budget: float = 30.0,
    progress: bool = True,
) -> Profile:
    """Time every layer of a model, and say how far each is from what this device can do, and why.

    The model runs some tens of times: watched and not watched in turns, once under torch's FLOP counter, once
    under its profiler. The roof (the rate of matrix products in each dtype, and of a copy) is measured on the
    device and remembered in the user's cache. A copy of the model goes through `segfast.optimize`, for the
    times of the candidates and the gain to expect. The model, its gradients, its buffers and modes, the
    inputs and the random state stay as they are. Of several threads one profiles at a time.

    Args:
        model: any module, on a CPU or a CUDA GPU.
        inputs: its input, a tuple of its positional arguments, or a dict of its keyword arguments, on the
            model's device.
        train: a forward and backward pass in train mode, from random gradients of the outputs; otherwise a
            forward pass in eval and without gradients.
        optimize: profile the optimized copy too, unless it was left as it was.
        compile: profile `torch.compile(model)`: the rows are the kernels and operators of its graphs.
        kernels: list the kernels (on a CPU the operators) that ran.
        nvtx: put each layer into an NVTX range while it is timed, for Nsight Systems.
        seconds: time to spend on timed passes; three of each kind are made however long they take.
        budget: seconds that `segfast.optimize` may measure for; what was measured before is remembered. 0:
            the model is not optimized, and nothing is told of candidates but what is remembered.
        progress: a bar on a terminal, if tqdm is installed.

    Raises:
        TypeError: `model` is not a module, or is a scripted one.
        ValueError: `inputs` have no tensor, or are on another device than the model; `train`, and no output
            requires a gradient; `nvtx` without a GPU, or either of `optimize` and `nvtx` with `compile`;
            `seconds` or `budget` is out of range; the model makes other calls in each pass.
        Exception: the model's own, if it does not run on `inputs`.

    Example:
        >>> import torch, segfast
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> found = segfast.profile(net, torch.randn(1, 3, 32, 32), seconds=0.1, budget=0)
        >>> [(row.name, row.flops) for row in found.rows if row.flops]
        [('0', 388800)]
    """
    check_model(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is scripted or traced: its code is compiled already; profile it before that")
    task = Task(model, arguments(inputs), train, _device(model, inputs))
    _check(task, nvtx, seconds, budget, optimize)
    if compile and (optimize or nvtx):
        raise ValueError("compile: layers are not told apart in a graph; leave out optimize and nvtx")
    with _alone, _bar(progress) as stage, undisturbed(model), running_mode(model, train):
        optimized = Optimized()
        if compile:
            stage("compiling and timing")
            return compiled_profile(task, f"{_title(task)}, compiled", seconds, kernels)
        if budget:
            stage("what segfast.optimize would do")
            optimized = optimized_copy(task, budget, progress)
        found = _profiled(task, optimized, seconds, kernels, nvtx, stage)
        # A model that was left as it was would be timed against itself.
        if optimize and optimized.model is not None and found.expected_gain != 1.0:
            after = replace(task, model=optimized.model)
            with undisturbed(after.model), running_mode(after.model, train):
                again = _profiled(after, Optimized(), seconds, kernels, nvtx, stage)
            found = replace(found, optimized=replace(again, title=f"{again.title}, optimized"))
    return found


def _profiled(
    task: Task, optimized: Optimized, seconds: float, kernels: bool, nvtx: bool, stage: Callable[[str], None]
) -> Profile:
    stage("which layers there are")
    plan = plan_of(task)
    stage("FLOPs")
    flops = flops_of(task, plan)
    stage("copies, casts and memory")
    profiled = profiled_pass(task, plan, kernels)
    forward, backward = reorders_of(task, plan)
    copies = (together(profiled.copies, forward), backward)
    stage("the roof of this device")
    roof = roof_of(task.device, _dtypes(plan))
    stage("times")
    annotate = _nvtx_range if nvtx else None
    times = times_of(task, plan, Stopwatch(task.device), seconds, annotate)
    gain, choices = optimized.gain, Known()
    rows = [
        with_advice(row, facts, optimized, choices, times.whole_us())
        for row, facts in rows_of(plan, times, flops, copies, profiled.peaks, roof)
    ]
    return Profile(
        title=_title(task),
        rows=tuple(rows),
        roof=roof,
        whole_us=times.whole_us(),
        plain_us=times.plain_us(),
        train=task.train,
        batch=task.batch(),
        expected_gain=None if gain is None else gain.ratio if gain.kept else 1.0,
        kernels=profiled.kernels,
        remarks=tuple(filter(None, [optimized.remark, *_remarks(rows, flops.total, times.whole_us())])),
    )


def _nvtx_range(span: Span) -> contextlib.AbstractContextManager:
    return torch.cuda.nvtx.range(span.key.name or "model")


def _remarks(rows: list[Row], flops: int, whole_us: float) -> Iterator[str]:
    """Sentences on sums that do not hold."""
    yield missing_flops(rows, flops)
    found = sum(row.us for row in rows)
    if abs(found - whole_us) > MOST_OFF * whole_us:
        yield "The medians of the rows add up to more than 5 % beside the whole: the machine is busy."


def _device(model: nn.Module, inputs: Any) -> torch.device:
    """The one device that the model and its inputs are on."""
    tensors = [t for t in _pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError(f"inputs must be a tensor or hold one, got {type(inputs).__name__}")
    devices = {t.device for t in (*tensors, *model.parameters(), *model.buffers())}
    if len(devices) > 1:
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model and inputs must be on one device, got {where}")
    (device,) = devices
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"model must be on a CPU or a CUDA GPU, got {device}")
    return device


def _check(task: Task, nvtx: bool, seconds: float, budget: float, optimize: bool) -> None:
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive and finite, got {seconds!r}")
    if not 0 <= budget < math.inf:
        raise ValueError(f"budget must be a number of seconds, 0 or more, got {budget!r}")
    if optimize and not budget:
        raise ValueError("optimize needs a budget of more than 0 seconds")
    if nvtx and task.device.type != "cuda":
        raise ValueError(f"nvtx: ranges are for a GPU, and the model is on {task.device}")
    if any(map(nn.parameter.is_lazy, (*task.model.parameters(), *task.model.buffers()))):
        raise ValueError("model has lazy layers, which have no weights yet; run it once before")


def _dtypes(plan: Plan) -> list[torch.dtype]:
    """The dtypes that the leaves compute in."""
    names = dict.fromkeys(facts.dtype for facts in plan.facts.values() if facts.dtype)
    return [getattr(torch, name) for name in names]


def _title(task: Task) -> str:
    tensors = [t for t in _pytree.tree_leaves(task.inputs) if isinstance(t, Tensor)]
    kind = "forward and backward" if task.train else "forward"
    shapes = ", ".join(f"{list(t.shape)} {dtype_name(t.dtype)}" for t in tensors)
    return f"{own_class(task.model).__name__}, {kind}, input {shapes}"


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Callable[[str], None]]:
    """Yields what names the stage that begins: beside a bar, where stderr is a terminal and tqdm is there."""
    bar: Any = None
    if shown and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(desc="profiling", unit=" stages", leave=False)

    def stage(name: str) -> None:
        if bar is not None:
            bar.set_postfix_str(name)
            bar.update()

    try:
        yield stage
    finally:
        if bar is not None:
            bar.close()
