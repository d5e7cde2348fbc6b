"""Choosing what runs each call of a model, by trying, and timing whether the model is faster for it."""

import contextlib
import copy
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .._timing import interleave
from ..nn._fused.eager import only_forward
from ..nn._fused.sequence import FusedSequence, fusing, sequence_of, unfuse_some
from ..nn._fused.whole_model import keep_contiguous
from ..ops._backend import backend, get_backend
from ..ops._call import AnyCall, Call
from ..ops._choice import ATEN, Choice, Collected, choices, collect
from ..ops._gpu_call import ALL, FEW, GpuCall
from ..ops._measure import clock, measure_and_keep
from .eligible import RECORD, record_of
from .verify import Inputs, call, leaves, running_mode, undisturbed

# Tests that want no times switch this off.
MEASURES = True
# A choice can change the layout that the calls after it see, and these are measured then.
_PASSES = 3
# Whole models are timed for so long, and twice as long where the model after is not clearly faster. Else the
# first run is the only one, if all together take longer than `_SLOW_S`.
_MODEL_BUDGET_S, _SLOW_S = 1.0, 1.0
_CLEARLY = 1.1
# A slow model is not timed in channels_last either where it takes no more than this part of what its calls
# alone took ATen in that layout.
_DECIDED = 0.75
# What a sequence costs to be asked for in somebody else's forward, and how large images may be for which an
# activation that is not written over its input costs no more than that.
_SEQUENCE_US, _SMALL = 15.0, 2**16
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


def device_of(model: nn.Module, inputs: Inputs) -> torch.device | None:
    """The CPU or the GPU that `model` and `inputs` are on together; None if they are not, or on another."""
    tensors = [t for t in _pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    owned = [*model.parameters(), *model.buffers()]
    devices = {t.device for t in (*tensors, *owned)}
    if not MEASURES or not tensors or not owned or len(devices) > 1:
        return None
    (device,) = devices
    return device if device.type in ("cpu", "cuda") else None


def is_measured_on_gpu(model: nn.Module, inputs: Inputs) -> bool:
    """True if what runs is chosen on a GPU: not where a backend was asked for by name."""
    device = device_of(model, inputs)
    return device is not None and device.type == "cuda" and get_backend() == "auto"


_most = FEW


def measures_anew() -> bool:
    """True if what is remembered is measured all the same."""
    return _most == ALL


@contextlib.contextmanager
def thoroughly() -> Iterator[None]:
    """Within it all tiles of each kernel are tried, also of calls that were measured before."""
    global _most
    previous, _most = _most, ALL
    try:
        yield
    finally:
        _most = previous


def choose(
    model: nn.Module, inputs: Inputs, budget_s: float, progress: bool, train: bool = False
) -> int | None:
    """Measure what calls of `model` on `inputs` have no choice yet; returns how many did not fit the budget.

    Of a forward pass in eval and, with `train`, of a training step first. None if the model makes no call
    that anything could be chosen for. What was chosen for a layer is noted in its record.
    """
    left = 0
    end = time.perf_counter() + budget_s
    modes = (True, False) if train else (False,)
    device = device_of(model, inputs)
    known: Mapping[AnyCall, Choice] = {} if _most == ALL else choices().measured
    tried: set[AnyCall] = set()
    proven: set[tuple[str, torch.dtype]] = set()
    zeros = all(map(only_forward, model.modules()))  # a hook may keep what it sees
    try:
        made = [_calls(model, inputs, training, zeros) for training in modes]
    except Exception:  # a forward that does not take any values
        zeros = False
        made = [_calls(model, inputs, training, zeros) for training in modes]
    for _ in range(_PASSES):
        calls = dict.fromkeys(call for each in made for call in each.counts)
        unseen = [call for call in calls if call not in tried and not _is_settled(call, known, device)]
        unproven = {each for collected in made for each in collected.unproven}
        left = len(unseen)
        rest = end - time.perf_counter()
        if not (unseen or unproven - proven) or rest <= 0:
            break
        tried |= set(unseen)
        with _bar(len(unseen), progress) as bar:
            end += _prove(unseen, unproven, device, bar)
            left -= measure(unseen, device, end - time.perf_counter(), bar.call)
        proven |= unproven
        made = [_calls(model, inputs, training, zeros) for training in modes]
        if left:
            break
    by_weight = _note(model, made)
    if device is not None and device.type == "cpu":
        record_of(model)["apart"] = _let_go(model, by_weight)
    counts: Counter[AnyCall] = Counter()
    for each in made:
        counts.update(each.counts)
    record_of(model)["calls"] = counts
    return left if any(each.counts for each in made) else None


def _is_settled(call: AnyCall, known: Mapping[AnyCall, Choice], device: torch.device | None) -> bool:
    """True if there is a choice, and no candidate that was left out of it as unproven may join now."""
    choice = known.get(call)
    if choice is None or not choice.unproven or device is None or not isinstance(call, GpuCall):
        return choice is not None
    from ..ops import _gpu_tune  # which needs triton

    return not _gpu_tune.may_join(call, choice, device)


def _prove(
    calls: Iterable[AnyCall],
    unproven: Iterable[tuple[str, torch.dtype]],
    device: torch.device | None,
    bar: "_Bar",
) -> float:
    """Prove the kernels that a GPU needs for `calls`, once; returns how many seconds that took."""
    if device is None or device.type != "cuda":
        return 0.0
    from ..ops import _gpu_tune  # which needs triton

    begin = time.perf_counter()
    on_gpu = [call for call in calls if isinstance(call, GpuCall)]
    _gpu_tune.prove_missing(on_gpu, device, bar.proof, unproven)
    return time.perf_counter() - begin


def measure(
    calls: Iterable[AnyCall],
    device: torch.device | None,
    budget_s: float,
    on_call: Callable[[AnyCall], None] = lambda call: None,
) -> int:
    """Choose for each of `calls`, of our kernels what is proven; returns for how many."""
    on_gpu = [call for call in calls if isinstance(call, GpuCall)]
    on_cpu = [call for call in calls if isinstance(call, Call)]
    done = len(measure_and_keep(on_cpu, budget_s=budget_s, on_call=on_call)) if on_cpu else 0
    if device is not None and device.type == "cuda":
        from ..ops import _gpu_tune  # which needs triton

        options: dict[str, Any] = {"most": _most, "on_call": on_call}
        done += len(_gpu_tune.measure_and_keep(on_gpu, device, budget_s=budget_s, **options))
    return done


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
        with contextlib.ExitStack() as evaluating:
            for each in models.values():
                evaluating.enter_context(running_mode(each, False))
            with _convolutions_called(plain) as last:
                expected = run_first("as given")
            error = 0.0
            if fused:
                with fusing(True):
                    error = _change(expected, _run(model, inputs, False, False)())
            actual = run_first("after")
            error = max(error, _change(expected, actual))
            lost = _lost_layout(expected, actual)
            del expected, actual
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


def _calls(model: nn.Module, inputs: Inputs, train: bool, zeros: bool) -> Collected:
    with contextlib.ExitStack() as stack:
        stack.enter_context(running_mode(model, train))
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.set_grad_enabled(train))
        collected = stack.enter_context(collect(zeros))
        call(model, inputs)
    return collected


