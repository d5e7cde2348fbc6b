"""The dense layers that the networks share."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from segfast.nn import Conv2d, DepthwiseConv2d
from segfast.nn._fused.folding import Remembers
from segfast.nn._fused.layers import run_layers


class ConvNormActivation(Remembers, nn.Sequential):
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
    depthwise: bool = False,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    activation: Callable[..., nn.Module] | None = nn.ReLU,
    names: tuple[str, str, str] = ("0", "1", "2"),
) -> ConvNormActivation:
    """Convolution without bias, padded by half its kernel; norm; activation (None: none), in place.

    `depthwise`: a filter for each channel. `names` are those of the three children: torchvision numbers them,
    timm says conv, bn and act.

    >>> conv_norm_activation(3, 8, 3, stride=2)[0]
    Conv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
    """
    padding = dilation * (kernel_size - 1) // 2
    kind = DepthwiseConv2d if depthwise else Conv2d
    layers: list[nn.Module] = [
        kind(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False),
        norm_layer(out_channels),
    ]
    if activation is not None:
        layers.append(activation(inplace=True))
    return ConvNormActivation(OrderedDict(zip(names, layers, strict=False)))


def resize(input: Tensor, size: Sequence[int]) -> Tensor:
    """The image or the scores at another size, bilinearly, pixels taken for squares (not `align_corners`)."""
    return F.interpolate(input, size=size, mode="bilinear", align_corners=False)
