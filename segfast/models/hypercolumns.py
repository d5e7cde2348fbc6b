"""Hypercolumns: every pixel classified by the features of several layers above it.

Hariharan, Arbelaez, Girshick, Malik, "Hypercolumns for Object Segmentation and Fine-grained Localization",
CVPR 2015.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import SegmentationModel, check_counts, tensors
from ._layers import resize
from .encoders import Encoder, ResNetEncoder, VGG16Encoder


class Hypercolumns(SegmentationModel):
    """A linear classifier of hypercolumns; see `hypercolumns_vgg16` and `hypercolumns_resnet50`.

    A pixel's hypercolumn is the features of several levels, enlarged bilinearly to the image and put one
    after the other. A linear classifier of it is a sum of one for each level, and each commutes with the
    enlarging: so every level is multiplied at its own size, the products of `num_classes` channels are
    enlarged, and summed. The hypercolumns themselves, thousands of channels at the size of the image, never
    exist; the scores are equal.

    Args:
        name: under which `segfast.models.create` knows the network.
        config: the arguments it was made with there.
        encoder: of the features.
        num_classes: channels of the output.
        levels: positions among the encoder's features.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        encoder: Encoder,
        num_classes: int,
        levels: Sequence[int],
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes)
        if not levels or len({*levels}) < len(levels) or not {*levels} <= {*range(len(encoder.channels))}:
            raise ValueError(
                f"levels must be different numbers from 0 to {len(encoder.channels) - 1}, got {list(levels)}"
            )
        self.name = name
        self.config = {**config, "levels": list(levels)}
        self.num_classes = num_classes
        self.in_channels = encoder.in_channels
        self.encoder = encoder
        self.levels = list(levels)
        self.widths = [encoder.channels[level] for level in levels]
        # As of the concatenated features, which it would be applied to.
        self.classifier = nn.Conv2d(sum(self.widths), num_classes, 1)

    def forward(self, input: Tensor, points: Tensor | None = None) -> Tensor:
        """Class scores `[N, num_classes, H, W]` of images `[N, in_channels, H, W]`.

        With `points`, int64 `[N, P, 2]`, only those of the pixels in these rows and columns, which may differ
        between the images: `[N, num_classes, P]`. So the paper trains, on few pixels of each image: draw
        them by `draw_points`, and give `torch.nn.functional.cross_entropy` the scores and their classes.

        Raises:
            ValueError: an input that is not 4-D or has no pixel; points of another shape or dtype.
        """
        self._check_input(input)
        if points is not None and (
            points.dim() != 3 or points.shape[::2] != (len(input), 2) or points.dtype != torch.int64
        ):
            raise ValueError(
                f"points must be int64 [{len(input)}, P, 2], got {points.dtype} {list(points.shape)}"
            )
        size = input.shape[2:]
        # On another device it would wait for them; where a compiler looks, there are no values.
        if points is not None and points.is_cpu and not torch.compiler.is_compiling():
            outside = (points < 0) | (points >= points.new_tensor(size))
            if outside.any():
                raise ValueError(
                    f"points must lie in the image of {size[0]}x{size[1]}, got {points.tolist()}"
                )
        features = self.encoder(input)
        weights = self.classifier.weight.split(self.widths, 1)
        parts: list[Tensor] = []
        for level, weight in zip(self.levels, weights, strict=True):
            product = F.conv2d(features[level], weight, None if parts else self.classifier.bias)
            parts.append(resize(product, size) if points is None else _at(product, points, size))
        return sum(parts[1:], start=parts[0])

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`: its own checkpoints, and its encoder's classifier.

        Raises:
            ValueError: a checkpoint of neither.
        """
        own, state = self.state_dict(), tensors(state_dict)
        if state.keys() == own.keys():
            return state
        encoder = self.encoder.remap_state_dict(state)
        return own | {f"encoder.{key}": value for key, value in encoder.items()}


def draw_points(
    targets: Tensor, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random pixels of each image, with replacement, and their classes.

    Args:
        targets: `[N, H, W]`, the class of every pixel.
        count: pixels of each image.
        generator: on the CPU; torch's own by default.

    Returns:
        Points, int64 `[N, count, 2]`, row and column, for `Hypercolumns.forward`, and classes `[N, count]`.

    Raises:
        ValueError: targets that are not 3-D or hold no pixel, a count below 1.

    >>> points, classes = draw_points(torch.arange(6).reshape(1, 2, 3), 4)
    >>> bool((3 * points[..., 0] + points[..., 1] == classes).all())
    True
    """
    if targets.dim() != 3 or 0 in targets.shape[1:]:
        raise ValueError(f"targets must be [N, H, W] of at least a pixel, got shape {list(targets.shape)}")
    check_counts(count=count)
    images, height, width = targets.shape
    pixels = torch.randint(height * width, (images, count), generator=generator, device="cpu")
    pixels = pixels.to(targets.device)
    points = torch.stack((pixels // width, pixels % width), -1)
    return points, targets.flatten(1).gather(1, pixels)


def _at(scores: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """The pixels of `resize(scores, size)` at the points, `[N, K, P]`, without the rest of it."""
    # Places in an image need the digits of float32.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    rows, columns = ((2 * points[..., axis] + 1).to(dtype) / size[axis] - 1 for axis in (0, 1))
    grid = torch.stack((columns, rows), -1)[:, None]
    found = F.grid_sample(scores.to(dtype), grid, "bilinear", "border", align_corners=False)
    return found[:, :, 0].to(scores.dtype)


def hypercolumns_vgg16(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width_mult: float = 1.0,
    levels: Sequence[int] = (1, 2, 3, 4),
) -> Hypercolumns:
    """Hypercolumns of VGG16: 14.7 million parameters.

    Shapes: `[N, in_channels, H, W]` -> `[N, num_classes, H, W]` (see `Hypercolumns.forward`).

    Args:
        num_classes: channels of the output.
        in_channels: of the image.
        width_mult: factor on the channels (`segfast.models.encoders.VGG16Encoder`).
        levels: of the encoder's features, 0 to 4, at strides 1, 2, 4, 8 and 16.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> model = hypercolumns_vgg16(width_mult=0.125)
    >>> model(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    >>> model(torch.zeros(1, 3, 65, 50), points=torch.tensor([[[0, 0], [64, 49]]])).shape
    torch.Size([1, 21, 2])
    """
    config = dict(locals())
    encoder = VGG16Encoder(in_channels, 16, width_mult)
    return Hypercolumns("hypercolumns_vgg16", config, encoder, num_classes, levels)


def hypercolumns_resnet50(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width_mult: float = 1.0,
    levels: Sequence[int] = (1, 2, 3, 4),
) -> Hypercolumns:
    """Hypercolumns of ResNet-50: 23.6 million parameters.

    Shapes, arguments and what is raised are as for `hypercolumns_vgg16`; the features, 0 to 4, are at strides
    2, 4, 8, 16 and 32.

    >>> import torch
    >>> hypercolumns_resnet50(width_mult=0.125).eval()(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    """
    config = dict(locals())
    encoder = ResNetEncoder(in_channels, 32, width_mult)
    return Hypercolumns("hypercolumns_resnet50", config, encoder, num_classes, levels)
