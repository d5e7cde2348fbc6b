"""Gradient of the input: a strided convolution of the output's gradient.

gx[n, k, ih, iw] = sum over taps and c of gy[n, c, stride ih - pad + dilation kh, ...] w[k, c, kh, kw].
"""

from .._device import dot_precision
from .._launch import launch_for, layout_key
from .._tiles import Problem, choose_tile, register_candidates
from ..conv2d.dense import Dense, candidates, make_dense

register_candidates("conv_transpose2d_grad_input", candidates, uses=("conv2d",))


def _make(gy, w, out, stride, padding, dilation, groups) -> Dense:
    batch, channels_in, height, width = out.shape
    channels_out, kernel = w.shape[1], w.shape[2:]
    taps = kernel[0] * kernel[1]
    rows = batch * height * width
    problem = Problem(
        "conv_transpose2d_grad_input", channels_in, channels_out * groups, taps, groups, gy.dtype, rows,
        rows=rows, columns=channels_in // groups, depth=taps * channels_out,
    )  # fmt: skip
    tile = choose_tile(problem, gy.device)
    return make_dense([gy], w, None, out, stride, padding, dilation, groups, tile, None, 0.0)


def conv_transpose2d_grad_input(gy, w, out, stride, padding, dilation, groups) -> None:
    """out = gradient of the transposed convolution's input.

    gy [N, CO, OH, OW] and out [N, CI, H, W]: any strides with a channel stride of 1. w [CI, CO/groups, KH,
    KW] dense in channels_last.
    """
    options = (stride, padding, dilation, groups)
    key = ("conv_transpose2d_grad_input", layout_key(gy, w, out), gy.device, options, dot_precision(gy.dtype))
    launch = launch_for(key, lambda: _make(gy, w, out, *options))
    launch((gy,), w, None, None, None, None, out)
