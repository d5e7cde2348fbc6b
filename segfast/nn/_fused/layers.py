"""How many of some layers that follow one another one operator computes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops._aten_only import fusion_could_help
from .._activation import activation_name
from .conv import FusedConv
from .eager import only_forward, worth_fusing
from .folding import activation_of_norm, is_batch_norm
from .separable import FusedSeparable, is_convolution, is_pointwise

FusedLayer = FusedConv | FusedSeparable


def is_depthwise(conv: Any) -> bool:
    """A `Conv2d` with filters of its own for each channel; one channel alone is a dense convolution too."""
    return isinstance(conv, nn.Conv2d) and conv.groups > 1 and conv.in_channels == conv.groups


def options(layers: Sequence[nn.Module]) -> list[tuple[int, FusedLayer]]:
    """How many of `layers`, from the first on, one operator computes: the most, and the most without a norm.

    `layers[0]` is a convolution.
    """
    head = layers[0]
    kind: Any = FusedSeparable if is_depthwise(head) else FusedConv
    found: list[tuple[int, FusedLayer]] = []
    stage: dict[str, Any] = {}
    prefix, slope = "", None
    for length, layer in enumerate(layers[1:], 2):
        activation = activation_name(layer)
        follows_activation = prefix + "activation" in stage
        if is_batch_norm(layer) and prefix + "norm" not in stage and not follows_activation:
            stage[prefix + "norm"] = layer
            activation = activation_of_norm(layer)
        elif activation is not None and activation[0] is not None:
            if follows_activation:
                break
        elif kind is FusedSeparable and is_convolution(layer) and is_pointwise(layer) and not prefix:
            stage["pointwise"], prefix = layer, "pointwise_"
        else:
            break
        if activation is not None and activation[0] is not None:
            if activation[0] == "leaky_relu" and slope not in (None, activation[1]):
                break  # the operator has one slope
            stage[prefix + "activation"] = activation[0]
            slope = activation[1] if activation[0] == "leaky_relu" else slope
        found.append((length, kind(head, **stage, negative_slope=0.01 if slope is None else slope)))
    plain = [option for option in found if option[1].plain()]
    return found[-1:] if len(plain) == len(found) else found[-1:] + plain[-1:]


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
    for layer in layers:
        input = layer(input)
    return input
