"""The gain of a model: timed as a whole beside what it was before, its outputs compared."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._timing import interleave
from ..nn._fused.sequence import fusing
from ..nn._fused.whole_model import keep_contiguous
from ..ops._backend import backend, get_backend
from ..ops._choice import ATEN, choices
from ..ops._measure import clock
from .eligible import RECORD, record_of
from .measure import device_of
from .verify import Inputs, call, leaves, running_mode, undisturbed

# Whole models are timed for so long, and twice as long where the model after is not clearly faster. Else the
# first run is the only one, if all together take longer than `_SLOW_S`.
_MODEL_BUDGET_S, _SLOW_S = 1.0, 1.0
_CLEARLY = 1.1
# A slow model is not timed in channels_last either where it takes no more than this part of what its calls
# alone took ATen in that layout.
_DECIDED = 0.75
# What a model must take of its time before to count as faster: less is noise.
_WORTH_IT = 0.99


@dataclass(frozen=True)
class Gain:
    """Milliseconds a call of a model before and after, and on what.

    `layout` names the faster one before: "as given" or "channels_last". `kept` is False where nothing was
    faster and the model was left as it was. `error` is the largest change of an output as a part of its
    largest value, `allowed` what it may be; in another `dtype` that is much, else a model with more than
    rounding is left alone. `unmeasured` calls did not fit into the budget. `gpu` is the GPU's name, "" on a
    CPU, where `threads` counts. `train` says that a training step was timed, and not a call in eval.
    A model that is left alone has channels_last weights where that was faster. `measured_on` is the date of a
    measurement that was remembered, "" of a new one.
    """

    before_ms: float
    after_ms: float
    layout: str
    threads: int
    kept: bool
    dtype: str | None = None
    error: float = 0.0
    allowed: float = math.inf
    unmeasured: int = 0
    gpu: str = ""
    train: bool = False
    measured_on: str = ""

    @property
    def ratio(self) -> float:
        """How many times as fast the model became."""
        return self.before_ms / self.after_ms

    def __str__(self) -> str:
        where = f"on {self.gpu}" if self.gpu else f"on this CPU with {self.threads} thread"
        where += "s" if not self.gpu and self.threads > 1 else ""
        where += f" (measured on {self.measured_on})" if self.measured_on else ""
        what = "a training step " if self.train else ""
        before = f"{what}{self.before_ms:.1f} ms before, {self.layout}"
        left = f"; {self.unmeasured} calls did not fit into the budget" if self.unmeasured else ""
        if self.error > self.allowed:
            return f"Outputs changed by {self.error:.2g} of the largest value {where}; left as it was."
        if not self.kept:
            laid_out = ", but for channels_last weights" if self.layout == "channels_last" else ""
            return (
                f"Not faster {where}: {before}, {self.after_ms:.1f} ms optimized; left as it was{laid_out}"
                f"{left}."
            )
        text = f"{self.ratio:.2f} times as fast {where}: {before}, {self.after_ms:.1f} ms now"
        if self.dtype is not None:
            text += f" in {self.dtype}, where outputs changed by {self.error:.2g} of the largest value"
        return f"{text}{left}."


def gain(
    model: nn.Module,
    plain: nn.Module,
    inputs: Inputs,
    dtype: torch.dtype | None,
    train: bool = False,
    fused: bool = False,
) -> Gain:
    """Time `model` on `inputs` beside what it was before, in two layouts; in eval or, with `train`, a step.

    With `fused` outputs are compared also with everything fused that is where images are large. Where they
    were contiguous before and are no more, they are made so from now on. Of a model that takes long, what
    ATen took for its calls stands for the time in channels_last, if that is clearly more than it takes now.
    """
    device = device_of(model, inputs) or torch.device("cpu")
    models = {"as given": plain, "after": model}
    first: dict[str, float] = {}

    def run_first(name: str, train: bool = False) -> Any:
        run = _run(models[name], inputs, name != "after", train)
        begin = clock()
        result = run()
        first[name] = clock() - begin
        return result

    with contextlib.ExitStack() as stack:
        for each in models.values():
            stack.enter_context(undisturbed(each))
        error, lost, last = _outputs(models, run_first, inputs, fused)
        allowed = _most_changed(model, dtype, device)
        least_s = _seconds_on_aten(model)
        usual = device.type == "cpu" and dtype is None and error <= allowed
        decided = usual and sum(first.values()) > _SLOW_S and first["after"] <= _DECIDED * least_s
        if not decided:
            models = {"as given": plain, "channels_last": _in_channels_last(plain), "after": model}
            stack.enter_context(undisturbed(models["channels_last"]))
        if lost:
            record_of(model)["last"] = last[-1:]
            for name in models.keys() - {"as given"}:
                keep_contiguous(models[name], *map(models[name].get_submodule, last[-1:]))
        for each in models.values():
            stack.enter_context(running_mode(each, train))
        if train:
            run_first("as given", train)
            run_first("after", train)
        if decided:
            first["channels_last"] = least_s
        else:
            try:
                run_first("channels_last", train)
            except RuntimeError:  # a forward that takes views of contiguous images
                del models["channels_last"]
        runs = {name: _run(each, inputs, name != "after", train) for name, each in models.items()}
        ms = _milliseconds(runs, first, device)
    after = ms.pop("after")
    layout = min(ms, key=ms.__getitem__)
    return Gain(
        before_ms=ms[layout],
        after_ms=after,
        layout=layout,
        threads=torch.get_num_threads(),
        kept=after <= _WORTH_IT * ms[layout] and error <= allowed,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        error=error,
        allowed=allowed,
        gpu=torch.cuda.get_device_properties(device).name if device.type == "cuda" else "",
        train=train,
    )


def _outputs(
    models: Mapping[str, nn.Module], run_first: Callable[[str], Any], inputs: Inputs, fused: bool
) -> tuple[float, bool, list[str]]:
    """In eval: the largest change of the outputs, True if their layout changed, the convolutions called."""
    with contextlib.ExitStack() as evaluating:
        for each in models.values():
            evaluating.enter_context(running_mode(each, False))
        with _convolutions_called(models["as given"]) as last:
            expected = run_first("as given")
        error = 0.0
        if fused:
            with fusing(True):
                error = _change(expected, _run(models["after"], inputs, False, False)())
        actual = run_first("after")
        return max(error, _change(expected, actual)), _lost_layout(expected, actual), last


def _milliseconds(
    runs: dict[str, Callable[[], Any]], first: dict[str, float], device: torch.device
) -> dict[str, float]:
    """Milliseconds of each model. `first` are the seconds of its first run, which tell enough of slow ones.

    A first run takes longer by what is prepared for each call, which is little where it takes so long.
    """
    before = min(seconds for name, seconds in first.items() if name != "after")
    # On a GPU that is the time to issue its work.
    clear = device.type == "cpu" and before > _CLEARLY * first["after"]
    if clear and sum(first.values()) > _SLOW_S:
        return {name: 1e3 * seconds for name, seconds in first.items()}
    least, budget = (1, _MODEL_BUDGET_S) if clear else (3, 2 * _MODEL_BUDGET_S)
    times = interleave(runs, device, budget_s=budget, min_rounds=least, max_rounds=30, clock=clock)
    return {name: timing.wall_us / 1e3 for name, timing in times.items()}


def _seconds_on_aten(model: nn.Module) -> float:
    """The seconds that ATen took for the calls of `model` in channels_last, as measured on a CPU."""
    calls = vars(model).get(RECORD, {}).get("calls", {})
    us = {call: choices().measured[call].us for call in calls if call in choices().measured}
    return sum(calls[call] * each.get(ATEN, 0.0) for call, each in us.items()) / 1e6


@contextlib.contextmanager
def _convolutions_called(model: nn.Module) -> Iterator[list[str]]:
    """The names of the model's convolutions, in the order in which they are called meanwhile."""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _most_changed(model: nn.Module, dtype: torch.dtype | None, device: torch.device) -> float:
    """How much of the largest value outputs may change by, over many layers."""
    if dtype is not None:
        return 0.25
    eps = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    if device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        eps.append(2.0**-11)
    return math.sqrt(max(eps, default=torch.finfo(torch.float32).eps))


