"""Geometry on the host. Folding: where pixels lie side by side, a row of them is one run of addresses.

21 classes are 42 bytes a pixel, which leaves accesses of 2 bytes. The pixels of a row of phases, or of taps,
together are `8 * 21` or `16 * 21` elements: 8 or 16 bytes at a time, and no division by 21 in an address.
"""

import math

import torch


def can_fold(channels: int, groups: int, dilation, *images: torch.Tensor | None) -> bool:
    """True if images [N, channels, H, W] can be folded, and their channels allow no 16-byte accesses."""
    if groups != 1 or dilation[1] != 1:
        return False
    present = [t for t in images if t is not None]
    odd = channels * present[0].element_size() % 16 != 0
    return odd and all(t.stride(3) == channels for t in present)


def fold_alignment(channels: int, stride, padding, *images: torch.Tensor | None) -> int:
    """The power of two, at most 16, that divides the offset of every run and the length of a row."""
    present = [t for t in images if t is not None]
    parts = [t.stride(axis) for t in present for axis in (0, 2)]
    return math.gcd(16, *parts, *(n * channels for n in (stride[1], padding[1], present[0].shape[3])))


def taps_inside(size, out_size, kernel, stride, padding, dilation) -> bool:
    """True if every tap of every input pixel falls on an output pixel, so that no mask is needed."""
    return all(
        p == 0 and (n - 1) * s + d * (k - 1) < out
        for n, out, k, s, p, d in zip(size, out_size, kernel, stride, padding, dilation, strict=True)
    )
