"""ResNet-50 and -101 as encoders.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; the stride stands in the 3x3
convolution, as torchvision has it.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from segfast.nn import Conv2d
from segfast.nn._fused.conv import FusedConv
from segfast.nn._fused.eager import only_forward, worth_fusing
from segfast.nn._fused.folding import Remembers
from segfast.nn._fused.training import call_keeping_less, may_train

from ._base import Encoder, scaled, strides_and_dilations

# Blocks of each of the four layers, by depth.
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
EXPANSION = 4
# See `worth_fusing`: a block's three convolutions write half as many elements as its input has, on average,
# and each counts for a quarter, as in `FusedConv.growth`.
_GROWTH = 1 / 8


class Bottleneck(Remembers):
    """1x1, 3x3 and 1x1 convolution, each with its norm, and the input added before the last ReLU.

    In eval each convolution, its norm and what follows it are one operator.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, input: Tensor) -> Tensor:
        fused_layers = self._layers()
        if fused_layers is not None:
            first, second, third, shortcut = fused_layers
            known = [fused for fused in fused_layers if fused is not None]
            if worth_fusing(input, _GROWTH) and all([fused.is_eligible() for fused in known]):
                identity = input if shortcut is None else shortcut.run(input)
                return third.run(second.run(first.run(input)), identity)
            if may_train() and all([fused.is_trained() for fused in known]):
                identity = input if shortcut is None else shortcut.train(input)
                return third.train(second.train(first.train(input)), identity)
        x = F.relu(self.bn1(self.conv1(input)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.bn3(self.conv3(x))
        x += input if self.downsample is None else self.downsample(input)
        return F.relu(x, inplace=True)

    def _layers(self) -> tuple[FusedConv, FusedConv, FusedConv, FusedConv | None] | None:
        """The three convolutions and the shortcut's, each with its norm; None where hooks look in between."""
        shortcut = None
        if self.downsample is not None:
            if not only_forward(self.downsample):
                return None
            shortcut = FusedConv(*self.downsample)
        pairs = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        first, second, third = [FusedConv(conv, norm, "relu") for conv, norm in pairs]
        return first, second, third, shortcut


class ResNetEncoder(Remembers, Encoder):
    """ResNet-50 (23.5 million parameters) or -101 (42.5 million) without its classifier.

    `state_dict` keys are torchvision's, as are the dilations in place of strides
    (`replace_stride_with_dilation`); `segfast.models.remap_state_dict` drops its classifier.

    Args:
        in_channels: of the image.
        output_stride: 8, 16 or 32.
        width_mult: factor on every layer's channels, rounded to multiples of 8.
        depth: 50 or 101.

    Shapes: `[N, in_channels, H, W]` -> five features of 64, 256, 512, 1024 and 2048 channels at strides 2, 4,
    8, 16 and 32, none above `output_stride`; sides are rounded up.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> encoder = ResNetEncoder(output_stride=16, width_mult=0.125).eval()
    >>> [list(feature.shape[1:]) for feature in encoder(torch.zeros(1, 3, 65, 64))]
    [[8, 33, 32], [32, 17, 16], [64, 9, 8], [128, 5, 4], [256, 5, 4]]
    """

    def __init__(
        self, in_channels: int = 3, output_stride: int = 32, width_mult: float = 1.0, depth: int = 50
    ) -> None:
        super().__init__(in_channels, width_mult)
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {tuple(BLOCKS)}, got {depth!r}")
        strides = [
            stride if block == 0 else 1
            for stride, blocks in zip((1, 2, 2, 2), BLOCKS[depth], strict=True)
            for block in range(blocks)
        ]
        plan = iter(strides_and_dilations(strides, output_stride, stem=4))
        width = scaled(64, width_mult)
        self.conv1 = Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.channels, self.reductions = (width,), (2,)
        channels = width
        for index, blocks in enumerate(BLOCKS[depth]):
            layer = nn.Sequential()
            for _ in range(blocks):
                stride, dilation, reached = next(plan)
                layer.append(Bottleneck(channels, width << index, stride, dilation))
                channels = EXPANSION * (width << index)
            self.add_module(f"layer{index + 1}", layer)
            self.channels += (channels,)
            self.reductions += (reached,)
        self.reset_parameters()

    def forward(self, input: Tensor) -> list[Tensor]:
        stem = FusedConv(self.conv1, self.bn1, "relu")
        if worth_fusing(input) and stem.is_eligible():
            x = stem.run(input)
        elif may_train() and stem.is_trained():
            x = stem.train(input)
        else:
            x = F.relu(self.bn1(self.conv1(input)), inplace=True)
        features = [x]
        x = call_keeping_less(F.max_pool2d, x, 3, 2, 1)
        for index in range(1, len(self.channels)):
            layer: Any = getattr(self, f"layer{index}")
            x = layer(x)
            features.append(x)
        return features

    def rename(self, key: str) -> str | None:
        """See `Encoder.rename`."""
        return None if key.startswith("fc.") else key
