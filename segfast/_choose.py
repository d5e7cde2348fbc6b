"""Choosing what runs each call of a model, by trying, and timing whether the model is faster for it."""

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ._compare import call, leaves, running_mode, undisturbed
from ._judge import record_of
from ._timing import interleave
from .nn._fused_dtype import keep_contiguous
from .ops._backend import backend, get_backend
from .ops._choice import Call, Collected, choices, collect
from .ops._measure import clock, measure_and_keep

# Tests that want no times switch this off.
MEASURES = True
# A choice can change the layout that the calls after it see, and these are measured then.
_PASSES = 3
# Whole models are timed for so long, and twice as long where the model after is not clearly faster. Else the
# first run is the only one, if all together take longer than `_SLOW_S`.
_MODEL_BUDGET_S, _SLOW_S = 1.0, 1.0
_CLEARLY = 1.1

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Gain:
    """Milliseconds a call of a model before and after, and on how many threads.

    `layout` names the faster one before: "as given" or "channels_last". `kept` is False where nothing was
    faster and the model was left as it was. `error` is the largest change of an output as a part of its
    largest value; in another `dtype` it may be large, else a model with more than rounding is left alone.
    `unmeasured` calls did not fit into the budget.
    A model that is left alone has channels_last weights where that was faster.
    """

    before_ms: float
    after_ms: float
    layout: str
    threads: int
    kept: bool
    dtype: str | None = None
    error: float = 0.0
    unmeasured: int = 0

    @property
    def ratio(self) -> float:
        """How many times as fast the model became."""
        return self.before_ms / self.after_ms

    def __str__(self) -> str:
        where = f"on this CPU with {self.threads} thread{'s' if self.threads > 1 else ''}"
        before = f"{self.before_ms:.1f} ms before, {self.layout}"
        if self.error > _most_changed(self.dtype):
            return f"Outputs changed by {self.error:.2g} of the largest value {where}; left as it was."
        if not self.kept:
            laid_out = ", but for channels_last weights" if self.layout == "channels_last" else ""
            return (
                f"Not faster {where}: {before}, {self.after_ms:.1f} ms optimized; left as it was{laid_out}."
            )
        text = f"{self.ratio:.2f} times as fast {where}: {before}, {self.after_ms:.1f} ms now"
        if self.dtype is not None:
            text += f" in {self.dtype}, where outputs changed by {self.error:.2g} of the largest value"
        if self.unmeasured:
            text += f"; {self.unmeasured} calls did not fit into the budget"
        return f"{text}."


