"""torchvision's FCN and DeepLabV3 on ResNet-50 in plain torch.nn, for machines without torchvision.

Layers bear torchvision's names, so that the weights of the one load into the other.
"""

import torch
import torch.nn.functional as F
from torch import nn

NAMES = ("deeplabv3_resnet50", "fcn_resnet50")


def _conv_norm(c_in: int, c_out: int, k: int = 1, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, k, stride, dilation * (k // 2), dilation, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


def _conv_norm_relu(c_in: int, c_out: int, k: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(*_conv_norm(c_in, c_out, k, dilation=dilation), nn.ReLU())


class _Bottleneck(nn.Module):
    def __init__(self, c_in: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(c_in, width)
        self.conv2, self.bn2 = _conv_norm(width, width, 3, stride, dilation)
        self.conv3, self.bn3 = _conv_norm(width, 4 * width)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or c_in != 4 * width
        self.downsample = nn.Sequential(*_conv_norm(c_in, 4 * width, stride=stride)) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class _ResNet50(nn.Module):
    """At output stride 8: the strides of the last two layers are dilations of what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        c_in = 64
        # Width, stride of the first block; the dilation of each block.
        for index, (width, stride, dilations) in enumerate(
            [(64, 1, [1] * 3), (128, 2, [1] * 4), (256, 1, [1, *[2] * 5]), (512, 1, [2, 4, 4])], start=1
        ):
            blocks = []
            for block, dilation in enumerate(dilations):
                blocks.append(_Bottleneck(c_in, width, 1 if block else stride, dilation))
                c_in = 4 * width
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class _ASPP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        dilated = [_conv_norm_relu(2048, 256, 3, rate) for rate in (12, 24, 36)]
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv_norm_relu(2048, 256))
        self.convs = nn.ModuleList([_conv_norm_relu(2048, 256), *dilated, pooled])
        self.project = nn.Sequential(*_conv_norm_relu(5 * 256, 256), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *branches, pooled = self.convs
        features = [branch(x) for branch in branches]
        # Of a 1x1 map, interpolate would return another memory format, and everything from there on have it.
        features.append(torch.empty_like(features[0]).copy_(pooled(x)))
        return self.project(torch.cat(features, 1))


class ResNetSegmentation(nn.Module):
    """The network of that name; returns its scores, "out" of torchvision's dictionary."""

    def __init__(self, name: str, num_classes: int = 21) -> None:
        super().__init__()
        self.backbone = _ResNet50()
        if name == "deeplabv3_resnet50":
            head = [_ASPP(), *_conv_norm_relu(256, 256, 3)]
        else:
            head = [*_conv_norm_relu(2048, 512, 3), nn.Dropout(0.1)]
        c_in = 256 if name == "deeplabv3_resnet50" else 512
        self.classifier = nn.Sequential(*head, nn.Conv2d(c_in, num_classes, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.classifier(self.backbone(x))
        return F.interpolate(scores, size=x.shape[2:], mode="bilinear", align_corners=False)
