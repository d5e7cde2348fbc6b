"""Matrices, scratch and views of Winograd's convolution: see `_winograd.py`, which has the steps."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# oneDNN packs weights in one way for so many pixels and more, in another for fewer, and packs anew in every
# call where they do not fit.
MANY = 64
FEW = 32
# Of a thread, at most.
KEPT_BYTES = 64 << 20
KEPT_WORKSPACES = 64


def _matrix(*rows: tuple[float, ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.float64, device="cpu")


# A' evaluates the powers at the points; a row of B' has the coefficients of the polynomial with the other
# points as roots; a row of G has the powers, divided by that polynomial's value at its point.
OUTPUT64 = _matrix(
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 1 / 2, -2, 0),
    (0, 1, 1, 1 / 4, 4, 0),
    (0, 1, -1, 1 / 8, -8, 1),
)
INPUT64 = _matrix(
    (1, -1.5, -2, 1.5, 1, 0),
    (0, -1, 0.5, 2.5, 1, 0),
    (0, 1, -2.5, 0.5, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 0.5, -1, -0.5, 1, 0),
    (0, 1, -1.5, -2, 1.5, 1),
)
WEIGHT64 = _matrix(
    (1, 0, 0),
    (1 / 3, 1 / 3, 1 / 3),
    (-1 / 3, 1 / 3, -1 / 3),
    (-16 / 15, -8 / 15, -4 / 15),
    (1 / 15, -2 / 15, 4 / 15),
    (0, 0, 1),
)
with torch.inference_mode(False):
    OUTPUT, INPUT = OUTPUT64.float(), INPUT64.float()


class Sizes(NamedTuple):
    """The sizes that a workspace depends on besides its rows."""

    columns: int
    left: int
    width: int
    in_channels: int
    out_channels: int
    packed: bool
    few: bool


class Workspace:
    """Scratch for a strip of so many rows of tiles, seen as the steps read and write it."""

    def __init__(self, scratch: Callable[[int], Tensor], sizes: Sizes, rows: int) -> None:
        columns, left, width, in_channels, out_channels, packed, few = sizes
        count = rows * columns
        # Tiles beyond the strip's hold whatever is in the scratch, and nobody reads what comes of them.
        padded, image = count, (1, 1, count)
        if packed and few and count >= MANY:
            padded = -(-count // FEW) * FEW
            image = (padded // FEW, 1, FEW)
        elif packed and not few and count < MANY:
            padded, image = MANY, (1, 1, MANY)
        wide = (4 * columns + 2) * in_channels
        points, half, whole = 36 * count * in_channels, 24 * count * out_channels, 16 * count * out_channels
        product = 0 if packed else 36 * count * out_channels
        # Each step reads one and writes the other.
        needs = [max(6 * rows * wide, 36 * padded * in_channels, half), max(points, whole, product)]
        one, two = scratch(sum(needs)).split(needs)

        z = one[: 6 * rows * wide].view(rows, 6, wide)
        self.evaluated = list(z[:, :, left * in_channels : (left + width) * in_channels])
        self.borders = [z[:, :, : left * in_channels], z[:, :, (left + width) * in_channels :]]
        if packed:
            self.pixels = one[: 36 * padded * in_channels].view(*image, -1).permute(0, 3, 1, 2)
            self.product_shape = (padded, 6, 6 * out_channels)
            self.overlapping = z.as_strided(
                (rows, columns, 6, 6, in_channels),
                (6 * wide, 4 * in_channels, in_channels, wide, 1),
                z.storage_offset(),
            )
            shapes = (count, 6, -1), (4 * count, 6, -1), (4 * count, 4, -1)
            order, axes = (rows, columns, 4, 4, out_channels), (0, 3, 1, 2, 4)
        else:
            self.points_by = one[:points].view(36, count, in_channels)
            self.product = two[:product].view(36, count, out_channels)
            self.product_shape = (1, 6, 6 * count * out_channels)
            self.overlapping = z.as_strided(
                (6, 6, rows, columns, in_channels),
                (in_channels, wide, 6 * wide, 4 * in_channels, 1),
                z.storage_offset(),
            )
            shapes = (1, 6, -1), (4, 6, -1), (4, 4, -1)
            order, axes = (4, 4, rows, columns, out_channels), (2, 1, 3, 0, 4)
        self.gathered = two[:points].view(self.overlapping.shape)
        self.gathered_rows = two[:points].view(shapes[0])
        self.points = one[:points].view(shapes[0])
        self.half = one[:half].view(shapes[0][0], 4, -1)
        self.half_rows = one[:half].view(shapes[1])
        self.whole = two[:whole].view(shapes[2])
        self.tiles = two[:whole].view(order).permute(axes)  # [row, 4, column, 4, K]
        self.to_points = INPUT.expand(shapes[0][0], 6, 6)
        self.from_points = OUTPUT.expand(shapes[0][0], 4, 6)
        self.from_half = OUTPUT.expand(shapes[1][0], 4, 6)


class Scratch:
    """One thread's scratch: memory that its strips share, and the workspaces made in it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.float32, device="cpu")
        self.workspaces: dict[tuple[Sizes, int], Workspace] = {}

    def workspace(self, sizes: Sizes, rows: int) -> Workspace:
        key = (sizes, rows)
        found = self.workspaces.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = Workspace(self._take, sizes, rows)
            if len(self.workspaces) >= KEPT_WORKSPACES:
                self.workspaces.clear()
            if found.overlapping.untyped_storage().nbytes() <= KEPT_BYTES:
                self.workspaces[key] = found
        return found

    def _take(self, numel: int) -> Tensor:
        if numel > self.memory.numel():
            grown = torch.empty(numel, dtype=torch.float32, device="cpu")
            if grown.nbytes > KEPT_BYTES:
                return grown
            self.workspaces.clear()
            self.memory = grown
        return self.memory[:numel]


class _Kept(threading.local):
    """State of a calling thread: scratch for each thread of its team."""

    def __init__(self) -> None:
        self.scratches: list[Scratch] = []


_kept = _Kept()


def scratches(threads: int) -> list[Scratch]:
    """Scratch for so many threads of the caller's team, kept for its next call."""
    kept = _kept.scratches
    while len(kept) < threads:
        kept.append(Scratch())
    return kept
