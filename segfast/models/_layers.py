"""The dense layers that the networks share."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segfast.nn import Conv2d
from segfast.nn._chains import fused_form
from segfast.nn._norm import FoldsNorms
from segfast.nn._pair import pays
from segfast.ops._backend import fusion_could_help


def run_layers(layers: Sequence[nn.Module], input: Any) -> Any:
    """The layers one after the other; as one operator what is one, in eval: convolution, norm, activation.

    The input may be a list of images (`segfast.functional.conv2d`).
    """
    first = input[0] if isinstance(input, list) else input
    normed = fusion_could_help(first) or any([isinstance(layer, nn.BatchNorm2d) for layer in layers])
    form = fused_form(layers) if (normed or torch.compiler.is_compiling()) and pays(first, 8) else None
    if form is not None and pays(first, form.growth()) and form.fits():
        return form.run(input)
    for layer in layers:
        input = layer(input)
    return input


class ConvNormActivation(FoldsNorms, nn.Sequential):
    """See `conv_norm_activation`; one operator in eval."""

    def forward(self, input: Tensor) -> Tensor:
        return run_layers(list(self), input)


def conv_norm_activation(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    *,
    stride: int = 1,
    dilation: int = 1,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    activation: Callable[..., nn.Module] | None = nn.ReLU,
    names: tuple[str, str, str] = ("0", "1", "2"),
) -> ConvNormActivation:
    """Convolution without bias, padded by half its kernel; norm; activation (None: none), in place.

    `names` are those of the three children: torchvision numbers them, timm says conv, bn and act.

    >>> conv_norm_activation(3, 8, 3, stride=2)[0]
    Conv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
    """
    padding = dilation * (kernel_size - 1) // 2
    layers: list[nn.Module] = [
        Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False),
        norm_layer(out_channels),
    ]
    if activation is not None:
        layers.append(activation(inplace=True))
    return ConvNormActivation(OrderedDict(zip(names, layers, strict=False)))
