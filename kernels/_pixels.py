"""The place of a pixel, given its number in a batch, without the division that GPUs have no instruction for.

To divide each pixel's number by the image's width and height took four tenths of the instructions of a
program of few steps. The launcher hands over reciprocals.
"""

import triton
import triton.language as tl


def reciprocal(divisor: int) -> int:
    """The int64 factor * 64 + shift by which `_quotient` divides by `divisor`, from 1 to 2**31 - 1.

    With the shift s = floor(log2(divisor)) the factor f is (2**(32 + s) - 1) // divisor, 32 bits wide, and
    number // divisor is (number + 1) * f >> (32 + s) for all numbers below 2**31: f * divisor is short of
    2**(32 + s) by e, 1 <= e <= divisor < 2**(s + 1), thus (number + 1) * f / 2**(32 + s) is short of
    (number + 1) / divisor by more than 0 and by at most 1 / divisor.
    """
    shift = divisor.bit_length() - 1
    return (2 ** (32 + shift) - 1) // divisor * 64 + shift


@triton.jit
def _quotient(number, divisor, reciprocal):
    # number // divisor of a number that is not negative; one of 64 bits is divided.
    if number.dtype == tl.int64:
        return number // divisor
    else:
        factor = (reciprocal >> 6).to(tl.uint32)
        shift = (reciprocal & 63).to(tl.uint32)
        return (tl.umulhi(number.to(tl.uint32) + 1, factor) >> shift).to(tl.int32)


@triton.jit
def _pixel(m, height, width, reciprocal_h, reciprocal_w):
    # Image, row and column of pixel m of a batch.
    row = _quotient(m, width, reciprocal_w)
    n = _quotient(row, height, reciprocal_h)
    return n, row - n * height, m - row * width
