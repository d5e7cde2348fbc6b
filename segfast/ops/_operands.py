"""Arguments and results of every convolution family: pairs, empty images, the kernels' own."""

import functools
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]


def pair(value: Any, name: str) -> Pair:
    """An int or a sequence of one or two ints as a pair."""
    if type(value) is tuple and len(value) == 2:
        return value
    if isinstance(value, int):
        return (value, value)
    values = tuple(value)
    if len(values) == 1:
        return values * 2
    if len(values) != 2:
        raise RuntimeError(f"{name} must be an int or two ints, got {value!r}")
    return values


@functools.cache
def load_kernels():
    """`segfast.kernels`, imported at the first use: triton costs a CPU program nothing."""
    from segfast import kernels  # which needs triton

    return kernels


def empty(shape, like: Tensor, memory_format=torch.channels_last) -> Tensor:
    """An unwritten [N, C, H, W] of `like`'s dtype on its device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def kernel_output(shape, like: Tensor, memory_format) -> Tensor:
    """An empty output of `memory_format` if its channels lie side by side there, else in channels_last.

    With one channel, or one pixel, both formats have the same order in memory and differ in their strides.
    """
    side_by_side = shape[1] == 1 or (shape[2] == 1 and shape[3] == 1)
    return empty(shape, like, memory_format if side_by_side else torch.channels_last)
