"""FCN on AlexNet.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015. AlexNet is
torchvision's: Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.

The authors published FCN-32s alone (voc-fcn-alexnet in github.com/shelhamer/fcn.berkeleyvision.org), on the
wider AlexNet with groups and local response normalization. Kernel and offset of its enlarging layer are as
there.
"""

from .fcn import FCN


def fcn32s_alexnet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padded: bool = True,
    width: int = 64,
    dropout: float = 0.5,
) -> FCN:
    """FCN-32s on AlexNet, 58.8 million parameters: the coarse scores enlarged at once (see `FCN`).

    >>> import torch
    >>> fcn32s_alexnet(width=2).eval()(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(backbone="alexnet", stride=32, **locals())


def fcn16s_alexnet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padded: bool = True,
    width: int = 64,
    dropout: float = 0.5,
) -> FCN:
    """FCN-16s on AlexNet, 57.5 million parameters: with the scores of pool2 (see `FCN`).

    >>> import torch
    >>> fcn16s_alexnet(width=2).eval()(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(backbone="alexnet", stride=16, **locals())


def fcn8s_alexnet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padded: bool = True,
    width: int = 64,
    dropout: float = 0.5,
) -> FCN:
    """FCN-8s on AlexNet, 57.2 million parameters: with the scores of pool2 and pool1 (see `FCN`).

    >>> import torch
    >>> fcn8s_alexnet(width=2).eval()(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(backbone="alexnet", stride=8, **locals())
