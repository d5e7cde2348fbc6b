"""Convolution of images, dilated or dense, of one image or of several, and several convolutions of one image.

Everything is channels_last in memory: x [N, H, W, CI], y [N, OH, OW, CO], w [CO, KH, KW, CI/groups]. Only the
channel stride has to be 1; images, rows and pixels may lie anywhere. No atomics: each output is written once,
by one program, or is a sum in a fixed order.
"""

from .dilated import parallel_conv2d_forward
from .forward import conv2d_forward
from .grad_input import conv2d_grad_input
from .grad_weight import conv2d_grad_weight

__all__ = ["conv2d_forward", "conv2d_grad_input", "conv2d_grad_weight", "parallel_conv2d_forward"]
