"""Uncompressed TIFFs of any size, mapped into memory a window at a time."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._images import PERCENTILES, existing, quiet, read_image

# Pixels that are looked at together while an image's values are counted.
PIXELS_AT_ONCE = 2**20
# Of red, green and blue in thousandths of gray: ITU-R 601 luma, as `read_image`.
LUMA = (299, 587, 114)
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
UNCOMPRESSED, UNSIGNED, UPRIGHT = 1, (1,), 1
# What a TIFF calls its colors, by the channels that they have: black is zero; red, green and blue.
PHOTOMETRIC = {1: 1, 3: 2}


class _Layout(NamedTuple):
    """Where an image's values lie: `[H, W, C]` or, in planes, `[C, H, W]`, after `offset` bytes."""

    dtype: np.dtype
    offset: int
    channels: int
    height: int
    width: int
    planes: bool


class MappedImage:
    """An image in a file, `[C, H, W]`: `image[:, rows, columns]` is read when it is asked for.

    The values are those of `read_image`, float32 in [0, 1]: the percentiles that become 0 and 1 are those of
    the whole image, whose values are counted once.
    """

    def __init__(self, path: Path, layout: _Layout, channels: int) -> None:
        self.path = path
        self.shape = (channels, layout.height, layout.width)
        self._layout = layout
        self._to_gray = channels < layout.channels
        low, high = self._percentiles()
        self._low, self._span = low[:, None, None], np.where(high > low, high - low, 1)[:, None, None]

    def __getitem__(self, window: tuple[Any, slice, slice]) -> Tensor:
        levels = self._levels(*window[1:])
        values = ((levels - self._low) / self._span).clip(0, 1).astype(np.float32)
        return torch.from_numpy(values).expand(self.shape[0], -1, -1)[window[0]]

    def _levels(self, rows: slice, columns: slice) -> np.ndarray:
        """Whole numbers `[C, h, w]` of a window: the file's values, or thousandths of the gray of colors."""
        layout = self._layout
        ends = (layout.height, layout.width)
        shape = (layout.channels, *ends) if layout.planes else (*ends, layout.channels)
        # Mapped anew each time: pages that were read once would stay in the process.
        values = np.memmap(self.path, layout.dtype, "r", layout.offset, shape)
        part = (values if layout.planes else np.moveaxis(values, -1, 0))[:, rows, columns]
        if self._to_gray:
            return np.tensordot(np.array(LUMA), part.astype(np.int64), axes=1)[None]
        return part.astype(layout.dtype.newbyteorder("="))

    def _percentiles(self) -> np.ndarray:
        """float64 `[2, C]`, interpolated between the two values next to each."""
        most = 1 + (sum(LUMA) if self._to_gray else 1) * np.iinfo(self._layout.dtype).max
        counts = np.zeros((1 if self._to_gray else self._layout.channels, most), np.int64)
        for rows in self._strips():
            for count, plane in zip(counts, self._levels(rows, slice(None)), strict=True):
                count += np.bincount(plane.ravel(), minlength=most)
        below = counts.cumsum(1)
        places = np.array(PERCENTILES) / 100 * (self._layout.height * self._layout.width - 1)
        first, second = (
            np.array([np.searchsorted(b, ends, side="right") for b in below]).T
            for ends in (np.floor(places), np.ceil(places))
        )
        return first + (second - first) * (places % 1)[:, None]

    def _strips(self) -> Iterator[slice]:
        step = max(1, PIXELS_AT_ONCE // self._layout.width)
        for top in range(0, self._layout.height, step):
            yield slice(top, min(top + step, self._layout.height))


def open_image(path: str | os.PathLike, channels: int = 1) -> MappedImage | Tensor:
    """An image as `read_image` reads it; of an uncompressed TIFF windows only, in memory that they decide.

    Mapped are TIFFs of one page, 8 or 16 bits, gray or color, neither compressed nor in tiles; 16 bits of
    color not for a network that takes gray. All others are read whole.

    Raises:
        UserError: as `read_image`.
    """
    path = existing(path)
    layout = _layout(path)
    if layout is not None:
        if channels == layout.channels or layout.channels == 1:
            return MappedImage(path, layout, channels)
        if (channels, layout.channels, layout.dtype.itemsize) == (1, 3, 1):
            return MappedImage(path, layout, channels)
    return read_image(path, channels)


def _layout(path: Path) -> _Layout | None:
    """That of a file which can be mapped; of others None, for the reader of those to tell what is wrong."""
    try:
        from PIL.TiffImagePlugin import ImageFileDirectory_v2
    except ImportError:
        return None
    try:
        with quiet(), path.open("rb") as file:
            head = file.read(8)
            if head[:4] not in TIFF_HEADS:
                return None
            head += file.read(8) if b"+" in head[2:4] else b""  # BigTIFF
            tags = ImageFileDirectory_v2(head)
            file.seek(tags.next)
            tags.load(file)
        return _mappable(tags, path.stat().st_size, head[:2])
    except (OSError, ValueError, TypeError, KeyError, SyntaxError, struct.error):  # of damaged files
        return None


def _mappable(tags: Any, size: int, order: bytes) -> _Layout | None:
    channels, bits = tags.get(277, 1), set(tags[258])
    plain = (
        tags.next == 0  # the only page
        and tags.get(259, UNCOMPRESSED) == UNCOMPRESSED
        and set(tags.get(339, UNSIGNED)) == set(UNSIGNED)
        and tags.get(274, UPRIGHT) == UPRIGHT
        and PHOTOMETRIC.get(channels) == tags[262]
        and bits <= {8, 16}
        and len(bits) == 1
    )
    if not plain:
        return None
    dtype = np.dtype(f"{'<' if order == b'II' else '>'}u{bits.pop() // 8}")
    height, width = tags[257], tags[256]
    offsets, counts = np.array(tags[273]), np.array(tags[279])
    whole = height * width * channels * dtype.itemsize
    together = (offsets[1:] == offsets[:-1] + counts[:-1]).all() and counts.sum() == whole
    if not (together and whole and offsets[0] + whole <= size):
        return None
    return _Layout(dtype, int(offsets[0]), channels, height, width, tags.get(284, 1) == 2)
