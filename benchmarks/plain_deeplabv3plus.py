"""DeepLabV3+ in plain torch.nn at output stride 16, every norm and activation a layer of its own.

Its layers bear the names of segfast's, so that the weights of one load into the other.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def _batch_norm(eps: float) -> Callable[[int], nn.Module]:
    return lambda channels: nn.BatchNorm2d(channels, eps=eps)


def _conv_norm(
    c_in: int,
    c_out: int,
    k: int = 1,
    stride: int = 1,
    dilation: int = 1,
    *,
    groups: int = 1,
    activation: Callable[..., nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, k, stride, dilation * (k // 2), dilation, groups, bias=False)
    layers = [conv, nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers) if activation is None else nn.Sequential(*layers, activation(inplace=True))


class _InvertedResidual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int, dilation: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers.append(_conv_norm(c_in, hidden, activation=nn.ReLU6))
        layers += [
            _conv_norm(hidden, hidden, 3, stride, dilation, groups=hidden, activation=nn.ReLU6),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class _MobileNetV2(nn.Module):
    channels = (24, 320)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_norm(3, 32, 3, 2, activation=nn.ReLU6)]
        c_in = 32
        # Expansion, channels, stride of the first block; the dilation of each block.
        for expansion, c_out, stride, dilations in (
            (1, 16, 1, [1]),
            (6, 24, 2, [1] * 2),
            (6, 32, 2, [1] * 3),
            (6, 64, 2, [1] * 4),
            (6, 96, 1, [1] * 3),
            (6, 160, 1, [1, 2, 2]),
            (6, 320, 1, [2]),
        ):
            for i, dilation in enumerate(dilations):
                layers.append(_InvertedResidual(c_in, c_out, 1 if i else stride, expansion, dilation))
                c_in = c_out
        self.features = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = self.features[:4](x)
        return low, self.features[4:](low)


class _Separable(nn.Module):
    """Depthwise, norm, (ReLU,) pointwise, norm(, ReLU)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int = 1,
        dilation: int = 1,
        *,
        between: bool = True,
        after: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        norm = _batch_norm(eps)
        self.conv_dw = nn.Conv2d(c_in, c_in, 3, stride, dilation, dilation, groups=c_in, bias=False)
        self.bn_dw = norm(c_in)
        self.act_dw = nn.ReLU(inplace=True) if between else nn.Identity()
        self.conv_pw = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn_pw = norm(c_out)
        self.act_pw = nn.ReLU(inplace=True) if after else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act_dw(self.bn_dw(self.conv_dw(x)))
        return self.act_pw(self.bn_pw(self.conv_pw(x)))


class _ConvNorm(nn.Module):
    """Xception's dense layers: other names, another eps."""

    def __init__(self, c_in: int, c_out: int, k: int, stride: int, relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)
        self.act = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class _XceptionBlock(nn.Module):
    def __init__(
        self, c_in: int, widths: tuple[int, int, int], stride: int, dilation: int = 1, skip: bool = True
    ) -> None:
        super().__init__()
        self.skip = skip
        self.shortcut = None
        if skip and (stride > 1 or c_in != widths[-1]):
            self.shortcut = _ConvNorm(c_in, widths[-1], 1, stride, relu=False)
        self.stack = nn.ModuleDict()
        for i, c_out in enumerate(widths):
            self.stack[f"conv{i + 1}"] = _Separable(
                c_in,
                c_out,
                stride if i == 2 else 1,
                dilation,
                between=not skip,
                after=i < 2 or not skip,
                eps=1e-3,
            )
            c_in = c_out

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tap = self.stack["conv2"](self.stack["conv1"](F.relu(x) if self.skip else x))
        y = self.stack["conv3"](tap)
        if self.skip:
            y = y + (x if self.shortcut is None else self.shortcut(x))
        return y, tap


class _Xception65(nn.Module):
    channels = (256, 2048)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_ConvNorm(3, 32, 3, 2, relu=True), _ConvNorm(32, 64, 3, 1, relu=True))
        blocks = [
            _XceptionBlock(64, (128,) * 3, 2),
            _XceptionBlock(128, (256,) * 3, 2),
            _XceptionBlock(256, (728,) * 3, 2),
        ]
        blocks += [_XceptionBlock(728, (728,) * 3, 1) for _ in range(16)]
        blocks.append(_XceptionBlock(728, (728, 1024, 1024), 1))
        blocks.append(_XceptionBlock(1024, (1536, 1536, 2048), 1, 2, skip=False))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        taps = []
        for block in self.blocks:
            x, tap = block(x)
            taps.append(tap)
        return taps[1], x


class _ASPP(nn.Module):
    def __init__(self, c_in: int, conv3x3: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_conv_norm(c_in, 256), *(conv3x3(c_in, 256, dilation=rate) for rate in (6, 12, 18))]
        )
        self.pool = _conv_norm(c_in, 256)
        self.project = _conv_norm(5 * 256, 256)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [branch(x) for branch in self.branches]
        pooled = self.pool(F.adaptive_avg_pool2d(x, 1))
        # Of a 1x1 map, interpolate would return another memory format, and everything from there on have it.
        features.append(torch.empty_like(features[0]).copy_(pooled))
        return self.dropout(self.project(torch.cat(features, 1)))


class DeepLabV3Plus(nn.Module):
    """Chen et al. 2018: "mobilenet_v2" with dense 3x3 convolutions, or "xception65" with separable ones."""

    def __init__(self, encoder: str, num_classes: int = 21) -> None:
        super().__init__()
        separable = encoder == "xception65"
        self.encoder = _Xception65() if separable else _MobileNetV2()
        low, high = self.encoder.channels

        def conv3x3(c_in: int, c_out: int, dilation: int = 1) -> nn.Module:
            if separable:
                return _Separable(c_in, c_out, dilation=dilation)
            return _conv_norm(c_in, c_out, 3, dilation=dilation)

        self.aspp = _ASPP(high, conv3x3)
        self.low_level = _conv_norm(low, 48)
        self.decoder = nn.Sequential(conv3x3(304, 256), conv3x3(256, 256))
        self.head = nn.Conv2d(256, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = self.encoder(x)
        low = self.low_level(low)
        high = F.interpolate(self.aspp(high), size=low.shape[2:], mode="bilinear", align_corners=False)
        logits = self.head(self.decoder(torch.cat([high, low], 1)))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def set_batch_statistics(network: nn.Module, channels: int = 3, size: int = 129) -> None:
    """Give every batch norm the statistics of random images: an untrained network's signal dies otherwise."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1
    device = next(network.parameters()).device
    network.train()(torch.randn(2, channels, size, size, device=device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
