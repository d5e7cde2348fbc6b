"""FCN on VGG16.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015. VGG16 is from
Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from segfast.functional import conv_transpose2d
from segfast.nn import Conv2d, ConvTranspose2d
from segfast.nn.init import bilinear_

from ._base import SegmentationModel, tensors

# Of each stride: the enlarging layers, and the pooling whose scores are added to what each returns.
STEPS: dict[int, tuple[tuple[str, int | None], ...]] = {
    8: (("upscore2", 4), ("upscore_pool4", 3), ("upscore8", None)),
    16: (("upscore2", 4), ("upscore16", None)),
    32: (("upscore", None),),
}
# VGG16's stages, each before a pooling: its convolutions, and their channels over those of the first.
STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
# Of the first convolution: what the unpadded fc6 takes away again, and so any image is large enough.
PAPER_PADDING = 100

_VGG_KEY = re.compile(r"(features|classifier)\.(\d+)\.(weight|bias)")


def crop_offsets(padding: int, fc6_padding: int, stride: int) -> list[int]:
    """Where each enlarged score map is met: by the skips, coarse to fine, and at last by the image.

    Pixel 0 of the skip lies on pixel `offset` of the enlarged scores, which are cut by that much; below 0 it
    is the skip that is cut. `padding` is that of the first convolution.

    >>> crop_offsets(100, 0, stride=8)
    [-5, -9, 31]
    >>> crop_offsets(1, 3, stride=32)
    [16]
    """

    # Pixel i of pooling l stands at 2**l * i + origin in the image.
    def origin(level: int) -> float:
        return (2**level - 1) / 2 - (padding - 1)

    offsets = []
    at, step = origin(5) + 32 * (3 - fc6_padding), 32
    for level in range(4, int(math.log2(stride)) - 1, -1):
        step = 2**level
        at -= step * 1.5  # a kernel of 4, whose middle is 1.5
        offsets.append(round((origin(level) - at) / step))
        at = max(at, origin(level))
    return [*offsets, round((2 * stride - 1) / 2 - at)]


class FCN(SegmentationModel):
    """VGG16 turned into a network of scores, enlarged by learnable transposed convolutions.

    fc6 and fc7 are convolutions of 7x7 and 1x1. Their scores, at stride 32, are enlarged twofold and added to
    scores of pool4 (stride 16), and those again to scores of pool3 (8), then enlarged to the image. Layers
    bear the names of the paper's own networks.

    The enlarging layers begin as bilinear interpolation, all others that make scores as zero: load a
    classifier (`segfast.models.remap_state_dict`) before training. The paper's loss is the cross-entropy of
    every pixel, its optimizer SGD with momentum 0.9.

    Args:
        num_classes: channels of the output.
        in_channels: of the image.
        stride: of the finest scores: 32, 16 or 8.
        padded: the paper's padding of 100 pixels around the image, which makes up for fc6 having none; or
            else every convolution keeps the size, and half the pixels are computed at 500x500.
        width: channels of the first stage; 64 is VGG16.
        dropout: probability, after fc6 and fc7.

    Shapes: `[N, in_channels, H, W]` -> `[N, num_classes, H, W]`, for any H and W.

    Raises:
        ValueError: an option out of range; an input that is not 4-D.

    >>> import torch
    >>> FCN(width=2)(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        stride: int = 8,
        padded: bool = True,
        width: int = 64,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        for option, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if stride not in STEPS:
            raise ValueError(f"stride must be one of {tuple(STEPS)}, got {stride!r}")
        self.name = f"fcn{stride}s"
        self.config = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "padded": padded,
            "width": width,
            "dropout": dropout,
        }
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.stages: list[list[str]] = []
        padding, channels = PAPER_PADDING if padded else 1, in_channels
        for stage, (count, factor) in enumerate(STAGES, start=1):
            self.stages.append([f"conv{stage}_{index + 1}" for index in range(count)])
            for name in self.stages[-1]:
                conv = Conv2d(channels, factor * width, 3, padding=padding, activation="relu")
                self.add_module(name, conv)
                padding, channels = 1, factor * width
        fc6_padding = 0 if padded else 3
        self.fc6 = Conv2d(channels, 64 * width, 7, padding=fc6_padding, activation="relu")
        self.fc7 = Conv2d(64 * width, 64 * width, 1, activation="relu")
        self.dropout = nn.Dropout(dropout)
        self.score_fr = Conv2d(64 * width, num_classes, 1)
        offsets = crop_offsets(PAPER_PADDING if padded else 1, fc6_padding, stride)
        # Of each enlarging layer: its name, the pooling whose scores its result is added to, and where.
        self.steps = [(*step, offset) for step, offset in zip(STEPS[stride], offsets, strict=True)]
        for _, level, _ in self.steps:
            if level is not None:
                features = STAGES[level - 1][1] * width
                self.add_module(f"score_pool{level}", Conv2d(features, num_classes, 1))
        for name, level, _ in self.steps:
            factor = stride if level is None else 2
            up = ConvTranspose2d(num_classes, num_classes, 2 * factor, stride=factor, bias=False)
            self.add_module(name, up)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian weights of variance 2 / (outputs that an input reaches); scores 0, enlarging bilinear."""
        for name, module in self.named_children():
            if isinstance(module, nn.ConvTranspose2d):
                bilinear_(module.weight)
            elif isinstance(module, nn.Conv2d):
                if name.startswith("score"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def heat_map(self, input: Tensor) -> Tensor:
        """The coarse class scores `[N, num_classes, h, w]`, at stride 32, before anything is enlarged.

        Without the paper's padding h and w are H / 32 and W / 32, rounded up, and the pixel in the middle of
        the 7x7 of a 224x224 image is what VGG16, the classifier, says of it.
        """
        return self._scores(self._pools(input)[-1])

    def forward(self, input: Tensor) -> Tensor:
        pools = self._pools(input)
        x = self._scores(pools[-1])
        for name, level, offset in self.steps:
            up: Any = getattr(self, name)
            if level is None:
                return _window(up, x, offset, input.shape[2:])
            skip = getattr(self, f"score_pool{level}")(pools[level - 1])
            if offset < 0:
                height, width = (up.stride[0] * (n + 1) for n in x.shape[2:])
                skip = skip[:, :, -offset : height - offset, -offset : width - offset]
                x = conv_transpose2d(x, up.weight, stride=up.stride, residual=skip)
            else:
                x = _window(up, x, offset, skip.shape[2:]) + skip
        raise AssertionError("the last step has no skip")

    def _pools(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 4:
            raise ValueError(f"input must be [N, {self.in_channels}, H, W], got shape {list(x.shape)}")
        pools = []
        for stage in self.stages:
            for name in stage:
                x = getattr(self, name)(x)
            x = F.max_pool2d(x, 2, ceil_mode=True)
            pools.append(x)
        return pools

    def _scores(self, x: Tensor) -> Tensor:
        x = self.dropout(self.fc6(x))
        return self.score_fr(self.dropout(self.fc7(x)))

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`.

        Reads checkpoints of this network and of VGG16 as torchvision names its layers: the classifier's
        linear layers become convolutions. Its last one is read where it has as many classes as the model,
        and all scores of the model and its enlarging layers keep their weights otherwise.

        Raises:
            ValueError: a checkpoint of neither, or of other sizes.
        """
        own, state = self.state_dict(), tensors(state_dict)
        if state.keys() == own.keys():
            return state
        names = dict(_vgg_layers(self.stages))
        renamed = dict(own)
        missing = {key for key in own if not key.startswith(("score", "upscore"))}
        for key, value in state.items():
            match = _VGG_KEY.fullmatch(key)
            layer = names.get((match[1], int(match[2]))) if match else None
            if match is None or layer is None:
                raise ValueError(
                    f"the checkpoint has a key that is neither {type(self).__name__}'s own nor VGG16's: {key}"
                )
            name = f"{layer}.{match[3]}"
            if layer == "score_fr" and value.shape[0] != self.num_classes:
                continue
            # A linear layer over what 7x7 pixels hold, channel by channel, is a convolution by 7x7.
            if value.dim() == 2 and value.numel() == own[name].numel():
                value = value.reshape(own[name].shape)
            if value.shape != own[name].shape:
                raise ValueError(
                    f"{name}: the checkpoint has {list(value.shape)}, the model {list(own[name].shape)}"
                )
            renamed[name] = value
            missing.discard(name)
        if missing:
            raise ValueError(f"the checkpoint has nothing for {min(missing)}")
        return renamed


