"""Max pooling of 2x2 windows that keeps 2 bits of each, and the unpooling that reads them.

A window's place, 0 to 3, is that of its largest pixel, row by row: 2 row + column. A byte holds those of four
channels side by side, `places[n, c // 4, oh, ow] >> 2 * (c % 4) & 3`. A program takes BLOCK_M windows and
BLOCK_N channels: it reads or writes the four pixels of each window. Images and places are channels_last in
memory. Sides may be odd: of a window at the border some pixels are missing, and pixels may be in no window.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._launch import Launch, image_strides, launch_for, layout_key, pixel_alignment
from ._tiles import Problem, Tile, choose_tile, register_candidates


@triton.jit
def _block(pid, WIDTH, HEIGHT, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's windows, their images, rows and columns among HEIGHT x WIDTH, and its first channel."""
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    window = (pid // CHANNEL_BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = window // WIDTH
    return window, row // HEIGHT, row % HEIGHT, window % WIDTH, pid % CHANNEL_BLOCKS * BLOCK_N


@triton.jit
def _pixel(n, h, w, there, stride_xn, stride_xh, stride_xw, ALIGN: tl.constexpr):
    """Offsets of pixels; 0 of those that are not there, which ALIGN says nothing of."""
    return tl.multiple_of(tl.where(there, n * stride_xn + h * stride_xh + w * stride_xw, 0), ALIGN)


@triton.jit
def _load_places(places_ptr, window, ok, first, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):  # fmt: skip
    """The places [BLOCK_M, BLOCK_N] of some windows; 0 where `ok` says that there are none."""
    BYTES: tl.constexpr = (CHANNELS + 3) // 4
    byte = first // 4 + tl.arange(0, BLOCK_N // 4)
    mask = ok[:, None] & (byte < BYTES)[None, :]
    packed = tl.load(places_ptr + (window * BYTES)[:, None] + byte[None, :], mask=mask, other=0).to(tl.int32)
    places = (packed[:, :, None] >> (2 * tl.arange(0, 4))[None, None, :]) & 3
    return tl.reshape(places, (BLOCK_M, BLOCK_N))


@triton.jit
def _packed_max_pool2d_kernel(
    x_ptr, y_ptr, places_ptr, WINDOWS, H, W, OH, OW, stride_xn, stride_xh, stride_xw,
    CHANNELS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    window, n, oh, ow, first = _block(tl.program_id(0), OW, OH, CHANNELS, BLOCK_M, BLOCK_N)
    c = first + tl.arange(0, BLOCK_N)
    ok = (window < WINDOWS)[:, None] & (c < CHANNELS)[None, :]
    largest = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for position in tl.static_range(4):
        h, w = 2 * oh + position // 2, 2 * ow + position % 2
        there = (window < WINDOWS) & (h < H) & (w < W)
        pixel = _pixel(n, h, w, there, stride_xn, stride_xh, stride_xw, ALIGN)
        mask = ok & there[:, None]
        value = tl.load(x_ptr + pixel[:, None] + c[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        # As ATen: of equal ones the first, and NaN, the last one, above all.
        larger = (value > largest) | (value != value)
        largest = tl.where(larger, value, largest)
        place = tl.where(larger, position, place)
    y = y_ptr + (window * CHANNELS)[:, None] + c[None, :]
    tl.store(y, largest.to(y_ptr.dtype.element_ty), mask=ok)
    BYTES: tl.constexpr = (CHANNELS + 3) // 4
    places = tl.reshape(place, (BLOCK_M, BLOCK_N // 4, 4))
    packed = tl.sum(places << (2 * tl.arange(0, 4))[None, None, :], 2)
    byte = first // 4 + tl.arange(0, BLOCK_N // 4)
    mask = (window < WINDOWS)[:, None] & (byte < BYTES)[None, :]
    tl.store(places_ptr + (window * BYTES)[:, None] + byte[None, :], packed.to(tl.uint8), mask=mask)


@triton.jit
def _packed_max_unpool2d_kernel(
    x_ptr, places_ptr, y_ptr, WINDOWS, H, W, OH, OW, ROWS, COLUMNS, stride_xn, stride_xh, stride_xw,
    CHANNELS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # ROWS x COLUMNS windows cover the output; those past OH x OW have no pixel of x, and are zero.
    window, n, oh, ow, first = _block(tl.program_id(0), COLUMNS, ROWS, CHANNELS, BLOCK_M, BLOCK_N)
    c = first + tl.arange(0, BLOCK_N)
    ok = (window < WINDOWS)[:, None] & (c < CHANNELS)[None, :]
    given = (window < WINDOWS) & (oh < OH) & (ow < OW)
    pixel = _pixel(n, oh, ow, given, stride_xn, stride_xh, stride_xw, ALIGN)
    value = tl.load(x_ptr + pixel[:, None] + c[None, :], mask=ok & given[:, None], other=0.0)
    place = _load_places(places_ptr, (n * OH + oh) * OW + ow, given, first, CHANNELS, BLOCK_M, BLOCK_N)
    for position in tl.static_range(4):
        h, w = 2 * oh + position // 2, 2 * ow + position % 2
        inside = ok & ((h < H) & (w < W))[:, None]
        y = y_ptr + (((n * H + h) * W + w) * CHANNELS)[:, None] + c[None, :]
        tl.store(y, tl.where(place == position, value, 0.0).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _packed_max_unpool2d_backward_kernel(
    x_ptr, places_ptr, y_ptr, WINDOWS, H, W, OH, OW, stride_xn, stride_xh, stride_xw,
    CHANNELS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    window, n, oh, ow, first = _block(tl.program_id(0), OW, OH, CHANNELS, BLOCK_M, BLOCK_N)
    c = first + tl.arange(0, BLOCK_N)
    ok = (window < WINDOWS)[:, None] & (c < CHANNELS)[None, :]
    place = _load_places(places_ptr, window, window < WINDOWS, first, CHANNELS, BLOCK_M, BLOCK_N)
    found = tl.zeros((BLOCK_M, BLOCK_N), x_ptr.dtype.element_ty)
    for position in tl.static_range(4):
        h, w = 2 * oh + position // 2, 2 * ow + position % 2
        there = (window < WINDOWS) & (h < H) & (w < W)
        pixel = _pixel(n, h, w, there, stride_xn, stride_xh, stride_xw, ALIGN)
        value = tl.load(x_ptr + pixel[:, None] + c[None, :], mask=ok & there[:, None], other=0.0)
        found = tl.where(place == position, value, found)
    tl.store(y_ptr + (window * CHANNELS)[:, None] + c[None, :], found, mask=ok)


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    block_n = max(4, min(64, triton.next_power_of_2(problem.channels_in)))
    return [
        Tile(elements // block_n, block_n, 1, warps, 1)
        for elements, warps in ((1024, 4), (2048, 4), (2048, 8), (512, 2))
    ]


OPERATIONS = ("packed_max_pool2d", "packed_max_unpool2d", "packed_max_unpool2d_backward")
for _operation in OPERATIONS:
    register_candidates(_operation, _candidates)


def _launch(
    kernel, operation: str, x: torch.Tensor, windows: int, sizes: Sequence[int], key: tuple
) -> Launch:
    """`kernel` over so many windows of the channels of x, ready to be called."""

    def make() -> Launch:
        channels = x.shape[1]
        problem = Problem(
            operation, channels, channels, 4, 1, x.dtype, windows, rows=windows, columns=channels, depth=1
        )
        tile = choose_tile(problem, x.device)
        constants = {
            "CHANNELS": channels,
            "ALIGN": pixel_alignment(x),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        }
        grid = (triton.cdiv(windows, tile.block_m) * triton.cdiv(channels, tile.block_n),)
        return Launch(kernel, grid, (windows, *sizes, *image_strides(x)), constants, tile)

    return launch_for((operation, x.device, key), make)


def packed_max_pool2d(x: torch.Tensor, out: torch.Tensor, places: torch.Tensor) -> None:
    """out [N, C, OH, OW] = the largest of each 2x2 of x [N, C, H, W], places uint8 where in it that is.

    OH and OW are half of H and W, rounded down or up. places [N, ceil(C / 4), OH, OW]. The channels of x lie
    side by side, out and places are dense in channels_last.
    """
    (batch, _, *size), key = out.shape, layout_key(x, out, places)
    sizes = (*x.shape[2:], *size)
    launch = _launch(
        _packed_max_pool2d_kernel, OPERATIONS[0], x, batch * size[0] * size[1], sizes, key
    )  # fmt: skip
    launch(x, out, places)


def packed_max_unpool2d(x: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """out [N, C, H, W] = x [N, C, OH, OW] at its places, uint8 [N, ceil(C / 4), OH, OW], zero elsewhere.

    The channels of x lie side by side, places and out are dense in channels_last.
    """
    (batch, _, *size), key = out.shape, layout_key(x, places, out)
    windows = [(side + 1) // 2 for side in size]
    sizes = (*size, *x.shape[2:], *windows)
    launch = _launch(
        _packed_max_unpool2d_kernel, OPERATIONS[1], x, batch * windows[0] * windows[1], sizes, key
    )  # fmt: skip
    launch(x, places, out)


def packed_max_unpool2d_backward(x: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """out [N, C, OH, OW] = x [N, C, H, W] at its places, uint8 [N, ceil(C / 4), OH, OW].

    The channels of x lie side by side, places and out are dense in channels_last.
    """
    (batch, _, *size), key = out.shape, layout_key(x, places, out)
    sizes = (*x.shape[2:], *size)
    launch = _launch(
        _packed_max_unpool2d_backward_kernel, OPERATIONS[2], x, batch * size[0] * size[1], sizes, key
    )  # fmt: skip
    launch(x, places, out)
