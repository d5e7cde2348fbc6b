"""VGG16, AlexNet and GoogLeNet without their classifiers, as torchvision builds them: what FCN is put on."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.nn import Conv2d

from ._layers import ConvNormActivation, conv_norm_activation


class Stage(NamedTuple):
    """Layers by name, one after the other, and the side of the max-pooling of stride 2 behind them."""

    layers: dict[str, nn.Module]
    pool: int | None  # none behind GoogLeNet's last
    channels: int


class Classifier(NamedTuple):
    """A classifier to build an FCN on."""

    title: str
    # Of input channels, channels of the first layer, and padding of the first layer.
    build: Callable[[int, int, int], list[Stage]]
    first: tuple[int, int, int]  # kernel, stride and padding of the first layer
    fc6: int | None  # its side as a convolution; None: the scores are made of the features themselves
    linear: dict[str, str]  # our name of each linear layer by torchvision's


def _vgg16(in_channels: int, width: int, padding: int) -> list[Stage]:
    stages, channels = [], in_channels
    for stage, (count, factor) in enumerate(((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)), start=1):
        layers: dict[str, nn.Module] = {}
        for index in range(count):
            conv = Conv2d(channels, factor * width, 3, padding=padding, activation="relu")
            layers[f"conv{stage}_{index + 1}"] = conv
            padding, channels = 1, factor * width
        stages.append(Stage(layers, 2, channels))
    return stages


def _alexnet(in_channels: int, width: int, padding: int) -> list[Stage]:
    first, second, third, fourth = (count * width for count in (1, 3, 6, 4))
    conv = partial(Conv2d, activation="relu")
    return [
        Stage({"conv1": conv(in_channels, first, 11, 4, padding)}, 3, first),
        Stage({"conv2": conv(first, second, 5, padding=2)}, 3, second),
        Stage(
            {
                "conv3": conv(second, third, 3, padding=1),
                "conv4": conv(third, fourth, 3, padding=1),
                "conv5": conv(fourth, fourth, 3, padding=1),
            },
            3,
            fourth,
        ),
    ]


def _basic(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> ConvNormActivation:
    return conv_norm_activation(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        names=("conv", "bn", "act"),
    )


class Inception(nn.Module):
    """1x1, 1x1 and 3x3, 1x1 and 3x3, and pooling and 1x1, side by side (Szegedy et al., figure 2b).

    The third branch's second convolution is 5x5 in the paper and 3x3 in torchvision, whose weights it takes.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        first, narrow2, second, narrow3, third, fourth = widths
        self.branch1 = _basic(in_channels, first, 1)
        self.branch2 = nn.Sequential(_basic(in_channels, narrow2, 1), _basic(narrow2, second, 3))
        self.branch3 = nn.Sequential(_basic(in_channels, narrow3, 1), _basic(narrow3, third, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), _basic(in_channels, fourth, 1))

    def forward(self, input: Tensor) -> Tensor:
        branches = (self.branch1, self.branch2, self.branch3, self.branch4)
        return torch.cat([branch(input) for branch in branches], 1)


# Of GoogLeNet's stages 3 to 5: the channels in each Inception block (Szegedy et al., table 1).
_INCEPTIONS = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


def _googlenet(in_channels: int, width: int, padding: int) -> list[Stage]:
    channels = 3 * width
    stages = [
        Stage({"conv1": _basic(in_channels, width, 7, 2)}, 3, width),
        Stage({"conv2": _basic(width, width, 1), "conv3": _basic(width, channels, 3)}, 3, channels),
    ]
    for stage, (blocks, pool) in enumerate(zip(_INCEPTIONS, (3, 2, None), strict=True), start=3):
        layers: dict[str, nn.Module] = {}
        for letter, widths in zip("abcde", blocks, strict=False):
            scaled = tuple(max(1, count * width // 64) for count in widths)
            layers[f"inception{stage}{letter}"] = Inception(channels, scaled)
            channels = scaled[0] + scaled[2] + scaled[4] + scaled[5]
        stages.append(Stage(layers, pool, channels))
    return stages


CLASSIFIERS = {
    "vgg16": Classifier(
        "VGG16",
        _vgg16,
        (3, 1, 1),
        7,
        {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "score_fr"},
    ),
    "alexnet": Classifier(
        "AlexNet",
        _alexnet,
        (11, 4, 2),
        6,
        {"classifier.1": "fc6", "classifier.4": "fc7", "classifier.6": "score_fr"},
    ),
    "googlenet": Classifier("GoogLeNet", _googlenet, (7, 2, 3), None, {"fc": "score_fr"}),
}


def torchvision_names(stages: list[list[str]], classifier: Classifier) -> dict[str, str]:
    """Our name of each layer with weights, or of a module of such, by torchvision's name of it."""
    if classifier.fc6 is None:
        return {name: name for stage in stages for name in stage} | classifier.linear
    found, index = {}, 0
    for stage in stages:
        for name in stage:
            found[f"features.{index}"] = name
            index += 2  # its ReLU
        index += 1  # the pooling
    return found | classifier.linear


def rescaled(input: Tensor) -> Tensor:
    """An image that was normalized as torchvision's are, as its pretrained GoogLeNet wants it."""
    means, deviations = input.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return input * (deviations / 0.5) + (means - 0.5) / 0.5


def pooled(input: Tensor, side: int | None) -> Tensor:
    """The max-pooling of stride 2 behind a stage; what is left over at the end is pooled too."""
    return input if side is None else F.max_pool2d(input, side, 2, ceil_mode=True)


def pooled_length(length: int, side: int | None) -> int:
    """Pixels that `pooled` makes of `length`; 0 if it cannot."""
    return length if side is None else -(-(length - side) // 2) + 1
