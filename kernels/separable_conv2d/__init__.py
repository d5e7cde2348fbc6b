"""Depthwise convolution, its gradients, and its fusion with the 1x1 convolution after it.

Everything is channels_last in memory: images [N, H, W, C], a depthwise weight [C * M, 1, KH, KW] with its
channels side by side, a pointwise weight [CO, C * M]. Only the channel stride of an image has to be 1. No
atomics: each output is written once, by one program.
"""

from .depthwise import depthwise_conv2d_forward
from .grad_input import depthwise_conv2d_grad_input
from .grad_weight import depthwise_conv2d_grad_weight
from .separable import pointwise_conv2d_forward, separable_conv2d_forward

__all__ = [
    "depthwise_conv2d_forward",
    "depthwise_conv2d_grad_input",
    "depthwise_conv2d_grad_weight",
    "pointwise_conv2d_forward",
    "separable_conv2d_forward",
]
