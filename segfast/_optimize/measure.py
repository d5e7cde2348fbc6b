"""Choosing what runs each call of a model, by trying."""

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..nn._fused.eager import only_forward
from ..nn._fused.sequence import FusedSequence, sequence_of, unfuse_some
from ..ops._backend import get_backend
from ..ops._call import AnyCall, Call
from ..ops._choice import ATEN, Choice, Collected, choices, collect
from ..ops._gpu_call import ALL, FEW, GpuCall
from ..ops._measure import measure_and_keep
from .eligible import record_of
from .verify import Inputs, call, running_mode, undisturbed

# Tests that want no times switch this off.
MEASURES = True
# A choice can change the layout that the calls after it see, and these are measured then.
_PASSES = 3
# What a sequence costs to be asked for in somebody else's forward, and how large images may be for which an
# activation that is not written over its input costs no more than that.
_SEQUENCE_US, _SMALL = 15.0, 2**16


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