def _note(model: nn.Module, made: Iterable[Collected]) -> dict[int, list[AnyCall]]:
    """Note in each layer's record what runs it, for `report`; returns the calls by the id of their weight."""
    calls: dict[int, list[AnyCall]] = {}
    for collected in made:
        for weight, found in collected.by_weight().items():
            calls.setdefault(weight, []).extend(found)
    for module in model.modules():
        own = module._parameters.get("weight")
        chosen = [_chosen(each) for each in dict.fromkeys(calls.get(id(own), ()))]
        if chosen:
            record_of(module)["choices"] = tuple(chosen)
    return calls


def _let_go(model: nn.Module, calls: Mapping[int, Sequence[AnyCall]]) -> list[str]:
    """Unfuse the sequences without a norm that save less than they cost; returns their first layers' names.

    All of their layers compute the same on ATen, one by one.
    """
    sequences = {}
    for name, module in model.named_modules():
        sequence = sequence_of(module)
        if sequence is not None and sequence.layers[0] is module and not _pays(sequence, calls):
            sequences[name] = sequence
    unfuse_some(model, list(sequences.values()))
    return list(sequences)


def _pays(sequence: FusedSequence, calls: Mapping[int, Sequence[AnyCall]]) -> bool:
    if not all([fused.plain() for _, fused in sequence.options]):
        return True  # passes over memory are saved
    owned = [layer._parameters.get("weight") for layer in sequence.layers]
    over_input = [getattr(layer, "inplace", False) for layer in sequence.layers if not layer._parameters]
    made = [call for weight in owned for call in calls.get(id(weight), ())]
    measured = choices().measured
    known = [(call, measured[call]) for call in made if isinstance(call, Call) and call in measured]
    saved = sum([choice.us.get(ATEN, 0.0) - choice.us.get(choice.name, 0.0) for _, choice in known])
    alike = [c.channels_last and (all(over_input) or math.prod(c.output()) <= _SMALL) for c, _ in known]
    return not known or len(known) < len(made) or not all(alike) or saved >= _SEQUENCE_US


def _chosen(made: AnyCall) -> str:
    choice = choices().find(made)
    return "aten: not measured" if choice is None else str(choice)


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


class _Bar:
    """A progress bar on stderr; none at all where there is no `bar`."""

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar

    def call(self, _: AnyCall) -> None:
        """One more call is measured."""
        if self._bar is not None:
            self._bar.update()

    def proof(self, row: Any) -> None:
        """One more case of a proof is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"proving {row.operation} in {row.dtype}")


@contextlib.contextmanager
def _bar(calls: int, shown: bool) -> Iterator[_Bar]:
    """A progress bar, where stderr is a terminal and the package tqdm is installed."""
    bar: Any = None
    if shown and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=calls, desc="measuring on this machine", unit="call", leave=False)
    try:
        yield _Bar(bar)
    finally:
        if bar is not None:
            bar.close()