def _vgg_layers(stages: Sequence[Sequence[str]]) -> list[tuple[tuple[str, int], str]]:
    """torchvision's (part, number) of each layer with weights, and our name of it."""
    found, index = [], 0
    for stage in stages:
        for name in stage:
            found.append((("features", index), name))
            index += 2  # its ReLU
        index += 1  # the pooling
    return [*found, *((("classifier", 3 * i), name) for i, name in enumerate(("fc6", "fc7", "score_fr")))]


def _window(up: Any, x: Tensor, offset: int, size: Sequence[int]) -> Tensor:
    """`up(x)` from pixel `offset` on, `size` of it."""
    factor, kernel = up.stride[0], up.kernel_size[0]
    # What lies before the offset is padding, and not computed. Pixels of x that reach only there are dropped,
    # which keeps the padding below the kernel's size.
    drop = max(0, -(-(offset - kernel + 1) // factor))
    x = x[:, :, drop:, drop:]
    x = conv_transpose2d(x, up.weight, stride=up.stride, padding=offset - factor * drop)
    # Cut by a negative padding: slices of unknown size would tie an exported program to its example.
    return F.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))


def fcn32s(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padded: bool = True,
    width: int = 64,
    dropout: float = 0.5,
) -> FCN:
    """FCN-32s on VGG16, 136.2 million parameters: the coarse scores enlarged at once (see `FCN`).

    >>> import torch
    >>> fcn32s(width=2, padded=False)(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(num_classes, in_channels, stride=32, padded=padded, width=width, dropout=dropout)


def fcn16s(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padded: bool = True,
    width: int = 64,
    dropout: float = 0.5,
) -> FCN:
    """FCN-16s on VGG16, 134.8 million parameters: with the scores of pool4 (see `FCN`).

    >>> import torch
    >>> fcn16s(width=2, padded=False)(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(num_classes, in_channels, stride=16, padded=padded, width=width, dropout=dropout)


def fcn8s(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padded: bool = True,
    width: int = 64,
    dropout: float = 0.5,
) -> FCN:
    """FCN-8s on VGG16, 134.5 million parameters: with the scores of pool4 and pool3 (see `FCN`).

    >>> import torch
    >>> fcn8s(width=2, padded=False)(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(num_classes, in_channels, stride=8, padded=padded, width=width, dropout=dropout)
