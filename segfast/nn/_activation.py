"""Activation modules by the names the fused operators take, and back."""

from torch import nn

from ..ops._epilogue import check_activation
from ._rules import own_class

_CLASSES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
}
_NAMES: dict[type[nn.Module], str | None] = {kind: name for name, kind in _CLASSES.items()}
_NAMES[nn.Identity] = None


def activation_module(name: str | None, negative_slope: float = 0.01) -> nn.Module:
    """The torch module that computes the activation; in place where that costs no gradient.

    Raises:
        ValueError: an unknown activation.
    """
    check_activation(name)
    if name is None:
        return nn.Identity()
    if name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    if name == "leaky_relu":
        return nn.LeakyReLU(negative_slope, inplace=negative_slope > 0)
    return _CLASSES[name](inplace=True) if name in ("relu", "relu6") else _CLASSES[name]()


def activation_name(module: nn.Module) -> tuple[str | None, float] | None:
    """(name, negative slope) of an activation module of exactly torch's class; None for any other module."""
    kind = own_class(module)
    if kind not in _NAMES:
        return None
    name = "gelu_tanh" if getattr(module, "approximate", "none") == "tanh" else _NAMES[kind]
    return name, float(getattr(module, "negative_slope", 0.01))