def _in_channels_last(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        if parameter.dim() == 4 and type(parameter) is nn.Parameter:
            laid_out = parameter.detach().clone(memory_format=torch.channels_last)
            memo[id(parameter)] = nn.Parameter(laid_out, parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _lost_layout(before: Any, after: Any) -> bool:
    """True if images that were contiguous are so no more."""
    return any(
        isinstance(a, Tensor) and a.dim() == 4 and a.is_contiguous() and not b.is_contiguous()
        for (_, a), (_, b) in zip(leaves(before), leaves(after), strict=True)
    )


def _run(model: nn.Module, inputs: Inputs, on_aten: bool, train: bool) -> Callable[[], Any]:
    """A call of `model` without gradients, or its forward and backward pass."""

    def run() -> Any:
        with backend("aten" if on_aten else get_backend()), torch.set_grad_enabled(train):
            outputs = call(model, inputs)
            if not train:
                return outputs
            scores = [t for _, t in leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
            trained = [p for p in model.parameters() if p.requires_grad]
            if not scores or not trained:
                raise ValueError(
                    "train needs a model with parameters, and an output, that require a gradient"
                )
            total = torch.stack([t.float().mean() for t in scores]).sum()
            return torch.autograd.grad(total, trained, allow_unused=True)

    return run


def _change(expected: Any, actual: Any) -> float:
    """The largest difference of outputs as a part of the largest value; infinite where one is not finite."""
    before, after = ([leaf for _, leaf in leaves(outputs)] for outputs in (expected, actual))
    if len(before) != len(after):
        return math.inf
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            if a.shape != b.shape:
                return math.inf
            difference = (a.double() - b.double()).abs().max().item()
            scale = a.abs().max().item()
            if difference != difference or difference == math.inf:
                return math.inf
            worst = max(worst, difference / scale if scale else difference)
    return worst
