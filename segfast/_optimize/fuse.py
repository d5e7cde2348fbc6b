"""Fusing sequences of layers of a model, and whole ASPPs and residual blocks."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from ..nn._fused.aspp_swap import aspp_of, fuse_aspp, is_aspp, is_fused_aspp, is_known, unfuse_aspps
from ..nn._fused.residual_block import can_fuse, fuse_block, is_block, is_fused_block, unfuse_blocks
from ..nn._fused.sequence import unfuse
from ..nn._fused.whole_model import compute_as_given
from .sequences import Found, find_sequences, fuse_sequences
from .verify import Inputs, difference, run_once

OTHER_LAYERS = "a layer in it is of another kind, or there are hooks on it"


class Fusions(NamedTuple):
    """The sequences to fuse; ASPPs and blocks by name, unknown classes apart; and why the rest is not."""

    sequences: tuple[Found, ...]
    known: tuple[str, ...]
    unknown: tuple[str, ...]
    reasons: dict[str, str]
    digest: str | None = None

    def fuses(self) -> bool:
        """True if anything is to be fused."""
        return bool(self.sequences or self.known or self.unknown)


def find_fusions(
    model: nn.Module,
    example_inputs: Any,
    heads: Iterable[str],
    filter_fn: Callable[[str, nn.Module], bool] | None,
) -> Fusions:
    """The ASPPs and blocks of `model`, and the sequences that begin with the layers named `heads`.

    Changes nothing.

    Raises:
        TypeError: `example_inputs` is no tensor, tuple, dict or None.
        Exception: the model's own, if it does not run on them.
    """
    known, unknown, reasons = [], [], {}
    for name, module in model.named_modules():
        if type(module).__module__.startswith("segfast.") or not is_whole(module):
            continue  # segfast's own need nothing
        if filter_fn is not None and not filter_fn(name, module):
            reasons[name] = "left out by filter_fn"
        elif not has_its_layers(module):
            reasons[name] = OTHER_LAYERS
        elif has_known_forward(module):
            known.append(name)
        elif example_inputs is not None or is_fused_whole(module):
            unknown.append(name)
        else:
            reasons[name] = "its class is not known; give example_inputs"
    inside = tuple(f"{name}." if name else "" for name in (*known, *unknown))
    fusions = find_sequences(model, example_inputs, [head for head in heads if not head.startswith(inside)])
    return Fusions(fusions.sequences, tuple(known), tuple(unknown), reasons | fusions.reasons, fusions.digest)


def is_whole(module: nn.Module) -> bool:
    """True if `module` may be fused as a whole: an ASPP, or a residual block."""
    return is_block(module) or is_aspp(module)


def is_fused_whole(module: nn.Module) -> bool:
    """True if `module` is fused as a whole."""
    return is_fused_block(module) or is_fused_aspp(module)


def has_known_forward(module: nn.Module) -> bool:
    """True if a whole's forward is known without running it."""
    return is_block(module) or is_known(module)


def has_its_layers(module: nn.Module) -> bool:
    """True if all that is in a whole can be fused."""
    return can_fuse(module) if is_block(module) else aspp_of(module) is not None


def fuse(model: nn.Module, fusions: Fusions, train: bool) -> None:
    """Fuse the sequences, ASPPs and blocks of `fusions`; with `train` they keep less in training."""
    fuse_sequences(model, fusions.sequences, train)
    for name in (*fusions.known, *fusions.unknown):
        module = model.get_submodule(name)
        unfuse(module)  # sequences inside, of an earlier time
        if is_block(module):
            fuse_block(module, train)
        elif not is_fused_aspp(module):
            fuse_aspp(module)


def undo_what_changes_outputs(model: nn.Module, fusions: Fusions, inputs: Inputs) -> dict[str, str]:
    """Reasons by name why layers are not fused, or had to be unfused.

    The model is run with and without fusion, and what changes its outputs is undone: the ASPPs of unknown
    classes, and if that is not all, everything.
    """
    heads = [sequence.names[0] for sequence in fusions.sequences]
    found = difference(model, inputs) if fusions.fuses() else None
    reasons = fusions.reasons
    if found is not None and fusions.unknown:
        for name in fusions.unknown:
            unfuse_aspps(model.get_submodule(name))
        reasons = reasons | dict.fromkeys(fusions.unknown, f"undone: {found}")
        found = difference(model, inputs)
    if found is not None:
        undo(model)
        run_once(model, inputs)
        reasons = reasons | dict.fromkeys((*heads, *fusions.known), f"undone: {found}")
    return reasons


def undo(model: nn.Module) -> None:
    """Let every layer of `model` compute by itself again."""
    compute_as_given(model)
    unfuse(model)
    unfuse_aspps(model)
    unfuse_blocks(model)
