"""Zones of an image in which the same taps meet it, and the table of work that a launch over zones reads.

A tap that lies d pixels away meets nothing but padding along d pixels of the border: at ASPP's rates most of
a 33x33 image is border for some tap. Cut where a tap begins or ends to be useful, an axis falls into at most
2 * kernel - 1 pieces; in a zone, a piece of the height times one of the width, no tap is wasted.
"""

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import triton


class Piece(NamedTuple):
    """`length` pixels of an axis from `start` on, which `taps` taps from `first` on meet."""

    start: int
    length: int
    first: int
    taps: int


def pieces(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Piece]:
    """The pieces of an axis of `out` results over `size` pixels."""
    # Tap k of result o reads pixel stride * o - padding + dilation * k: inside for o in [begin, end).
    begins, ends = [], []
    for k in range(kernel):
        offset = padding - dilation * k
        begins.append(min(max(-(-offset // stride), 0), out))
        ends.append(min(max(-(-(size + offset) // stride), 0), out))
    cuts = sorted({0, out, *begins, *ends})
    found = []
    for start, end in pairwise(cuts):
        inside = [k for k in range(kernel) if begins[k] <= start and end <= ends[k]]
        found.append(Piece(start, end - start, inside[0] if inside else 0, len(inside)))
    return found


class Branch(NamedTuple):
    """One convolution: its zones, and what its programs must know to find a tap."""

    heights: Sequence[Piece]
    widths: Sequence[Piece]
    kernel: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def tiles(self, batch: int, block_m: int) -> list[tuple[Piece, Piece, int]]:
        """(height, width, tiles of `block_m` pixels) of each zone."""
        return [
            (h, w, triton.cdiv(batch * h.length * w.length, block_m))
            for h in self.heights
            for w in self.widths
        ]


def executed_taps(branch: Branch, batch: int, block_m: int) -> int:
    """Taps that are computed, of all pixels of full tiles: each costs C_in * C_out multiply-adds."""
    return sum([n * block_m * h.taps * w.taps for h, w, n in branch.tiles(batch, block_m)])


def useful_taps(branch: Branch, batch: int) -> int:
    """Taps that meet the image."""
    return (
        batch
        * sum([h.length * h.taps for h in branch.heights])
        * sum([w.length * w.taps for w in branch.widths])
    )


# Columns of the table of work, in the order the kernel reads them.
FIELDS = 19
# What an item costs beyond its steps, in steps: its epilogue and the filling of the pipeline.
_EPILOGUE = 6


def work_table(
    branches: Sequence[Branch],
    batch: int,
    blocks_k: int,
    tiles_n: int,
    block_m: int,
    split: int,
    programs: int,
) -> tuple[list[list[int]], list[int]]:
    """The items of work, and where each program's begin: a row of the table is FIELDS numbers.

    An item is a tile of pixels of one zone of one branch, a tile of channels, and one of `split` parts of the
    depth. The dearest items are dealt out first, each to the program with the least to do.
    """
    items = []
    for index, branch in enumerate(branches):
        geometry = [*branch.kernel, *branch.padding, *branch.dilation]
        for h, w, tiles in branch.tiles(batch, block_m):
            zone = [h.start, h.length, w.start, w.length, h.first, w.first, max(w.taps, 1)]
            steps = h.taps * w.taps * blocks_k
            for part in range(split):
                first, last = part * steps // split, (part + 1) * steps // split
                cost = last - first + _EPILOGUE
                for tile in range(tiles):
                    # Channels fastest: tiles of the same pixels run side by side.
                    for n in range(tiles_n):
                        items.append((cost, [index, tile, n, part, first, last, *zone, *geometry]))
    # `sorted` keeps the order of equals, so neighbors stay together.
    items = sorted(items, key=lambda item: -item[0])
    programs = min(programs, len(items))
    load = [(0, program) for program in range(programs)]
    dealt: list[list[list[int]]] = [[] for _ in range(programs)]
    for cost, row in items:
        least, program = heapq.heappop(load)
        dealt[program].append(row)
        heapq.heappush(load, (least + cost, program))
    starts = [0]
    for rows in dealt:
        starts.append(starts[-1] + len(rows))
    return [row for rows in dealt for row in rows], starts
