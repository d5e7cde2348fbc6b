"""MobileNetV2 as an encoder.

Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

import re

from torch import Tensor, nn

from segfast.nn import InvertedResidual

from .._layers import conv_norm_activation
from ._base import Encoder, scaled, strides_and_dilations

# The paper's table 2: expansion, channels, repetitions, stride of the first repetition.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

# The layers of timm's blocks in torchvision's numbers: the first block has no expansion.
_FIRST_BLOCK = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
_BLOCK = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
_STEM = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
_TIMM_KEY = re.compile(
    r"(?:(?P<stem>conv_stem|bn1)|blocks\.(?P<stage>\d)\.(?P<block>\d)\.(?P<layer>\w+))\.(?P<rest>\w+)"
)


class MobileNetV2Encoder(Encoder):
    """MobileNetV2 without its last 1x1 convolution and its classifier; 1.8 million parameters.

    `state_dict` keys are those of `torchvision.models.mobilenet_v2`; `segfast.models.remap_state_dict` reads
    its checkpoints and those of timm's `mobilenetv2_100` (`_050`, `_140`: give the same `width_mult`).

    Args:
        in_channels: of the image.
        output_stride: 8, 16 or 32.
        width_mult: factor on every layer's channels, rounded to multiples of 8.

    Shapes: `[N, in_channels, H, W]` -> five features of 16, 24, 32, 96 and 320 channels at strides 2, 4, 8,
    16 and 32, none above `output_stride`; sides are rounded up.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> encoder = MobileNetV2Encoder(output_stride=16).eval()
    >>> [list(feature.shape[1:]) for feature in encoder(torch.zeros(1, 3, 65, 64))]
    [[16, 33, 32], [24, 17, 16], [32, 9, 8], [96, 5, 4], [320, 5, 4]]
    """

    def __init__(self, in_channels: int = 3, output_stride: int = 32, width_mult: float = 1.0) -> None:
        super().__init__(in_channels, width_mult)
        blocks = [
            (expansion, scaled(width, width_mult), stride if repetition == 0 else 1)
            for expansion, width, repetitions, stride in STAGES
            for repetition in range(repetitions)
        ]
        strides = [stride for _, _, stride in blocks]
        plan = strides_and_dilations(strides, output_stride)
        channels = scaled(32, width_mult)
        stem = conv_norm_activation(in_channels, channels, 3, stride=2, activation=nn.ReLU6)
        self.features = nn.Sequential(stem)
        taps = []
        for (expansion, width, _), (stride, dilation, reached), following in zip(
            blocks, plan, [*strides[1:], 2], strict=True
        ):
            self.features.append(
                InvertedResidual(channels, width, stride, expand_ratio=expansion, dilation=dilation)
            )
            channels = width
            if following > 1:
                taps.append((len(self.features) - 1, channels, reached))
        # Features are what goes into a stride of 2, and the last.
        self.taps, self.channels, self.reductions = zip(*taps, strict=True)
        self.reset_parameters()

    def forward(self, input: Tensor) -> list[Tensor]:
        features = []
        for index, layer in enumerate(self.features):
            input = layer(input)
            if index in self.taps:
                features.append(input)
        return features

    def rename(self, key: str) -> str | None:
        """See `Encoder.rename`."""
        # The last 1x1 convolution and the classifier, by torchvision's names and by timm's.
        if key.startswith(("features.18.", "classifier.", "conv_head.", "bn2.")):
            return None
        match = _TIMM_KEY.fullmatch(key)
        if match is None:
            return key
        if match["stem"]:
            return f"{_STEM[match['stem']]}.{match['rest']}"
        stage, block = int(match["stage"]), int(match["block"])
        index = 1 + sum(repetitions for _, _, repetitions, _ in STAGES[:stage]) + block
        layers = _BLOCK if stage else _FIRST_BLOCK
        return f"features.{index}.conv.{layers.get(match['layer'], key)}.{match['rest']}"
