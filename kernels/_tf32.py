"""Operands of a product in TF32, rounded to it: the matrix units drop the bits below without looking."""

import torch
import triton
import triton.language as tl

from ._device import dot_precision, interpreting


@triton.jit
def _rounded(x, TF32: tl.constexpr):
    # Adds half a unit of TF32's last place; the units then drop what lies below it. Together that rounds to
    # the nearest, ties away from zero. Dropping alone would make every product smaller. Two instructions,
    # where cvt.rna.tf32 is three.
    if TF32:
        nearest = (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), nearest, x)
    return x


def multiplies_in_tf32(dtype: torch.dtype) -> bool:
    """True if a dot of `dtype` under cuDNN's flag multiplies in TF32; the interpreter has none."""
    return dtype == torch.float32 and dot_precision(dtype) == "tf32" and not interpreting()
