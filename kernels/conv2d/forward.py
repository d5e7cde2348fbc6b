"""The convolution's launcher: `dilated.py`'s kernel where its zones save taps, else `dense.py`'s."""

from collections.abc import Callable, Sequence

import torch
import triton

from .._device import dot_precision
from .._launch import launch_for, layout_key
from .._tiles import Problem, choose_tile, geometry_variant
from ._zones import executed_taps, useful_taps
from .dense import make_dense
from .dilated import branch_of, make_dilated

# Zones are taken where they leave no more than this share of the taps: their tables cost something.
_WORTHWHILE = 0.9


def problem_of(
    operation: str, image, w, stride, dilation, groups: int, fused: bool, rows: int, columns: int, depth: int
) -> Problem:
    """The problem of a call; `image` is the layer's input or its gradient, the last three the GEMM's."""
    kernel = tuple(w.shape[2:])
    return Problem(
        operation, w.shape[1] * groups, w.shape[0], kernel[0] * kernel[1], groups, w.dtype,
        image.shape[0] * image.shape[2] * image.shape[3], rows, columns, max(1, depth),
        variant=geometry_variant(stride, dilation, kernel) + ("-fused" if fused else ""),
    )  # fmt: skip


def zones_pay(branch, batch: int, pixels: int, block_m: int) -> bool:
    """True if tiles over zones compute fewer taps, by enough, than tiles over all pixels."""
    dense = triton.cdiv(pixels, block_m) * block_m * branch.kernel[0] * branch.kernel[1]
    return executed_taps(branch, batch, block_m) <= _WORTHWHILE * dense


def conv2d_forward(
    images: Sequence[torch.Tensor], w, bias, scale, shift, residual, out, stride, padding, dilation, groups,
    activation, negative_slope, operation: str = "conv2d_forward",
) -> Callable[..., None]:  # fmt: skip
    """out = act(scale * (conv(cat(images, 1), w) + bias) + shift + residual).

    images: one to four [N, CI_i, H, W], residual and out [N, CO, OH, OW]: any strides with a channel stride
    of 1; several only with one group. w [CO, CI/groups, KH, KW] dense in channels_last, or 1x1 with rows at
    any distance. bias, scale, shift [CO] dense.

    Returns a function of (images, w, bias, scale, shift, residual, out), of others laid out alike.
    """
    options = (stride, padding, dilation, groups, activation, negative_slope, operation)
    key = ("conv2d_forward", layout_key(w, bias, scale, shift, residual, out, *images), w.device, options,
           dot_precision(w.dtype))  # fmt: skip

    def make() -> Callable[..., None]:
        x = images[0]
        channels = sum([t.shape[1] for t in images])
        fused = any([t is not None for t in (scale, shift, residual, activation)])
        branch = branch_of(x.shape[2:], out.shape[2:], w.shape[2:], stride, padding, dilation)
        batch, pixels = x.shape[0], out.shape[0] * out.shape[2] * out.shape[3]
        depth = useful_taps(branch, batch) * channels // groups // pixels
        problem = problem_of(
            operation, x, w, stride, dilation, groups, fused, pixels, out.shape[1] // groups, depth
        )
        tile = choose_tile(problem, x.device)
        # A zone's step is one tap: few channels would fill little of it.
        zoned = len(images) == 1 and groups == 1 and channels >= tile.block_k
        zoned = zoned and w.is_contiguous(memory_format=torch.channels_last)
        if zoned and zones_pay(branch, batch, pixels, tile.block_m):
            launch = make_dilated(
                x, [branch], out.shape[1], residual, out, stride, tile, False, activation, negative_slope
            )
            return lambda images, w, *rest: launch(images[0], (w,), *rest)
        return make_dense(
            images, w, residual, out, stride, padding, dilation, groups, tile, activation, negative_slope
        )

    launch = launch_for(key, make)
    launch(images, w, bias, scale, shift, residual, out)
    return launch
