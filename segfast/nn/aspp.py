"""Atrous spatial pyramid pooling, DeepLab's head, in torchvision's structure."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops._epilogue import check_activation
from ._activation import activation_module
from ._fused.aspp import aspp_in
from ._fused.eager import worth_fusing
from ._fused.folding import PooledBatchNorm2d, Remembers
from .conv2d import ConvBNAct
from .separable_conv2d import DepthwiseConv2d


class _ASPPPooling(nn.Sequential):
    """The mean over each image through a 1x1 convolution; `[N, C, H, W]` to `[N, C_out, 1, 1]`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_layer: Callable[[int], nn.Module],
        activation: str | None,
    ):
        conv, norm, *rest = ConvBNAct(
            in_channels, out_channels, 1, norm_layer=norm_layer, activation=activation
        )
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = PooledBatchNorm2d
        super().__init__(nn.AdaptiveAvgPool2d(1), conv, norm, *rest)


class ASPP(Remembers):
    """Atrous spatial pyramid pooling: torchvision's `ASPP`, its structure, parameter names and results.

    A 1x1 convolution, 3x3 ones at each of the rates and one of the mean over the image, side by side, then a
    1x1 convolution over them all and dropout. In eval without gradients the dense branches are one operator
    (`segfast.functional.parallel_conv2d`), and the pooled branch is added to the projection's result, without
    being enlarged or concatenated. In train, with gradients, under hooks on the layers, or with norms other
    than batch norm, the layers run one after the other. What the norms fold into is remembered until their
    tensors are written to (not seen: a write through `.data`; call `eval()` after one).

    In train the batch norm of the pooled branch sees one value of each image: at batch 1, where torchvision's
    raises, it uses its running statistics and leaves them alone.

    Args:
        in_channels, out_channels: of the whole; the branches have `out_channels` each.
        atrous_rates: the dilations of the 3x3 convolutions, any number of them.
        separable: depthwise-separable 3x3 convolutions, as segmentation_models_pytorch has them.
        dropout: probability, after the projection.
        activation: after every norm; None, or a name `Conv2d` knows.
        norm_layer: called with the number of channels.

    Shapes: [N, in_channels, H, W] to [N, out_channels, H, W].

    Raises:
        ValueError: no rates, a rate below 1, an unknown activation.

    Source: Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation"
    (2017), section 3.3.

    Example:
        >>> import torch, segfast
        >>> aspp = segfast.nn.ASPP(8, [6, 12, 18], 4).eval()
        >>> aspp(torch.randn(1, 8, 33, 33)).shape
        torch.Size([1, 4, 33, 33])
    """

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[int],
        out_channels: int = 256,
        *,
        separable: bool = False,
        dropout: float = 0.5,
        activation: str | None = "relu",
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        check_activation(activation)
        rates = tuple(atrous_rates)
        if not rates or min(rates) < 1:
            raise ValueError(f"atrous_rates must be at least one dilation of 1 or more, got {rates}")
        super().__init__()

        def block(channels: int, kernel_size: int, dilation: int = 1) -> ConvBNAct:
            return ConvBNAct(
                channels,
                out_channels,
                kernel_size,
                dilation=dilation,
                norm_layer=norm_layer,
                activation=activation,
            )

        def separable_block(rate: int) -> nn.Sequential:
            depthwise = DepthwiseConv2d(in_channels, in_channels, 3, padding=rate, dilation=rate, bias=False)
            pair = nn.Sequential(depthwise, nn.Conv2d(in_channels, out_channels, 1, bias=False))
            ending = [] if activation is None else [activation_module(activation)]
            return nn.Sequential(pair, norm_layer(out_channels), *ending)

        self.convs = nn.ModuleList([block(in_channels, 1)])
        self.convs.extend(
            separable_block(rate) if separable else block(in_channels, 3, rate) for rate in rates
        )
        self.convs.append(_ASPPPooling(in_channels, out_channels, norm_layer, activation))
        self.project = nn.Sequential(*block(len(self.convs) * out_channels, 1), nn.Dropout(dropout))

    def forward(self, input: Tensor) -> Tensor:
        *branches, pool = self.convs
        if not self.training and worth_fusing(input):
            aspp = aspp_in(self, branches, pool, self.project)
            if aspp is not None and aspp.is_eligible(input):
                return aspp.run(self, input)
        features = [branch(input) for branch in branches]
        pooled = pool(input)
        # In the others' memory format, which `cat` would lose if one of them had another. Enlarged first:
        # torch's exporter to ONNX forgets that a copy broadcasts.
        features.append(torch.empty_like(features[0]).copy_(pooled.expand_as(features[0])))
        return self.project(torch.cat(features, 1))
