"""Drop-in `torch.nn` modules."""

from . import init
from .aspp import ASPP
from .conv2d import Conv2d, ConvBNAct
from .conv_transpose2d import ConvTranspose2d
from .dense_crf import DenseCRF
from .packed_pool2d import PackedMaxPool2d, PackedMaxUnpool2d
from .segmentation_head import UpsampleArgmax, UpsampleCrossEntropyLoss
from .separable_conv2d import DepthwiseConv2d, InvertedResidual, SeparableConv2d
from .spatial_pyramid_pooling import SpatialPyramidPooling
from .upsample import BilinearUpsample, UpsampleConv2d

__all__ = [
    "ASPP",
    "BilinearUpsample",
    "Conv2d",
    "ConvBNAct",
    "ConvTranspose2d",
    "DenseCRF",
    "DepthwiseConv2d",
    "InvertedResidual",
    "PackedMaxPool2d",
    "PackedMaxUnpool2d",
    "SeparableConv2d",
    "SpatialPyramidPooling",
    "UpsampleArgmax",
    "UpsampleConv2d",
    "UpsampleCrossEntropyLoss",
    "init",
]
