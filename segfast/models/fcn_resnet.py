"""FCN on a dilated ResNet, as torchvision builds it.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015; the network is
torchvision's `fcn_resnet50` and `fcn_resnet101`.
"""

from ._torchvision_segmentation import FCNHead, TorchvisionSegmentation, check_options, refuse_weights
from .encoders import ResNetEncoder


class FCNResNet(TorchvisionSegmentation):
    """FCN on a ResNet; see `fcn_resnet50` and `fcn_resnet101`."""


def _build(depth: int, weights: None, weights_backbone: None, **config) -> FCNResNet:
    """The network of the arguments that its function was called with."""
    refuse_weights(weights, weights_backbone)
    num_classes, dropout = config["num_classes"], config["dropout"]
    check_options(num_classes, config["output_stride"])
    backbone = ResNetEncoder(config["in_channels"], config["output_stride"], config["width_mult"], depth)
    *_, before, last = backbone.channels
    return FCNResNet(
        f"fcn_resnet{depth}",
        config,
        backbone,
        FCNHead(last, num_classes, dropout),
        FCNHead(before, num_classes, dropout) if config["aux_loss"] else None,
        num_classes,
    )


def fcn_resnet50(
    *,
    weights: None = None,
    weights_backbone: None = None,
    num_classes: int = 21,
    aux_loss: bool = False,
    output_stride: int = 8,
    in_channels: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.1,
) -> FCNResNet:
    """torchvision's `fcn_resnet50`: 33.0 million parameters, 35.3 million with `aux_loss`.

    Shapes: `[N, in_channels, H, W]` -> `{"out": [N, num_classes, H, W]}`, and as much under "aux" with
    `aux_loss` (see `TorchvisionSegmentation.forward`). torchvision's weights load by `load_state_dict`.

    Args:
        weights, weights_backbone: None; nothing is downloaded.
        num_classes: channels of the output.
        aux_loss: an auxiliary head on the features before the last, for training.
        output_stride: pixels of the image to one of the last features: 8, torchvision's, or 16 (coarser,
            a quarter of the pixels).
        in_channels: of the image.
        width_mult: factor on the channels (`segfast.models.encoders.ResNetEncoder`).
        dropout: probability, in the heads.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> model = fcn_resnet50(width_mult=0.125, aux_loss=True).eval()
    >>> {name: list(scores.shape) for name, scores in model(torch.zeros(1, 3, 65, 50)).items()}
    {'out': [1, 21, 65, 50], 'aux': [1, 21, 65, 50]}
    """
    return _build(50, **locals())


def fcn_resnet101(
    *,
    weights: None = None,
    weights_backbone: None = None,
    num_classes: int = 21,
    aux_loss: bool = False,
    output_stride: int = 8,
    in_channels: int = 3,
    width_mult: float = 1.0,
    dropout: float = 0.1,
) -> FCNResNet:
    """torchvision's `fcn_resnet101`: 52.0 million parameters, 54.3 million with `aux_loss`.

    Shapes, arguments and what is raised are as for `fcn_resnet50`.

    >>> import torch
    >>> fcn_resnet101(width_mult=0.125).eval()(torch.zeros(1, 3, 33, 33))["out"].shape
    torch.Size([1, 21, 33, 33])
    """
    return _build(101, **locals())
