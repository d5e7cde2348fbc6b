"""DeepLab v1 and v2.

v1: Chen, Papandreou, Kokkinos, Murphy, Yuille, "Semantic Image Segmentation with Deep Convolutional Nets and
Fully Connected CRFs", ICLR 2015. v2: the same authors, "DeepLab: Semantic Image Segmentation with Deep
Convolutional Nets, Atrous Convolution, and Fully Connected CRFs", TPAMI 2018.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segfast.nn import Conv2d, DenseCRF

from ._base import SegmentationModel, check_counts, tensors, unlike
from ._layers import resize
from .encoders import Encoder, ResNetEncoder, VGG16Encoder
from .encoders._base import scaled
from .encoders.vgg16 import pool_around

# Of the dilated convolutions that make the scores, at output stride 8: v1's LargeFOV and v2's ASPP-L.
LARGE_FOV = (12,)
ASPP_L = (6, 12, 18, 24)


class DeepLab(SegmentationModel):
    """DeepLab v1 or v2; see `deeplabv1_vgg16`, `deeplabv2_vgg16` and `deeplabv2_resnet101`.

    Encoder at output stride 8 -> a branch of dilated convolutions for each rate, each with scores of its own,
    which are summed -> enlarged to the image bilinearly -> with `crf`, `segfast.nn.DenseCRF`, which trains
    with the rest. In eval the scores are the largest of those of the image and of its smaller copies.

    Args:
        name: under which `segfast.models.create` knows the network.
        config: the arguments it was made with there.
        encoder: at output stride 8.
        branches: on its last features.
        num_classes: channels of the output.
        scales: sizes of the copies over that of the image.
        crf: refine the scores, by the colors of the image.
        color_scale: what the image is multiplied by for the CRF, whose colors are 0 to 255.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        encoder: Encoder,
        branches: Sequence[nn.Module],
        num_classes: int,
        *,
        scales: Sequence[float] = (),
        crf: bool = False,
        color_scale: float = 255.0,
    ) -> None:
        super().__init__()
        for option, values in (("scales", scales), ("color_scale", [color_scale])):
            if not all(value > 0 for value in values):
                raise ValueError(f"{option} must be positive, got {config[option]}")
        self.name = name
        self.config = dict(config)
        self.num_classes = num_classes
        self.in_channels = encoder.in_channels
        self.encoder = encoder
        self.branches = nn.ModuleList(branches)
        self.scales = tuple(scales)
        self.color_scale = color_scale
        self.crf = DenseCRF(num_classes) if crf else None
        for branch in branches:
            scores: Any = branch[-1] if isinstance(branch, nn.Sequential) else branch
            nn.init.normal_(scores.weight, std=0.01)  # as published
            nn.init.zeros_(scores.bias)

    def forward(self, input: Tensor, *, upsample: bool = True) -> Tensor:
        """Class scores `[N, num_classes, H, W]` of images `[N, in_channels, H, W]`.

        With `upsample=False` they are left at an eighth of the input's size, rounded up, for
        `segfast.nn.UpsampleCrossEntropyLoss` and `UpsampleArgmax`.

        Raises:
            ValueError: an input that is not 4-D or has no pixel; `upsample=False` with a CRF, which needs all
                pixels.
        """
        self._check_input(input)
        if self.crf is not None and not upsample:
            raise ValueError("upsample must be True with a CRF, which refines scores of the image's size")
        size = input.shape[2:]
        scores = self._coarse(input)
        for scale in () if self.training else self.scales:
            smaller = resize(input, [math.ceil(scale * n) for n in size])
            scores = torch.maximum(scores, resize(self._coarse(smaller), scores.shape[2:]))
        if not upsample:
            return scores
        scores = resize(scores, size)
        if self.crf is None:
            return scores
        # In the memory format of the scores.
        return torch.empty_like(scores).copy_(self.crf(scores, self.color_scale * input))

    def _coarse(self, input: Tensor) -> Tensor:
        features = self.encoder(input)[-1]
        if isinstance(self.encoder, VGG16Encoder):
            features = pool_around(features)
        first, *others = (branch(features) for branch in self.branches)
        return sum(others, start=first)

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`.

        Reads checkpoints of this network, with a CRF or without, and of its encoder's classifier. Of VGG16's
        each branch takes every fourth channel of the linear layers, and 3x3 of the 7x7, as in the paper.

        Raises:
            ValueError: a checkpoint of neither.
        """
        own, state = self.state_dict(), tensors(state_dict)
        if any(key.startswith("branches.") for key in state):
            crf = {key: value for key, value in own.items() if key.startswith("crf.")}
            state = crf | {key: v for key, v in state.items() if crf or not key.startswith("crf.")}
            if state.keys() != own.keys():
                raise ValueError(f"the checkpoint is of another network: {unlike(state, own)}")
            return state
        encoder = self.encoder.remap_state_dict(state)
        renamed = own | {f"encoder.{key}": value for key, value in encoder.items()}
        if "classifier.3.weight" in state:
            fc6, fc7 = (state[f"classifier.{index}.weight"][::4] for index in (0, 3))
            fc6 = fc6.unflatten(1, (-1, 7, 7))[..., ::3, ::3]
            for branch in range(len(self.branches)):
                for name, value in (("fc6", fc6), ("fc7", fc7[:, ::4, None, None])):
                    key = f"branches.{branch}.{name}"
                    renamed[f"{key}.weight"] = value
                    renamed[f"{key}.bias"] = state[f"classifier.{0 if name == 'fc6' else 3}.bias"][::4]
        return renamed


def _vgg16(name: str, rates: Sequence[int], config: dict[str, Any]) -> DeepLab:
    """The network of the arguments that the function of that name was called with."""
    options = dict(config)
    num_classes, dropout = options.pop("num_classes"), options.pop("dropout")
    check_counts(num_classes=num_classes)
    encoder = VGG16Encoder(options.pop("in_channels"), 8, width_mult := options.pop("width_mult"))
    channels, wide = encoder.channels[-1], scaled(1024, width_mult)
    branches = [
        nn.Sequential(
            OrderedDict(
                fc6=Conv2d(channels, wide, 3, padding=rate, dilation=rate, activation="relu"),
                dropout6=nn.Dropout(dropout),
                fc7=Conv2d(wide, wide, 1, activation="relu"),
                dropout7=nn.Dropout(dropout),
                fc8=Conv2d(wide, num_classes, 1),
            )
        )
        for rate in rates
    ]
    return DeepLab(name, config, encoder, branches, num_classes, **options)


def deeplabv1_vgg16(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width_mult: float = 1.0,
    dropout: float = 0.5,
    crf: bool = False,
    color_scale: float = 255.0,
) -> DeepLab:
    """DeepLab-LargeFOV on VGG16: 20.5 million parameters.

    VGG16 with holes in place of the last two poolings' strides; fc6 is a 3x3 convolution of dilation 12, and
    fc6 and fc7 have 1024 channels. The published network differs in its poolings: those with a stride are
    3x3, and before fc6 lies an average over 3x3.

    Shapes: `[N, in_channels, H, W]` -> `[N, num_classes, H, W]` (see `DeepLab.forward`).

    Args:
        num_classes: channels of the output.
        in_channels: of the image.
        width_mult: factor on the channels (`segfast.models.encoders.VGG16Encoder`).
        dropout: probability, after fc6 and fc7.
        crf: a dense CRF on the scores, `segfast.nn.DenseCRF`, trained with the rest.
        color_scale: for the CRF, whose colors are 0 to 255: 255 for images in 0..1, 1 for images in 0..255,
            about 57 for images that were divided by torchvision's standard deviations too.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> model = deeplabv1_vgg16(width_mult=0.125, crf=True).eval()
    >>> model(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    """
    return _vgg16("deeplabv1_vgg16", LARGE_FOV, dict(locals()))


def deeplabv2_vgg16(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width_mult: float = 1.0,
    dropout: float = 0.5,
    scales: Sequence[float] = (0.5, 0.75),
    crf: bool = False,
    color_scale: float = 255.0,
) -> DeepLab:
    """DeepLab v2 on VGG16: 37.9 million parameters.

    Four of v1's branches side by side, of dilations 6, 12, 18 and 24, summed (ASPP-L).

    Shapes, the other arguments and what is raised are as for `deeplabv1_vgg16`.

    Args:
        scales: in eval also the scores of copies of the image at so many times its size are computed, and the
            largest are returned; () for none.

    >>> import torch
    >>> deeplabv2_vgg16(width_mult=0.125).eval()(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    """
    return _vgg16("deeplabv2_vgg16", ASPP_L, dict(locals()) | {"scales": list(scales)})


def deeplabv2_resnet101(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width_mult: float = 1.0,
    scales: Sequence[float] = (0.5, 0.75),
    crf: bool = False,
    color_scale: float = 255.0,
) -> DeepLab:
    """DeepLab v2 on ResNet-101: 44.0 million parameters.

    Four 3x3 convolutions of dilations 6, 12, 18 and 24 make scores of the last features, and are summed.

    Shapes, arguments and what is raised are as for `deeplabv2_vgg16`.

    >>> import torch
    >>> deeplabv2_resnet101(width_mult=0.125).eval()(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    """
    config = dict(locals()) | {"scales": list(scales)}
    check_counts(num_classes=num_classes)
    encoder = ResNetEncoder(in_channels, 8, width_mult, 101)
    channels = encoder.channels[-1]
    branches = [Conv2d(channels, num_classes, 3, padding=rate, dilation=rate) for rate in ASPP_L]
    options = {"scales": scales, "crf": crf, "color_scale": color_scale}
    return DeepLab("deeplabv2_resnet101", config, encoder, branches, num_classes, **options)  # type: ignore[arg-type]
