"""Rules for the layers that `segfast.optimize` may replace: each family lists its own in `RULES`."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..ops import FAMILIES

# Kept in a replaced or left-out layer's __dict__: survives deepcopy and pickle, is no part of the state_dict.
RECORD = "_segfast_optimize"


def _nothing_against(module: nn.Module) -> str | None:
    return None


def _always(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """Layers of exactly the class `source` may become `target` by a change of class.

    Args:
        source: the class replaced; a subclass is left alone, for its forward may be its own.
        target: a subclass of `source`, and of `Unscriptable` before it, that keeps its parameters and its
            state_dict.
        attributes: what `target` reads and `source` lacks, at the values for which both compute the same.
        applies: whether the family is about this layer; `report` is silent on others.
        reason_not: None, or why this one layer of class `source` is not replaced.
        related: classes a user might expect to see replaced, each with the reason why they are not.
        layout: the layout of `weight` that the kernels read without a copy; channels_last if None.
        functional: the name in torch.nn.functional that computes this layer; its calls are pointed out.
    """

    source: type[nn.Module]
    target: type[nn.Module]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    applies: Callable[[nn.Module], bool] = _always
    reason_not: Callable[[nn.Module], str | None] = _nothing_against
    related: Mapping[type[nn.Module], str] = field(default_factory=dict)
    layout: Callable[[Tensor], Tensor] | None = None
    functional: str | None = None


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class `module` has where nothing is fused."""
    kind = type(module)
    while hasattr(kind, "unfused_class"):
        kind = kind.unfused_class
    return kind


@functools.cache
def all_rules() -> tuple[Rule, ...]:
    """The rules of every family, in the order of `segfast.ops.FAMILIES`."""
    modules = [importlib.import_module(f"{__package__}.{family}") for family in FAMILIES]
    return tuple(rule for module in modules for rule in module.RULES)
