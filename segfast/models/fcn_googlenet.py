"""FCN on GoogLeNet.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015. GoogLeNet
is torchvision's: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, with batch norms.
"""

from .fcn import FCN


def fcn32s_googlenet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: int = 64,
    dropout: float = 0.2,
    transform_input: bool = False,
) -> FCN:
    """FCN-32s on GoogLeNet, 7.4 million parameters: the coarse scores enlarged at once (see `FCN`).

    >>> import torch
    >>> fcn32s_googlenet(width=8).eval()(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(backbone="googlenet", stride=32, **locals())


def fcn16s_googlenet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: int = 64,
    dropout: float = 0.2,
    transform_input: bool = False,
) -> FCN:
    """FCN-16s on GoogLeNet, 6.1 million parameters: with the scores of pool3 (see `FCN`).

    >>> import torch
    >>> fcn16s_googlenet(width=8).eval()(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(backbone="googlenet", stride=16, **locals())


def fcn8s_googlenet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: int = 64,
    dropout: float = 0.2,
    transform_input: bool = False,
) -> FCN:
    """FCN-8s on GoogLeNet, 5.7 million parameters: with the scores of pool3 and pool2 (see `FCN`).

    >>> import torch
    >>> fcn8s_googlenet(width=8).eval()(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(backbone="googlenet", stride=8, **locals())
