"""Whole networks in plain torch.nn: what segfast's models are measured against."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import plain_resnet
from benchmarks.plain_deeplabv3plus import DeepLabV3Plus, set_batch_statistics
from segfast.ops.conv_transpose2d.cases import crop_to

DEEPLABV3PLUS = {"deeplabv3plus_mobilenetv2": "mobilenet_v2", "deeplabv3plus_xception65": "xception65"}


def _double_conv(c_in: int, c_out: int, padding: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=padding),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_out, c_out, 3, padding=padding),
        nn.ReLU(inplace=True),
    )


class _Up(nn.Module):
    def __init__(self, c_in: int, c_out: int, padding: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.conv = _double_conv(2 * c_out, c_out, padding)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        rows, columns = skip.shape[2] - y.shape[2], skip.shape[3] - y.shape[3]
        if 0 <= rows < 2 and 0 <= columns < 2:
            y = F.pad(y, (0, columns, 0, rows))
        return self.conv(torch.cat([crop_to(skip, *y.shape[2:]), y], 1))


class UNet(nn.Module):
    """Ronneberger, Fischer, Brox 2015: unpadded as in the paper, or padded to keep the input's size."""

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        width: int = 64,
        depth: int = 4,
        padded: bool = False,
    ) -> None:
        super().__init__()
        padding = int(padded)
        self.inc = _double_conv(in_channels, width, padding)
        widths = [width << level for level in range(depth + 1)]
        pairs = list(itertools.pairwise(widths))
        self.downs = nn.ModuleList(_double_conv(narrow, wide, padding) for narrow, wide in pairs)
        self.ups = nn.ModuleList(_Up(wide, narrow, padding) for narrow, wide in reversed(pairs))
        self.outc = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.inc(x)]
        for down in self.downs:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        y = skips.pop()
        for up in self.ups:
            y = up(y, skips.pop())
        return self.outc(y)


class FCN8sVGG16(nn.Module):
    """Long, Shelhamer, Darrell 2015: VGG16 with a first padding of 100, skips summed, cropped back."""

    OFFSETS = (5, 9, 31)  # crop offsets of pool4's score, pool3's score and the output

    def __init__(self, num_classes: int = 21, width: int = 64) -> None:
        super().__init__()
        stages, c_in = [], 3
        for stage, (count, times) in enumerate([(2, 1), (2, 2), (3, 4), (3, 8), (3, 8)]):
            c_out = width * times
            layers: list[nn.Module] = []
            for i in range(count):
                padding = 100 if stage == i == 0 else 1
                layers += [nn.Conv2d(c_in, c_out, 3, padding=padding), nn.ReLU(inplace=True)]
                c_in = c_out
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Sequential(
            nn.Conv2d(8 * width, 64 * width, 7),
            nn.ReLU(inplace=True),
            nn.Dropout2d(),
            nn.Conv2d(64 * width, 64 * width, 1),
            nn.ReLU(inplace=True),
            nn.Dropout2d(),
            nn.Conv2d(64 * width, num_classes, 1),
        )
        self.score_pool4 = nn.Conv2d(8 * width, num_classes, 1)
        self.score_pool3 = nn.Conv2d(4 * width, num_classes, 1)
        self.up2 = nn.ConvTranspose2d(num_classes, num_classes, 4, stride=2, bias=False)
        self.up4 = nn.ConvTranspose2d(num_classes, num_classes, 4, stride=2, bias=False)
        self.up8 = nn.ConvTranspose2d(num_classes, num_classes, 16, stride=8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, pools = x.shape[2:], []
        for stage in self.stages:
            x = stage(x)
            pools.append(x)
        y = self.up2(self.head(x))
        y = self.up4(y + _at(self.score_pool4(pools[3]), self.OFFSETS[0], y.shape[2:]))
        y = self.up8(y + _at(self.score_pool3(pools[2]), self.OFFSETS[1], y.shape[2:]))
        return _at(y, self.OFFSETS[2], size).contiguous(memory_format=torch.channels_last)


class SegNet(nn.Module):
    """Badrinarayanan, Kendall, Cipolla 2017: VGG16 with batch norm and its mirror, int64 pooling indices.

    Its layers bear the names that segfast's have.
    """

    def __init__(self, num_classes: int = 21, width: int = 64) -> None:
        super().__init__()
        encoder, decoder, c_in = [], [], 3
        for count, times in [(2, 1), (2, 2), (3, 4), (3, 8), (3, 8)]:
            widths = [c_in] + [times * width] * count
            encoder.append(_conv_norms(widths))
            decoder.append(_conv_norms(widths[::-1] if c_in != 3 else widths[:0:-1]))
            c_in = widths[-1]
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(reversed(decoder))
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = []
        for stage in self.encoder:
            features = stage(x)
            x, indices = F.max_pool2d(features, 2, ceil_mode=True, return_indices=True)
            pooled.append((indices, features.shape[2:]))
        for stage in self.decoder:
            indices, size = pooled.pop()
            x = stage(F.max_unpool2d(x, indices, 2, output_size=size))
        return self.classifier(x)


def _conv_norms(widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
            for i, o in itertools.pairwise(widths)
        )
    )


def _at(x: torch.Tensor, offset: int, size: torch.Size) -> torch.Tensor:
    return x[:, :, offset : offset + size[0], offset : offset + size[1]]


def _deeplabv3plus(encoder: str) -> nn.Module:
    network = DeepLabV3Plus(encoder)
    set_batch_statistics(network)
    return network


def plain_model(name: str, small: bool = False) -> tuple[nn.Module, int] | str:
    """The network a models case names and its input channels, or why there is none to compare with here."""
    width = 16 if small else 64
    if name == "unet":
        return UNet(width=width), 1
    if name == "fcn8s_vgg16":
        return FCN8sVGG16(width=width), 3
    if name == "segnet_vgg16":
        return SegNet(width=width), 3
    if name in plain_resnet.NAMES:
        return plain_resnet.ResNetSegmentation(name), 3
    if name in DEEPLABV3PLUS:
        return _deeplabv3plus(DEEPLABV3PLUS[name]), 3
    return f"no plain twin of {name} yet"
