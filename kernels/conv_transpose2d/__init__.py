"""Transposed convolution: y[n, c, oh, ow] sums x[n, k, ih, iw] w[k, c, kh, kw].

The sum is over k and all taps with oh + padding = stride * ih + dilation * kh, and so for the width.

Everything is channels_last in memory: x [N, H, W, CI], y [N, OH, OW, CO], and the weight, a channels_last
[CI, CO/groups, KH, KW], is the matrix [CI, KH * KW * CO/groups] that every GEMM here wants. Only the channel
stride has to be 1; images, rows and pixels may lie anywhere. No atomics: each output is written once, by one
program.
"""

from .forward import conv_transpose2d_forward
from .grad_input import conv_transpose2d_grad_input
from .grad_weight import conv_transpose2d_grad_weight

__all__ = ["conv_transpose2d_forward", "conv_transpose2d_grad_input", "conv_transpose2d_grad_weight"]
