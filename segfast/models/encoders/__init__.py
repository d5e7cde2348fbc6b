"""Classification networks as encoders: lists of features at strides 2, 4, 8 and so on."""

from ._base import Encoder
from .mobilenet_v2 import MobileNetV2Encoder
from .resnet import ResNetEncoder
from .xception65 import Xception65Encoder

__all__ = ["Encoder", "MobileNetV2Encoder", "ResNetEncoder", "Xception65Encoder"]
