"""The one place that reasons about strides. Called only inside registered implementations and fakes.

A stride asked for inside an autograd Function would be wrong under vmap, and would break it.
"""

import torch
from torch import Tensor


def is_channels_last(t: Tensor) -> bool:
    """True if the strides of [N, C, H, W] say channels_last and nothing else: torch's own rule."""
    if t.dim() != 4:
        return False
    sizes, strides = t.shape, t.stride()
    if strides[1] == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        size, stride = sizes[axis], strides[axis]
        if size == 0 or stride < least:
            return False
        # [N, 1, 1, 1] and the like fit both formats.
        if axis == 0 and least == strides[1]:
            return False
        least = stride * size if size > 1 else stride
    return True


def output_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's result: channels_last if input or weight is, as torch has it."""
    return (
        torch.channels_last
        if is_channels_last(input) or is_channels_last(weight)
        else torch.contiguous_format
    )


def in_format(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """[N, C, H, W] `t` with exactly `memory_format`'s strides.

    `contiguous` leaves those of sizes 1 as they are.
    """
    t = t.contiguous(memory_format=memory_format)
    _, channels, height, width = t.shape
    if memory_format == torch.channels_last:
        strides = (height * width * channels, 1, width * channels, channels)
    else:
        strides = (channels * height * width, height * width, width, 1)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def channels_innermost(t: Tensor) -> Tensor:
    """`t` itself if its channels lie side by side, whatever its other strides; else a channels_last copy."""
    if t.stride(1) == 1 or t.shape[1] == 1:
        return t
    return t.contiguous(memory_format=torch.channels_last)


def packed_weight(weight: Tensor) -> Tensor:
    """The weight dense in channels_last, `[first, KH, KW, second]` in memory: free if it is already so."""
    return weight.contiguous(memory_format=torch.channels_last)


def row_weight(weight: Tensor) -> Tensor:
    """The weight as rows of `[KH, KW, second]`, at any distance where it is 1x1: some columns of a matrix."""
    if weight.shape[2] == weight.shape[3] == 1 and weight.stride(1) == 1 and weight.stride(0) > 0:
        return weight
    return packed_weight(weight)


def fit_vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    """Numbers of the channels as kernels take them: themselves if they fit, else copies."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def fit_epilogue(
    bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, *residual: Tensor | None
) -> list[Tensor | None]:
    """An epilogue's operands as kernels take them: themselves if they fit, else copies."""
    images = [None if t is None else channels_innermost(t) for t in residual]
    return [*fit_vectors(bias, scale, shift), *images]
