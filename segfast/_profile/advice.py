"""Advice about each row: the candidates of its call with their times, and what segfast would do."""

import copy
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .._optimize.fuse import is_fused_whole
from .._optimize.gain import Gain
from .._optimize.optimize import optimize, report
from ..nn._fused.sequence import sequence_of
from ..ops._call import Call
from ..ops._choice import ATEN, Choice, choices
from ..ops._gpu_call import GpuCall
from .facts import BETWEEN, CAST, LAYOUT_COPY, Facts
from .passes import Task
from .rows import Row

_SAVES = {
    LAYOUT_COPY: "Weights and images in one layout save it: model.to(memory_format=torch.channels_last).",
    CAST: "Weights and images in one dtype save it: model.to(dtype), and inputs of that dtype.",
    BETWEEN: "torch.compile, or on a GPU a CUDA graph, takes Python out of it.",
}
# A row between the layers is worth a sentence where it takes this much of the whole.
_MUCH = 0.05


@dataclass(frozen=True)
class Optimized:
    """A copy of a model after `segfast.optimize`, what it gained, and what it fused."""

    model: nn.Module | None = None
    gain: Gain | None = None
    # What it gained, or why there is none.
    remark: str = ""
    # By the name of a layer: the names of the layers that are computed with it, or the layer it is part of.
    fused: dict[str, list[str]] = field(default_factory=dict)
    within: dict[str, str] = field(default_factory=dict)


def optimized_copy(task: Task, budget: float, progress: bool) -> Optimized:
    """A copy of the model after `segfast.optimize`, which measures for `budget` seconds at most."""
    if task.train and task.device.type == "cpu":
        return Optimized(remark="On a CPU segfast.optimize measures inference alone: profile without train.")
    try:
        model = copy.deepcopy(task.model)
    except Exception as error:
        return Optimized(remark=f"The model cannot be deep-copied ({error}), so it was not optimized.")
    model = optimize(model, task.inputs, inplace=True, budget=budget, progress=progress, train=task.train)
    gain = report(model).gain
    remark = (
        "segfast.optimize found nothing in the model that it could run otherwise." if gain is None else ""
    )
    return Optimized(model, gain, remark or str(gain), *_fusions(model))


def _fusions(model: nn.Module) -> tuple[dict[str, list[str]], dict[str, str]]:
    names = {module: name for name, module in model.named_modules()}
    fused: dict[str, list[str]] = {}
    within: dict[str, str] = {}
    for module, name in names.items():
        sequence = sequence_of(module)
        if sequence is not None and sequence.layers[0] is module:
            fused[name] = [names[layer] for layer in sequence.layers[1:] if layer in names]
            within |= dict.fromkeys(fused[name], name)
        elif is_fused_whole(module):
            within |= {names[part]: name for part in module.modules() if part is not module}
    return fused, within


def with_advice(row: Row, facts: Facts | None, optimized: Optimized, known: "Known", whole_us: float) -> Row:
    """The row with its candidates and one sentence of what would be done about it."""
    if row.kind in _SAVES:
        # Where medians of the layers miss the whole, more than that is counted to what lies between.
        telling = row.kind != BETWEEN or row.p20_us >= _MUCH * whole_us
        return replace(row, advice=_SAVES[row.kind] if telling else "")
    choice = known.find(facts) if facts is not None else None
    candidates = tuple(sorted(choice.us.items(), key=lambda item: item[1])) if choice else ()
    kept = optimized.gain is not None and optimized.gain.kept
    return replace(row, candidates=candidates, advice=_sentence(row, choice, optimized) if kept else "")


def _sentence(row: Row, choice: Choice | None, optimized: Optimized) -> str:
    if row.kind in ("batch_norm", "activation", "add") and row.name in {
        *optimized.within,
        *optimized.within.values(),
    }:
        return "segfast.optimize computes it within the convolution before it."
    others = optimized.fused.get(row.name, [])
    parent = f"{row.name.rpartition('.')[0]}."
    together = ", ".join(other.removeprefix(parent) for other in others)
    if choice is not None and choice.name != ATEN:
        return f"segfast.optimize runs it on {choice.name}{f', together with {together}' if others else ''}."
    if together:
        return f"segfast.optimize computes it together with {together}."
    if row.name in optimized.within:
        return "segfast.optimize computes it together with the layers after it."
    return ""


class Known:
    """The choices that were measured of convolutions on this machine."""

    def __init__(self) -> None:
        self._found: dict[Any, list[tuple[Any, Choice]]] = defaultdict(list)
        for call, choice in choices().measured.items():
            if isinstance(call, Call):
                if call.threads != torch.get_num_threads():
                    continue
                geometry: tuple[Any, ...] = (call.stride, call.dilation, call.groups, call.transposed)
                self._found[call.dtype, call.input, call.weight, geometry].append((call, choice))
            elif isinstance(call, GpuCall) and call.weights:
                self._found[call.dtype, call.images[0], call.weights[0], None].append((call, choice))

    def find(self, facts: Facts) -> Choice | None:
        """The choice of a convolution's call: of several, with what follows fused, that of the most."""
        if facts.convolution is None:
            return None
        input, weight, stride, _, dilation, groups, transposed = facts.convolution
        dtype = getattr(torch, facts.dtype)
        geometry = (tuple(stride), tuple(dilation), groups, transposed)
        found = [
            each for known in (geometry, None) for each in self._found.get((dtype, input, weight, known), ())
        ]
        return max(found, key=_fused_by, default=(None, None))[1]


def _fused_by(found: tuple[Any, Choice]) -> tuple[bool, bool]:
    call = found[0]
    return (getattr(call, "activation", None) is not None, getattr(call, "residual", False))
