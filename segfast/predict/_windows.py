"""The tiles of an image: which window of it each needs, and how those that overlap are joined."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Reach(NamedTuple):
    """How far a network's output pixels look.

    The scores of a tile that starts at a multiple of `stride` depend on the image up to `margin` pixels
    around it; both are in pixels, and `margin` is a multiple of `stride`. With `rounded`, this is so of
    images whose sides are multiples of `stride` only, to which others are mirrored. With `shrinks`, the
    network is an unpadded U-Net: its output lacks the margin, for which the image is mirrored.
    """

    margin: int
    stride: int
    rounded: bool = False
    shrinks: bool = False


class Tile(NamedTuple):
    """Scores `[K, h, w]`, on the network's device, and the h rows and w columns of the image they are of."""

    rows: slice
    columns: slice
    scores: Tensor


class _Span(NamedTuple):
    """Along one side: the window that the network sees, and where in its output the tile begins."""

    start: int
    stop: int
    offset: int


def tiles(
    run: Callable[[Tensor], Tensor], image: Any, tile: int, overlap: int, reach: Reach
) -> Iterator[Tile]:
    """The image's scores, tile by tile, from left to right and from top to bottom, each pixel once.

    Args:
        run: images `[1, C, h, w]` -> scores `[1, K, h, w]`, smaller by twice the margin if the reach shrinks.
        image: `[C, H, W]`, a tensor, an array or what has a shape and gives either for slices.
        tile: side of a tile, a multiple of the stride or as large as the image.
        overlap: pixels that neighbors share, at most half a tile. There one's scores fade out along a cosine
            while the other's fade in. Of overlaps scores of as many rows of the image stay in memory.
        reach: of the scores.
    """
    height, width = image.shape[1:]
    step = tile - overlap
    tops = range(0, max(1, height - overlap), step)
    lefts = range(0, max(1, width - overlap), step)
    below: Tensor | None = None
    for top in tops:
        bottom = height if top == tops[-1] else top + tile
        beside: Tensor | None = None
        for left in lefts:
            right = width if left == lefts[-1] else left + tile
            part = _scores(run, image, (top, bottom), (left, right), reach)
            if overlap:
                part = part * _fading(bottom - top, overlap, top > 0, bottom < height, part)[:, None]
                part = part * _fading(right - left, overlap, left > 0, right < width, part)
                if beside is not None:
                    part[..., :overlap] += beside
                if right < width:
                    beside, part = part[..., -overlap:].clone(), part[..., :-overlap]
                columns = slice(left, left + part.shape[2])
                if below is None and bottom < height:
                    below = part.new_zeros(len(part), overlap, width)
                if top > 0 and below is not None:
                    part[:, :overlap] += below[..., columns]
                if bottom < height and below is not None:
                    below[..., columns] = part[:, -overlap:]
                    part = part[:, :-overlap]
            rows, columns = slice(top, top + part.shape[1]), slice(left, left + part.shape[2])
            yield Tile(rows, columns, part)


def tile_count(size: tuple[int, int], tile: int, overlap: int) -> int:
    """How many tiles an image of this height and width has."""
    return math.prod(len(range(0, max(1, side - overlap), tile - overlap)) for side in size)


def _scores(
    run: Callable[[Tensor], Tensor], image: Any, rows: tuple[int, int], columns: tuple[int, int], reach: Reach
) -> Tensor:
    down, across = (
        _span(*span, length, reach) for span, length in zip((rows, columns), image.shape[1:], strict=True)
    )
    scores = run(_window(image, down, across)[None])[0]
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    return scores[:, down.offset : down.offset + height, across.offset : across.offset + width]


def _span(start: int, stop: int, length: int, reach: Reach) -> _Span:
    if reach.shrinks:
        # Where every pooling is even, outputs are 4 and a multiple of the stride.
        extent = 4 + max(0, -(-(stop - start - 4) // reach.stride)) * reach.stride
        return _Span(start - reach.margin, start + extent + reach.margin, 0)
    end = -(-length // reach.stride) * reach.stride if reach.rounded else length
    # The last tile's part that was mirrored is its own, not a neighbor's.
    stop = end if stop == length else stop
    first = max(0, start - reach.margin)
    return _Span(first, min(end, stop + reach.margin), start - first)


def _window(image: Any, down: _Span, across: _Span) -> Tensor:
    """The pixels of a window, mirrored at the image's borders where it goes beyond."""
    rows, columns = (
        _mirrored(span, length) for span, length in zip((down, across), image.shape[1:], strict=True)
    )
    top, left = int(rows.min()), int(columns.min())
    part = image[:, top : int(rows.max()) + 1, left : int(columns.max()) + 1]
    part = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
    if len(rows) == part.shape[1] and len(columns) == part.shape[2]:
        return part
    down_to, across_to = (torch.from_numpy(at).to(part.device) for at in (rows - top, columns - left))
    return part[:, down_to][:, :, across_to]


def _mirrored(span: _Span, length: int) -> np.ndarray:
    """The pixels' positions within the image, whose border ones are repeated where it is mirrored."""
    positions = np.arange(span.start, span.stop) % (2 * length)
    return np.where(positions < length, positions, 2 * length - 1 - positions)


def _fading(length: int, overlap: int, start: bool, end: bool, like: Tensor) -> Tensor:
    """Weights of a tile's rows or columns, `[length]`, that fade in at the start and out at the end."""
    weights = like.new_ones(length)
    places = torch.arange(overlap, dtype=like.dtype, device=like.device) + 0.5
    ramp = (1 - torch.cos(places * (math.pi / overlap))) / 2
    if start:
        weights[:overlap] = ramp
    if end:
        weights[-overlap:] = 1 - ramp
    return weights