def can_measure(model: nn.Module, inputs: Inputs) -> bool:
    """Whether something can be chosen for the calls of `model` on `inputs`: on a CPU."""
    tensors = [t for t in _pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    owned = [*model.parameters(), *model.buffers()]
    return MEASURES and bool(tensors) and bool(owned) and all(t.is_cpu for t in (*tensors, *owned))


def choose(model: nn.Module, inputs: Inputs, budget_s: float, progress: bool) -> int | None:
    """Measure what calls of `model` on `inputs` have no choice yet; returns how many did not fit the budget.

    None if the model makes no call that anything could be chosen for. What was chosen for a layer is noted in
    its record.
    """
    left = 0
    end = time.perf_counter() + budget_s
    try:
        made = _calls(model, inputs, zeros=True)
    except Exception:  # a forward that does not take any values
        made = _calls(model, inputs)
    for _ in range(_PASSES):
        unseen = [each for each in made.counts if each not in choices().measured]
        left = len(unseen)
        rest = end - time.perf_counter()
        if left == 0 or rest <= 0:
            break
        with _bar(len(unseen), progress) as on_call:
            left -= len(measure_and_keep(unseen, budget_s=rest, on_call=on_call))
        made = _calls(model, inputs)
        if left:
            break
    _note(model, made)
    return left if made.counts else None


def gain(model: nn.Module, plain: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> Gain:
    """Time `model` on `inputs` beside what it was before, in two layouts; all in eval, without gradients.

    Where the outputs were contiguous before and are no more, they are made so from now on.
    """
    models = {"as given": plain, "channels_last": _in_channels_last(plain), "after": model}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for each in models.values():
            stack.enter_context(running_mode(each, False))
            stack.enter_context(undisturbed(each))
        runs = {name: _run(each, inputs, name != "after") for name, each in models.items()}
        first: dict[str, float] = {}

        def run_first(name: str) -> Any:
            begin = clock()
            result = runs[name]()
            first[name] = clock() - begin
            return result

        expected, actual = run_first("as given"), run_first("after")
        error = _change(expected, actual)
        if _lost_layout(expected, actual):
            keep_contiguous(model)
        del expected, actual
        try:
            run_first("channels_last")
        except RuntimeError:  # a forward that takes views of contiguous images
            del runs["channels_last"]
        ms = _milliseconds(runs, first)
    after = ms.pop("after")
    layout = min(ms, key=ms.__getitem__)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    return Gain(
        before_ms=ms[layout],
        after_ms=after,
        layout=layout,
        threads=torch.get_num_threads(),
        kept=after <= ms[layout] and error <= _most_changed(name),
        dtype=name,
        error=error,
    )


def _milliseconds(runs: dict[str, Callable[[], Any]], first: dict[str, float]) -> dict[str, float]:
    """What each model takes. `first` are the seconds of its first run, which tell enough of slow models.

    A first run takes longer by what is prepared for each call, which is little where it takes so long.
    """
    before = min(seconds for name, seconds in first.items() if name != "after")
    clear = before > _CLEARLY * first["after"]
    if clear and sum(first.values()) > _SLOW_S:
        return {name: 1e3 * seconds for name, seconds in first.items()}
    least, budget = (1, _MODEL_BUDGET_S) if clear else (3, 2 * _MODEL_BUDGET_S)
    device = torch.device("cpu")
    times = interleave(runs, device, budget_s=budget, min_rounds=least, max_rounds=30, clock=clock)
    return {name: timing.wall_us / 1e3 for name, timing in times.items()}


def _most_changed(dtype: str | None) -> float:
    """How much of the largest value outputs may change by, over many layers."""
    return math.sqrt(torch.finfo(torch.float32).eps) if dtype is None else 0.25


def _in_channels_last(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if parameter.dim() == 4 and type(parameter) is nn.Parameter:
            laid_out = parameter.detach().clone(memory_format=torch.channels_last)
            memo[id(parameter)] = nn.Parameter(laid_out, parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _lost_layout(before: Any, after: Any) -> bool:
    """Whether images that were contiguous are so no more."""
    return any(
        isinstance(a, Tensor) and a.dim() == 4 and a.is_contiguous() and not b.is_contiguous()
        for (_, a), (_, b) in zip(leaves(before), leaves(after), strict=True)
    )


def _run(model: nn.Module, inputs: Inputs, on_aten: bool) -> Callable[[], Any]:
    def run() -> Any:
        with backend("aten" if on_aten else get_backend()):
            return call(model, inputs)

    return run


def _calls(model: nn.Module, inputs: Inputs, zeros: bool = False) -> Collected:
    with running_mode(model, False), undisturbed(model), torch.no_grad(), collect(zeros) as collected:
        call(model, inputs)
    return collected


def _note(model: nn.Module, collected: Collected) -> None:
    """Note in each layer's record what runs it, for `report`."""
    calls = collected.by_weight()
    for module in model.modules():
        weight = module._parameters.get("weight")
        made = dict.fromkeys(calls.get(id(weight), ()))
        found = [_chosen(each) for each in made]
        if found:
            record_of(module)["choices"] = tuple(found)


def _chosen(made: Call) -> str:
    choice = choices().find(made)
    return "aten: not measured" if choice is None else str(choice)


def _change(expected: Any, actual: Any) -> float:
    """The largest difference of outputs as a part of the largest value; infinite where one is not finite."""
    worst = 0.0
    for (_, a), (_, b) in zip(leaves(expected), leaves(actual), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            difference = (a.double() - b.double()).abs().max().item()
            scale = a.abs().max().item()
            if difference != difference or difference == float("inf"):
                return float("inf")
            worst = max(worst, difference / scale if scale else difference)
    return worst


@contextlib.contextmanager
def _bar(calls: int, shown: bool) -> Iterator[Callable[[Call], None]]:
    """A progress bar on stderr, where that is a terminal and the package tqdm is installed."""
    bar: Any = None
    if shown and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=calls, desc="measuring on this machine", unit="call", leave=False)
    try:
        yield lambda _: None if bar is None else bar.update()
    finally:
        if bar is not None:
            bar.close()
