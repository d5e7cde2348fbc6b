"""MobileNetV3-Large as an encoder.

Howard et al., "Searching for MobileNetV3", ICCV 2019.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .._layers import conv_norm_activation
from ._base import Encoder, scaled

# The paper's table 1: kernel size, expanded and output channels, squeeze-and-excite, activation, stride.
BLOCKS = (
    (3, 16, 16, False, nn.ReLU, 1),
    (3, 64, 24, False, nn.ReLU, 2),
    (3, 72, 24, False, nn.ReLU, 1),
    (5, 72, 40, True, nn.ReLU, 2),
    (5, 120, 40, True, nn.ReLU, 1),
    (5, 120, 40, True, nn.ReLU, 1),
    (3, 240, 80, False, nn.Hardswish, 2),
    (3, 200, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 184, 80, False, nn.Hardswish, 1),
    (3, 480, 112, True, nn.Hardswish, 1),
    (3, 672, 112, True, nn.Hardswish, 1),
    (5, 672, 160, True, nn.Hardswish, 2),
    (5, 960, 160, True, nn.Hardswish, 1),
    (5, 960, 160, True, nn.Hardswish, 1),
)
# Layers whose outputs are the features. torchvision's segmentation networks take the third and the last.
TAPS = (1, 2, 4, 7, 16)
_conv = partial(conv_norm_activation, norm_layer=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01))


class SqueezeExcite(nn.Module):
    """Weights a channel by the means of all: two 1x1 convolutions, ReLU and hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = scaled(channels // 4, 1.0)
        self.fc1 = nn.Conv2d(channels, middle, 1)
        self.fc2 = nn.Conv2d(middle, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool2d(input, 1)
        return input * F.hardsigmoid(self.fc2(F.relu(self.fc1(mean))))


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, convolve each channel, weight the channels, project; add the input."""

    def __init__(
        self,
        in_channels: int,
        expanded: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        dilation: int,
        adds_input: bool,
        squeezes: bool,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        self.adds_input = adds_input
        self.block = nn.Sequential()
        if expanded != in_channels:
            self.block.append(_conv(in_channels, expanded, activation=activation))
        self.block.append(
            _conv(
                expanded,
                expanded,
                kernel_size,
                stride=stride,
                dilation=dilation,
                depthwise=True,
                activation=activation,
            )
        )
        if squeezes:
            self.block.append(SqueezeExcite(expanded))
        self.block.append(_conv(expanded, out_channels, activation=None))

    def forward(self, input: Tensor) -> Tensor:
        x = self.block(input)
        return x + input if self.adds_input else x


class MobileNetV3LargeEncoder(Encoder):
    """MobileNetV3-Large without its classifier; 3.0 million parameters.

    `state_dict` keys are those of `torchvision.models.mobilenet_v3_large().features`, as its segmentation
    networks have them; `segfast.models.remap_state_dict` reads its classifiers too.

    Args:
        in_channels: of the image.
        output_stride: 16 or 32. At 16 the last strided convolution is dilated instead, as torchvision has it.
        width_mult: factor on every layer's channels, rounded to multiples of 8.

    Shapes: `[N, in_channels, H, W]` -> five features of 16, 24, 40, 80 and 960 channels at strides 2, 4, 8,
    16 and 32, none above `output_stride`; sides are rounded up.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> encoder = MobileNetV3LargeEncoder(output_stride=16).eval()
    >>> [list(feature.shape[1:]) for feature in encoder(torch.zeros(1, 3, 65, 64))]
    [[16, 33, 32], [24, 17, 16], [40, 9, 8], [80, 5, 4], [960, 5, 4]]
    """

    def __init__(self, in_channels: int = 3, output_stride: int = 32, width_mult: float = 1.0) -> None:
        super().__init__(in_channels, width_mult)
        if output_stride not in (16, 32):
            raise ValueError(f"output_stride must be 16 or 32, got {output_stride!r}")
        channels, reached, dilation = scaled(16, width_mult), 2, 1
        layers: list[nn.Module] = [_conv(in_channels, channels, 3, stride=2, activation=nn.Hardswish)]
        found = [(channels, reached)]
        for kernel_size, expanded, width, squeezes, activation, stride in BLOCKS:
            adds_input = stride == 1 and channels == scaled(width, width_mult)
            if reached * stride > output_stride:
                stride, dilation = 1, 2
            width = scaled(width, width_mult)
            expanded = scaled(expanded, width_mult)
            layers.append(
                InvertedResidual(
                    channels, expanded, width, kernel_size, stride, dilation, adds_input, squeezes, activation
                )
            )
            channels, reached = width, reached * stride
            found.append((channels, reached))
        layers.append(_conv(channels, 6 * channels, activation=nn.Hardswish))
        found.append((6 * channels, reached))
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)
        self.channels, self.reductions = zip(*(found[index] for index in TAPS), strict=True)
        self.reset_parameters()

    def forward(self, input: Tensor) -> list[Tensor]:
        features = []
        for index, layer in enumerate(self.children()):
            input = layer(input)
            if index in TAPS:
                features.append(input)
        return features

    def rename(self, key: str) -> str | None:
        """See `Encoder.rename`."""
        return None if key.startswith("classifier.") else key.removeprefix("features.")
