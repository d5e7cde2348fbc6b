"""DeepLabV3 on a dilated ResNet or MobileNetV3, as torchvision builds it.

Chen, Papandreou, Schroff, Adam, "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017
(arXiv:1706.05587); the network is torchvision's `deeplabv3_resnet50`, `deeplabv3_resnet101` and
`deeplabv3_mobilenet_v3_large`.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from segfast.nn import ASPP, Conv2d
from segfast.nn._fused.folding import Remembers
from segfast.nn._fused.layers import run_layers

from ._torchvision_segmentation import FCNHead, TorchvisionSegmentation, check_options, refuse_weights
from .encoders import MobileNetV3LargeEncoder, ResNetEncoder
from .encoders._base import scaled

# Of the pyramid, in pixels of its input, at output stride 16; twice that at 8.
RATES = (6, 12, 18)


class DeepLabHead(Remembers, nn.Sequential):
    """`segfast.nn.ASPP`, a 3x3 convolution with norm and ReLU, and a 1x1 convolution to the scores."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        rates: Sequence[int],
        channels: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(
            ASPP(in_channels, rates, channels, dropout=dropout),
            Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            Conv2d(channels, num_classes, 1),
        )

    def forward(self, input: Tensor) -> Tensor:
        aspp, *block, scores = self
        return scores(run_layers(block, aspp(input)))


class DeepLabV3(TorchvisionSegmentation):
    """DeepLabV3; see `deeplabv3_resnet50`, `deeplabv3_resnet101` and `deeplabv3_mobilenet_v3_large`.

    It trains on batches of one image too, where torchvision's raises: the norm of the image's pooled features
    then uses its running statistics (`segfast.nn.ASPP`).
    """


def _build(depth: int, weights: None, weights_backbone: None, **config) -> DeepLabV3:
    """The network of the arguments that its function was called with."""
    refuse_weights(weights, weights_backbone)
    num_classes, output_stride = config["num_classes"], config["output_stride"]
    check_options(num_classes, output_stride)
    backbone = ResNetEncoder(config["in_channels"], output_stride, config["width_mult"], depth)
    *_, before, last = backbone.channels
    rates = [rate * 16 // output_stride for rate in RATES]
    channels = scaled(256, config["width_mult"])
    return DeepLabV3(
        f"deeplabv3_resnet{depth}",
        config,
        backbone,
        DeepLabHead(last, num_classes, rates, channels, config["dropout"]),
        FCNHead(before, num_classes) if config["aux_loss"] else None,
        num_classes,
    )


def deeplabv3_resnet50(
    *,
    weights: None = None,
    weights_backbone: None = None,
    num_classes: int = 21,
    aux_loss: bool = False,
    output_stride: int = 8,
    in_channels: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.5,
) -> DeepLabV3:
    """torchvision's `deeplabv3_resnet50`: 39.6 million parameters, 42.0 million with `aux_loss`.

    Shapes: `[N, in_channels, H, W]` -> `{"out": [N, num_classes, H, W]}`, and as much under "aux" with
    `aux_loss` (see `TorchvisionSegmentation.forward`). torchvision's weights load by `load_state_dict`.

    Args:
        weights, weights_backbone: None; nothing is downloaded.
        num_classes: channels of the output.
        aux_loss: an auxiliary head on the features before the last, for training.
        output_stride: pixels of the image to one of the last features: 8, torchvision's, with rates 12, 24
            and 36 in the pyramid, or 16 (coarser, a quarter of the pixels) with 6, 12, 18, as in the paper.
        in_channels: of the image.
        width_mult: factor on the channels (`segfast.models.encoders.ResNetEncoder`).
        dropout: probability, after the pyramid.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> model = deeplabv3_resnet50(width_mult=0.125, aux_loss=True).eval()
    >>> {name: list(scores.shape) for name, scores in model(torch.zeros(1, 3, 65, 50)).items()}
    {'out': [1, 21, 65, 50], 'aux': [1, 21, 65, 50]}
    """
    return _build(50, **locals())


def deeplabv3_resnet101(
    *,
    weights: None = None,
    weights_backbone: None = None,
    num_classes: int = 21,
    aux_loss: bool = False,
    output_stride: int = 8,
    in_channels: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.5,
) -> DeepLabV3:
    """torchvision's `deeplabv3_resnet101`: 58.6 million parameters, 61.0 million with `aux_loss`.

    Shapes, arguments and what is raised are as for `deeplabv3_resnet50`.

    >>> import torch
    >>> deeplabv3_resnet101(width_mult=0.125).eval()(torch.zeros(1, 3, 33, 33))["out"].shape
    torch.Size([1, 21, 33, 33])
    """
    return _build(101, **locals())


def deeplabv3_mobilenet_v3_large(
    *,
    weights: None = None,
    weights_backbone: None = None,
    num_classes: int = 21,
    aux_loss: bool = False,
    in_channels: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.5,
) -> DeepLabV3:
    """torchvision's `deeplabv3_mobilenet_v3_large`: 11.0 million parameters, as many with `aux_loss`.

    On MobileNetV3-Large at output stride 16, with rates 12, 24 and 36; the auxiliary head is on the features
    of stride 8. Shapes, arguments and what is raised are otherwise as for `deeplabv3_resnet50`.

    >>> import torch
    >>> deeplabv3_mobilenet_v3_large(width_mult=0.25).eval()(torch.zeros(1, 3, 33, 33))["out"].shape
    torch.Size([1, 21, 33, 33])
    """
    config = dict(locals())
    refuse_weights(config.pop("weights"), config.pop("weights_backbone"))
    check_options(num_classes, 16)
    backbone = MobileNetV3LargeEncoder(in_channels, 16, width_mult)
    rates, channels = [2 * rate for rate in RATES], scaled(256, width_mult)
    return DeepLabV3(
        "deeplabv3_mobilenet_v3_large",
        config,
        backbone,
        DeepLabHead(backbone.channels[-1], num_classes, rates, channels, dropout),
        FCNHead(backbone.channels[-3], num_classes) if aux_loss else None,
        num_classes,
        aux_feature=-3,
    )
