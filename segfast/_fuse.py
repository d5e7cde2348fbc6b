"""What of a model is fused: chains of layers, and whole ASPPs."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from ._compare import arguments, difference
from ._fuse_chains import Found, find_chains, fuse_chains
from .nn._fused_chain import unfuse
from .nn._fused_pyramid import (
    fuse_pyramid,
    is_fused_pyramid,
    is_known,
    is_pyramid,
    pyramid_of,
    unfuse_pyramids,
)


class Fusions(NamedTuple):
    """What to fuse: chains, and ASPPs by name, those of unknown classes apart; and why the rest is not."""

    chains: tuple[Found, ...]
    known: tuple[str, ...]
    unknown: tuple[str, ...]
    reasons: dict[str, str]


def find_fusions(
    model: nn.Module,
    example_inputs: Any,
    heads: Iterable[str],
    filter_fn: Callable[[str, nn.Module], bool] | None,
) -> Fusions:
    """The ASPPs of `model`, and the chains that begin with the layers named `heads`. Changes nothing.

    Raises:
        TypeError: `example_inputs` is no tensor, tuple or None.
        Exception: the model's own, if it does not run on them.
    """
    known, unknown, reasons = [], [], {}
    for name, module in model.named_modules():
        if type(module).__module__.startswith("segfast.") or not is_pyramid(module):
            continue  # segfast's own need nothing
        if filter_fn is not None and not filter_fn(name, module):
            reasons[name] = "left out by filter_fn"
        elif pyramid_of(module) is None:
            reasons[name] = "a layer in it is of another kind, or there are hooks on it"
        elif is_known(module):
            known.append(name)
        elif example_inputs is not None or is_fused_pyramid(module):
            unknown.append(name)
        else:
            reasons[name] = "its class is not known; give example_inputs"
    inside = tuple(f"{name}." for name in (*known, *unknown))
    plan = find_chains(model, example_inputs, [head for head in heads if not head.startswith(inside)])
    return Fusions(plan.chains, tuple(known), tuple(unknown), reasons | plan.reasons)


def fuse(model: nn.Module, plan: Fusions, example_inputs: Any) -> dict[str, str]:
    """Fuse what was planned; the reasons for what was not, or had to be undone.

    On example inputs the model is run with and without fusion, and what changes its outputs is undone: the
    ASPPs of unknown classes, and if that is not all, everything.
    """
    fuse_chains(model, plan.chains)
    for name in (*plan.known, *plan.unknown):
        module = model.get_submodule(name)
        if not is_fused_pyramid(module):
            fuse_pyramid(module)
    heads = [chain.names[0] for chain in plan.chains]
    if example_inputs is None or not (heads or plan.known or plan.unknown):
        return plan.reasons
    found = difference(model, arguments(example_inputs))
    reasons = plan.reasons
    if found is not None and plan.unknown:
        for name in plan.unknown:
            unfuse_pyramids(model.get_submodule(name))
        reasons = reasons | dict.fromkeys(plan.unknown, f"undone: {found}")
        found = difference(model, arguments(example_inputs))
    if found is not None:
        undo(model)
        reasons = reasons | dict.fromkeys((*heads, *plan.known), f"undone: {found}")
    return reasons


def undo(model: nn.Module) -> None:
    """Let every layer of `model` compute by itself again."""
    unfuse(model)
    unfuse_pyramids(model)
