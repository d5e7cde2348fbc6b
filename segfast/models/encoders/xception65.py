"""Aligned Xception, the 65-layer one, as an encoder.

Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017; its strided, aligned form
is that of Chen, Zhu, Papandreou, Schroff, Adam, "Encoder-Decoder with Atrous Separable Convolution for
Semantic Image Segmentation", ECCV 2018, figure 4.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from segfast.nn import SeparableConv2d

from .._layers import conv_norm_activation
from ._base import Encoder, scaled, strides_and_dilations

_BatchNorm = partial(nn.BatchNorm2d, eps=1e-3)
_NAMES = ("conv", "bn", "act")


class XceptionBlock(nn.Module):
    """Three separable convolutions, the last one strided, and a skip around them.

    With `skip` an activation precedes each of them; without it follows each depthwise and each pointwise one.
    """

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, int, int],
        stride: int,
        dilation: int,
        *,
        skip: bool = True,
    ) -> None:
        super().__init__()
        self.skip = skip
        self.shortcut: nn.Module | None = None
        if skip and (stride != 1 or in_channels != channels[-1]):
            self.shortcut = conv_norm_activation(
                in_channels, channels[-1], stride=stride, norm_layer=_BatchNorm, activation=None, names=_NAMES
            )
        inputs = (in_channels, *channels[:-1])
        self.stack = nn.ModuleDict(
            {
                f"conv{i + 1}": SeparableConv2d(
                    inputs[i],
                    channels[i],
                    stride=stride if i == 2 else 1,
                    padding=dilation,
                    dilation=dilation,
                    norm_layer=_BatchNorm,
                    depthwise_activation=None if skip else "relu",
                    # The activation in front of the next one is this one's.
                    activation=None if skip and i == 2 else "relu",
                )
                for i in range(3)
            }
        )

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and what goes into its last, strided convolution."""
        tap = self.stack["conv2"](self.stack["conv1"](F.relu(input) if self.skip else input))
        if not self.skip:
            return self.stack["conv3"](tap), tap
        residual = input if self.shortcut is None else self.shortcut(input)
        return self.stack["conv3"](tap, residual), tap


class Xception65Encoder(Encoder):
    """Aligned Xception-65 without its classifier; 37.9 million parameters.

    `state_dict` keys are those of timm's `xception65`; `segfast.models.remap_state_dict` drops its head.
    timm's `xception41` is the same with `middle_blocks=8`.

    Args:
        in_channels: of the image.
        output_stride: 8, 16 or 32.
        width_mult: factor on every layer's channels, rounded to multiples of 8.
        middle_blocks: blocks of the middle flow.

    Shapes: `[N, in_channels, H, W]` -> five features of 128, 256, 728, 1024 and 2048 channels at strides 2,
    4, 8, 16 and 32, none above `output_stride`; sides are rounded up. The first four are inside a block: what
    goes into its strided convolution.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> encoder = Xception65Encoder(output_stride=16, width_mult=0.125, middle_blocks=1).eval()
    >>> [list(feature.shape[1:]) for feature in encoder(torch.zeros(1, 3, 65, 64))]
    [[16, 33, 32], [32, 17, 16], [88, 9, 8], [128, 5, 4], [256, 5, 4]]
    """

    def __init__(
        self,
        in_channels: int = 3,
        output_stride: int = 32,
        width_mult: float = 1.0,
        middle_blocks: int = 16,
    ) -> None:
        super().__init__(in_channels, width_mult)
        if middle_blocks < 0:
            raise ValueError(f"middle_blocks must not be negative, got {middle_blocks}")
        stem, first, second, middle, exit, wide, last = (
            scaled(width, width_mult) for width in (64, 128, 256, 728, 1024, 1536, 2048)
        )
        strides = [2, 2, 2, *[1] * middle_blocks, 2, 1]
        widths = [(width,) * 3 for width in (first, second, *[middle] * (1 + middle_blocks))]
        widths += [(middle, exit, exit), (wide, wide, last)]
        plan = strides_and_dilations(strides, output_stride)
        narrow = scaled(32, width_mult)
        options: dict[str, Any] = {"norm_layer": _BatchNorm, "names": _NAMES}
        self.stem = nn.Sequential(
            conv_norm_activation(in_channels, narrow, 3, stride=2, **options),
            conv_norm_activation(narrow, stem, 3, **options),
        )
        self.blocks = nn.ModuleList()
        channels, reached = stem, 2
        taps = []
        for index, (block, (stride, dilation, after)) in enumerate(zip(widths, plan, strict=True)):
            self.blocks.append(XceptionBlock(channels, block, stride, dilation, skip=index < len(widths) - 1))
            if strides[index] > 1:
                taps.append((index, block[1], reached))
            channels, reached = block[-1], after
        self.taps = tuple(index for index, _, _ in taps)
        self.channels = (*(width for _, width, _ in taps), channels)
        self.reductions = (*(reduction for _, _, reduction in taps), reached)
        self.reset_parameters()

    def forward(self, input: Tensor) -> list[Tensor]:
        features = []
        x = self.stem(input)
        for index, block in enumerate(self.blocks):
            x, tap = block(x)
            if index in self.taps:
                features.append(tap)
        return [*features, x]

    def rename(self, key: str) -> str | None:
        """See `Encoder.rename`."""
        return None if key.startswith("head.") else key
