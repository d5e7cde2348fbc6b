"""Gradient of the input.

At stride 1 it is a convolution with the filter turned by 180 degrees and its channels exchanged, over zones
where most taps of a large dilation would meet nothing. Else it is a transposed convolution, by whose kernels:
the very same memory, [CO, KH, KW, CI], is the filter of the one from CO to CI channels.
"""

from collections.abc import Callable
from dataclasses import replace

from .._device import dot_precision
from .._launch import launch_for, layout_key
from .._tiles import Problem, Tile, choose_tile, register_candidates
from ..conv_transpose2d.forward import conv_transpose2d_forward
from ._zones import useful_taps
from .dense import candidates, make_dense
from .dilated import branch_of, make_dilated
from .forward import problem_of, zones_pay


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    found = candidates(problem, arch)
    if problem.variant.startswith("-s1d"):
        return found
    # The transposed convolution's kernels do not cut their depth.
    return list(dict.fromkeys(replace(tile, split_k=1) for tile in found))


register_candidates("conv2d_grad_input", _candidates, uses=("conv_transpose2d",))


def conv2d_grad_input(gy, w, out, stride, padding, dilation, groups) -> None:
    """out = gradient of the convolution's input.

    gy [N, CO, OH, OW] and out [N, CI, H, W]: any strides with a channel stride of 1. w [CO, CI/groups, KH,
    KW] dense in channels_last.
    """
    key = ("conv2d_grad_input", layout_key(gy, w, out), gy.device, stride, padding, dilation, groups,
           dot_precision(gy.dtype))  # fmt: skip
    launch_for(key, lambda: _make(gy, w, out, stride, padding, dilation, groups))(gy, w, out)


def _make(gy, w, out, stride, padding, dilation, groups) -> Callable[..., object]:
    kernel = tuple(w.shape[2:])
    turned = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True))
    branch = branch_of(gy.shape[2:], out.shape[2:], kernel, (1, 1), turned, dilation)
    batch, pixels = out.shape[0], out.shape[0] * out.shape[2] * out.shape[3]
    channels = gy.shape[1] // groups
    taps = (
        useful_taps(branch, batch) // pixels if stride == (1, 1) else kernel[0] * kernel[1] // stride[0] ** 2
    )
    problem = problem_of(
        "conv2d_grad_input",
        out,
        w,
        stride,
        dilation,
        groups,
        False,
        pixels,
        w.shape[1],
        max(1, taps) * channels,
    )
    tile = choose_tile(problem, gy.device)
    if stride != (1, 1):
        return lambda gy, w, out: conv_transpose2d_forward(
            gy, w, None, None, None, None, None, out, stride, padding, dilation, groups, (0, 0), None, 0.0,
            tile,
        )  # fmt: skip
    if groups == 1 and channels >= tile.block_k and zones_pay(branch, batch, pixels, tile.block_m):
        zoned = make_dilated(gy, [branch], out.shape[1], None, out, (1, 1), tile, True, None, 0.0)
        return lambda gy, w, out: zoned(gy, (w,), None, None, None, None, out)
    dense = make_dense([gy], w, None, out, (1, 1), turned, dilation, groups, tile, None, 0.0, flip=True)
    return lambda gy, w, out: dense((gy,), w, None, None, None, None, out)
