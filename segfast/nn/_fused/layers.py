"""How many of some layers that follow one another one operator computes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops._aten_only import fusion_could_help
from .._activation import activation_name
from .conv import FusedConv
from .eager import only_forward, worth_fusing
from .folding import activation_of_norm, is_batch_norm
from .separable import FusedSeparable, is_convolution, is_pointwise
from .training import train_layers

FusedLayer = FusedConv | FusedSeparable


def is_depthwise(conv: Any) -> bool:
    """A `Conv2d` with filters of its own for each channel; one channel alone is a dense convolution too."""
    return isinstance(conv, nn.Conv2d) and conv.groups > 1 and conv.in_channels == conv.groups


class Part(NamedTuple):
    """A layer, or a node of a graph, as far as it matters to what is computed together with it.

    `kind` is "dense" or "depthwise" of a convolution, "norm", "addition", "activation", or "" of all else;
    `source` the layer or node; a norm may end with an `activation`.
    """

    kind: str
    source: Any
    pointwise: bool = False
    activation: str | None = None
    negative_slope: float = 0.01


class Group(NamedTuple):
    """A convolution and what one operator computes with it, by the sources of its parts."""

    head: Any
    norm: Any = None
    residual: Any = None
    activation: str | None = None
    pointwise: Any = None
    pointwise_norm: Any = None
    pointwise_residual: Any = None
    pointwise_activation: str | None = None
    negative_slope: float = 0.01

    def plain(self) -> bool:
        """True if there is no norm, which would have to be in eval."""
        return self.norm is None and self.pointwise_norm is None


def groups(parts: Sequence[Part]) -> list[tuple[int, Group]]:
    """How many of `parts`, from the first on, one operator computes: the most, and the most without a norm.

    `parts[0]` is a convolution, each other reads the one before it. An addition is of something computed
    elsewhere, and is only the last convolution's: a depthwise one's is not followed by another.
    """
    head = parts[0]
    found: list[tuple[int, Group]] = []
    stage: dict[str, Any] = {}
    prefix, slope = "", None
    for length, part in enumerate(parts[1:], 2):
        if prefix + "activation" in stage and part.kind != "dense":
            break
        if part.kind == "norm" and not stage.keys() & {prefix + "norm", prefix + "residual"}:
            stage[prefix + "norm"] = part.source
        elif part.kind == "addition" and prefix + "residual" not in stage:
            stage[prefix + "residual"] = part.source
        elif part.kind == "dense":
            first = head.kind == "depthwise" and not prefix and "residual" not in stage
            if not (first and part.pointwise):
                break
            stage["pointwise"], prefix = part.source, "pointwise_"
        elif part.kind != "activation":
            break
        if part.activation is not None:
            if part.activation == "leaky_relu" and slope not in (None, part.negative_slope):
                break  # the operator has one slope
            stage[prefix + "activation"] = part.activation
            slope = part.negative_slope if part.activation == "leaky_relu" else slope
        found.append((length, Group(head.source, **stage, negative_slope=0.01 if slope is None else slope)))
    plain = [option for option in found if option[1].plain()]
    return found[-1:] if len(plain) == len(found) else found[-1:] + plain[-1:]


def options(layers: Sequence[nn.Module]) -> list[tuple[int, FusedLayer]]:
    """How many of `layers`, from the first on, one operator computes, as `groups` has it.

    `layers[0]` is a convolution.
    """
    return [(length, _fused(group)) for length, group in groups([_part(layer) for layer in layers])]


def _part(layer: nn.Module) -> Part:
    name, slope = activation_name(layer) or (None, 0.01)
    if name is not None:
        return Part("activation", layer, activation=name, negative_slope=slope)
    if is_batch_norm(layer):
        name, slope = activation_of_norm(layer) or (None, 0.01)
        return Part("norm", layer, activation=name, negative_slope=slope)
    if is_depthwise(layer):
        return Part("depthwise", layer)
    if is_convolution(layer):
        return Part("dense", layer, pointwise=is_pointwise(layer))
    return Part("", layer)


def _fused(group: Group) -> FusedLayer:
    if not is_depthwise(group.head):
        return FusedConv(group.head, group.norm, group.activation, group.negative_slope)
    return FusedSeparable(
        group.head,
        group.norm,
        group.activation,
        group.pointwise,
        group.pointwise_norm,
        group.pointwise_activation,
        group.negative_slope,
    )


def fused_layer(layers: Sequence[nn.Module]) -> FusedLayer | None:
    """All of `layers` as one operator, or None; whether it `is_eligible` remains to be asked."""
    layers = [layer for layer in layers if type(layer) is not nn.Identity]
    if not layers or not is_convolution(layers[0]) or not all([only_forward(m) for m in layers]):
        return None
    if len(layers) == 1:
        return FusedSeparable(layers[0]) if is_depthwise(layers[0]) else FusedConv(layers[0])
    possible = options(layers)
    return possible[0][1] if possible and possible[0][0] == len(layers) else None


def run_layers(layers: Sequence[nn.Module], input: Any) -> Any:
    """The layers one after the other; as one operator what is one, in eval: convolution, norm, activation.

    In training the norm is one with the activation, and less is kept for the backward pass.
    The input may be a list of images (`segfast.functional.conv2d`).
    """
    first = input if isinstance(input, Tensor) or not input else input[0]
    # Without a norm nothing is saved by ATen on a CPU.
    normed = any([isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm) for layer in layers])
    if worth_fusing(first, 8) and (normed or torch.compiler.is_compiling() or fusion_could_help(first)):
        fused = fused_layer(layers)
        takes = isinstance(fused, FusedConv) or (fused is not None and first is input)
        if fused is not None and takes and worth_fusing(first, fused.growth()) and fused.is_eligible():
            return fused.run(input)
    trained = train_layers(layers, input) if normed else None
    if trained is not None:
        return trained
    for layer in layers:
        input = layer(input)
    return input
