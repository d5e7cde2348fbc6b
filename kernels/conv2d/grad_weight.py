"""Gradient of the weight: that of the transposed convolution with image and gradient exchanged.

Its kernel runs over the pixels that a tap brings onto the image, and no others.
"""

from ..conv_transpose2d.grad_weight import conv_transpose2d_grad_weight


def conv2d_grad_weight(x, gy, out, stride, padding, dilation, groups) -> None:
    """out = gradient of the convolution's weight.

    x [N, CI, H, W] and gy [N, CO, OH, OW]: any strides with a channel stride of 1. out [CO, CI/groups,
    KH, KW] dense in channels_last.
    """
    conv_transpose2d_grad_weight(gy, x, out, stride, padding, dilation, groups, "conv2d_grad_weight")
