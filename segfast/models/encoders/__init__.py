"""Classification networks as encoders: lists of features at strides that double."""

from ._base import Encoder
from .mobilenet_v2 import MobileNetV2Encoder
from .mobilenet_v3 import MobileNetV3LargeEncoder
from .resnet import ResNetEncoder
from .vgg16 import VGG16Encoder
from .xception65 import Xception65Encoder

__all__ = [
    "Encoder",
    "MobileNetV2Encoder",
    "MobileNetV3LargeEncoder",
    "ResNetEncoder",
    "VGG16Encoder",
    "Xception65Encoder",
]
