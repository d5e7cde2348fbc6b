"""VGG16 as an encoder.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from segfast.nn import Conv2d

from ._base import Encoder, scaled, strides_and_dilations

# Convolutions and channels of each stage; between two stages lies a pooling.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


def pool_around(input: Tensor) -> Tensor:
    """The largest of the 3x3 around each pixel: a pooling without its stride."""
    return F.max_pool2d(input, 3, 1, 1)


class VGG16Encoder(Encoder):
    """VGG16 without its last pooling and its classifier; 14.7 million parameters.

    `state_dict` keys are those of `torchvision.models.vgg16`; `segfast.models.remap_state_dict` drops its
    classifier. A pooling whose stride is gone, for a smaller `output_stride`, is 3x3 around each pixel, as in
    DeepLab's published networks; those that keep it are VGG16's own, 2x2, where DeepLab's are 3x3 too.

    Args:
        in_channels: of the image.
        output_stride: 8 or 16.
        width_mult: factor on every layer's channels, rounded to multiples of 8.

    Shapes: `[N, in_channels, H, W]` -> five features of 64, 128, 256, 512 and 512 channels, the last of each
    stage, at strides 1, 2, 4, 8 and 16, none above `output_stride`; sides are rounded up.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> encoder = VGG16Encoder(output_stride=8, width_mult=0.125)
    >>> [list(feature.shape[1:]) for feature in encoder(torch.zeros(1, 3, 65, 64))]
    [[8, 65, 64], [16, 33, 32], [32, 17, 16], [64, 9, 8], [64, 9, 8]]
    """

    def __init__(self, in_channels: int = 3, output_stride: int = 16, width_mult: float = 1.0) -> None:
        super().__init__(in_channels, width_mult)
        if output_stride not in (8, 16):
            raise ValueError(f"output_stride must be 8 or 16, got {output_stride!r}")
        self.features = nn.ModuleDict()
        self.stages: list[list[str]] = []
        self.strides, self.channels, self.reductions = [], (), ()
        plan = strides_and_dilations([2, 2, 2, 2, 1], output_stride, stem=1)
        channels, index, reached = in_channels, 0, 1
        for (count, width), (stride, dilation, after) in zip(STAGES, plan, strict=True):
            self.stages.append([str(index + 2 * conv) for conv in range(count)])
            width = scaled(width, width_mult)
            for name in self.stages[-1]:
                self.features[name] = Conv2d(
                    channels, width, 3, padding=dilation, dilation=dilation, activation="relu"
                )
                channels = width
            index += 2 * count + 1  # with their ReLUs and the pooling
            self.strides.append(stride)
            self.channels += (channels,)
            self.reductions += (reached,)
            reached = after
        self.reset_parameters()

    def forward(self, input: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for names, stride in zip(self.stages, self.strides, strict=True):
            for name in names:
                input = self.features[name](input)
            features.append(input)
            if len(features) < len(self.stages):
                input = F.max_pool2d(input, 2, 2, ceil_mode=True) if stride == 2 else pool_around(input)
        return features

    def rename(self, key: str) -> str | None:
        """See `Encoder.rename`."""
        return None if key.startswith("classifier.") else key
