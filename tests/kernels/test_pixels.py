"""A pixel's place without a division: right for every number and every size that fit 31 bits."""

import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from segfast import kernels
from segfast.kernels._pixels import _pixel, _quotient, reciprocal

MOST = 2**31 - 1
POWERS = [2**k for k in range(2, 31)]
DIVISORS = [*range(1, 4), *[p + d for p in POWERS for d in (-1, 0, 1)], 641, 6700417, MOST - 1, MOST]
CONVOLUTIONS = ("conv2d", "conv_transpose2d", "separable_conv2d")


@triton.jit
def _quotient_kernel(number_ptr, out_ptr, divisor, reciprocal, WIDE: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    number = tl.load(number_ptr + i)
    if WIDE:
        number = number.to(tl.int64)
    tl.store(out_ptr + i, _quotient(number, divisor, reciprocal))


@triton.jit
def _pixel_kernel(out_ptr, height, width, reciprocal_h, reciprocal_w, N: tl.constexpr):
    m = tl.arange(0, N)
    n, h, w = _pixel(m, height, width, reciprocal_h, reciprocal_w)
    tl.store(out_ptr + m, n)
    tl.store(out_ptr + N + m, h)
    tl.store(out_ptr + 2 * N + m, w)


def worst_numbers(divisor):
    """Numbers on both sides of multiples of `divisor`; all others lie between, as do their quotients."""
    last = MOST // divisor
    multiples = [k * divisor for k in (0, 1, 2, 3, last // 2, last - 1, last)]
    near = [m + d for m in multiples for d in (-1, 0)] + [MOST - 1, MOST]
    return sorted({n for n in near if 0 <= n <= MOST})


def check_quotients(device):
    """Divide the worst numbers by all DIVISORS on `device`, and find the places of small images' pixels."""
    for divisor in DIVISORS:
        numbers = torch.tensor((worst_numbers(divisor) + [0] * 16)[:16], dtype=torch.int32, device=device)
        for wide in (False, True):
            found = torch.empty_like(numbers)
            _quotient_kernel[(1,)](numbers, found, divisor, reciprocal(divisor), wide, 16)
            assert torch.equal(found, numbers // divisor), (divisor, wide)
    for height, width in [(1, 1), (1, 7), (5, 1), (16, 16), (3, 11)]:
        out = torch.empty((3, 256), dtype=torch.int32, device=device)
        _pixel_kernel[(1,)](out, height, width, reciprocal(height), reciprocal(width), 256)
        index = torch.arange(256, device=device)
        place = (index // (height * width), index // width % height, index % width)
        assert torch.equal(out.long(), torch.stack(place)), (height, width)


@pytest.mark.interpreter
def test_quotients_are_exact():
    check_quotients("cpu")


def test_every_number_below_2_to_31_has_its_quotient():
    """In Python's own integers, at the numbers where a quotient that is off shows first."""
    for divisor in [*range(1, 5000), *DIVISORS]:
        factor, shift = divmod(reciprocal(divisor), 64)
        assert 2**31 <= factor < 2**32
        assert 0 <= shift < 32
        for number in worst_numbers(divisor):
            assert (number + 1) * factor >> 32 + shift == number // divisor, (number, divisor)


def test_reciprocals_are_passed_as_the_same_type_whatever_the_size():
    """A kernel is compiled anew where an integer becomes int64, or 1."""
    assert all(2**31 <= reciprocal(divisor) < 2**63 for divisor in DIVISORS)


def test_no_convolution_divides_a_pixels_number_by_the_size_of_an_image():
    """Sizes that a launcher knows, in capitals; those of a zone only the program knows."""
    folder = Path(kernels.__file__).parent
    for path in [path for family in CONVOLUTIONS for path in (folder / family).glob("*.py")]:
        assert not re.search(r"\bm (?://|%) [A-Z]", path.read_text()), path
