"""Splat, blur and slice of rows of C channels."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from .._device import processors
from .._launch import Launch, launch_for, layout_key
from .._tiles import Problem, Tile, choose_tile, register_candidates
from .lattice_build import Permutohedral

OPERATION = "permutohedral_filter"


@triton.jit
def _chunk(chunk, ok, row_ptr, CONTRIBUTIONS, CHUNKS, CHUNK: tl.constexpr):
    """The first contribution of a chunk, the one after its last, and the one after its image's last.

    Also the vertex at its start, and whether the chunk before has contributions to that too.
    """
    start = chunk // CHUNKS * CONTRIBUTIONS
    at = start + chunk % CHUNKS * CHUNK
    stop = start + CONTRIBUTIONS
    row = tl.load(row_ptr + at, mask=ok, other=0)
    entered = ok & (row == tl.load(row_ptr + at - 1, mask=ok & (at > start), other=-1))
    return at, tl.where(ok, tl.minimum(at + CHUNK, stop), at), stop, row, entered


@triton.jit
def _permutohedral_splat_kernel(
    values_ptr, before_ptr, row_ptr, point_ptr, share_ptr, table_ptr, partials_ptr,
    CONTRIBUTIONS, CHUNKS, ALL_CHUNKS,
    C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A lane adds up the contributions of a chunk of an image, and where the vertex changes writes its sum:
    # to the table if it is whole, else to partials [chunks, 2, C]: of the vertex that the chunk before had
    # too, of the one that the next has too.
    lane = tl.arange(0, BLOCK)
    c = lane % C
    chunk = tl.program_id(0) * ROWS + lane // C
    ok = (lane < ROWS * C) & (chunk < ALL_CHUNKS)
    at, end, stop, row, entered = _chunk(chunk, ok, row_ptr, CONTRIBUTIONS, CHUNKS, CHUNK)
    partials_ptr += chunk.to(tl.int64) * (2 * C) + c
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, CHUNK, STEP, num_stages=1):
        # All loads come before the stores, which they would wait for.
        terms = ()
        following = ()
        for i in tl.static_range(STEP):
            inside = at + i < end
            point = tl.load(point_ptr + at + i, mask=inside, other=0)
            factor = tl.load(share_ptr + at + i, mask=inside, other=0.0)
            if before_ptr is not None:
                factor *= tl.load(before_ptr + point, mask=inside, other=0.0)
            value = tl.load(values_ptr + point.to(tl.int64) * C + c, mask=inside, other=0.0)
            terms = terms + (factor * value,)
            following = following + (
                tl.load(row_ptr + at + i + 1, mask=inside & (at + i + 1 < stop), other=-1),
            )
        for i in tl.static_range(STEP):
            inside = at + i < end
            total += terms[i]
            whole = following[i] != row
            target = tl.where(whole, table_ptr + row.to(tl.int64) * C + c, partials_ptr + C)
            target = tl.where(entered, partials_ptr, target)
            tl.store(target, total, mask=inside & (whole | (at + i + 1 == end)))
            total = tl.where(whole, 0.0, total)
            entered &= ~whole
            row = following[i]
        at += STEP


@triton.jit
def _permutohedral_join_kernel(
    row_ptr, first_ptr, partials_ptr, table_ptr,
    CONTRIBUTIONS, CHUNKS, ALL_CHUNKS,
    C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Where a vertex has contributions in several chunks, the lanes of the last add them up in order.
    lane = tl.arange(0, BLOCK)
    c = lane % C
    chunk = tl.program_id(0) * ROWS + lane // C
    ok = (lane < ROWS * C) & (chunk < ALL_CHUNKS)
    _, end, stop, row, entered = _chunk(chunk, ok, row_ptr, CONTRIBUTIONS, CHUNKS, CHUNK)
    last = entered & (row != tl.load(row_ptr + end, mask=entered & (end < stop), other=-1))
    begin = tl.load(first_ptr + row, mask=last, other=0)
    image = chunk // CHUNKS
    part = tl.where(last, image * CHUNKS + (begin - image * CONTRIBUTIONS) // CHUNK, chunk)
    total = tl.load(partials_ptr + part.to(tl.int64) * (2 * C) + C + c, mask=last, other=0.0)
    for _ in tl.range(0, tl.max(chunk - part, 0), STEP, num_stages=1):
        terms = ()
        for i in tl.static_range(1, STEP + 1):
            pointer = partials_ptr + (part + i).to(tl.int64) * (2 * C) + c
            terms = terms + (tl.load(pointer, mask=part + i <= chunk, other=0.0),)
        for i in tl.static_range(STEP):
            total += terms[i]
        part += STEP
    tl.store(table_ptr + row.to(tl.int64) * C + c, total, mask=last)


@triton.jit
def _permutohedral_blur_kernel(
    table_ptr, neighbors_ptr, count_ptr, out_ptr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    lane = tl.arange(0, BLOCK)
    c = lane % C
    count = tl.load(count_ptr)
    for start in tl.range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS, num_stages=1):
        row = (start + lane // C).to(tl.int64)
        ok = (lane < ROWS * C) & (row < count)
        after = tl.load(neighbors_ptr + row * 2, mask=ok, other=-1)
        before = tl.load(neighbors_ptr + row * 2 + 1, mask=ok, other=-1)
        total = tl.load(table_ptr + row * C + c, mask=ok, other=0.0)
        total += 0.5 * tl.load(table_ptr + after.to(tl.int64) * C + c, mask=after >= 0, other=0.0)
        total += 0.5 * tl.load(table_ptr + before.to(tl.int64) * C + c, mask=before >= 0, other=0.0)
        tl.store(out_ptr + row * C + c, total, mask=ok)


@triton.jit
def _permutohedral_slice_kernel(
    table_ptr, vertex_ptr, weights_ptr, after_ptr, out_ptr,
    POINTS, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    c = lane % C
    point = tl.program_id(0).to(tl.int64) * ROWS + lane // C
    ok = (lane < ROWS * C) & (point < POINTS)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(D + 1):
        row = tl.load(vertex_ptr + point * (D + 1) + i, mask=ok, other=0)
        weight = tl.load(weights_ptr + point * (D + 1) + i, mask=ok, other=0.0)
        total += weight * tl.load(table_ptr + row.to(tl.int64) * C + c, mask=ok, other=0.0)
    if after_ptr is not None:
        total *= tl.load(after_ptr + point, mask=ok, other=0.0)
    tl.store(out_ptr + point * C + c, total, mask=ok)


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    # Lanes of a program, contributions of a chunk.
    found = ((256, 32, 4), (512, 32, 4), (256, 64, 4), (256, 16, 4), (512, 32, 8))
    return [Tile(lanes, chunk, 1, warps, 1) for lanes, chunk, warps in found]


register_candidates(OPERATION, _candidates)


def _tile(lattice: Permutohedral, channels: int) -> tuple[Tile, dict[str, int]]:
    """The tile and what follows from it: C, rows of a program, and its lanes, of which a few are idle."""
    problem = Problem(
        OPERATION, channels, channels, lattice.dim + 1, 1, torch.float32, lattice.batch * lattice.points,
        lattice.capacity, channels, lattice.dim + 1,
    )  # fmt: skip
    tile = choose_tile(problem, lattice.weights.device)
    lanes = max(tile.block_m, triton.next_power_of_2(channels))
    tile = replace(tile, block_m=lanes)
    return tile, {"C": channels, "ROWS": lanes // channels, "BLOCK": lanes}


def _splat(
    lattice: Permutohedral, values: torch.Tensor, before: torch.Tensor | None, table: torch.Tensor
) -> None:
    """table[v] = the sum over what vertex v receives of share * before * values."""

    def make() -> tuple[Launch, Launch, int]:
        tile, constants = _tile(lattice, values.shape[2])
        constants["CHUNK"] = tile.block_n
        contributions = lattice.points * (lattice.dim + 1)
        chunks = triton.cdiv(contributions, tile.block_n)
        parts = lattice.batch * chunks
        scalars = (contributions, chunks, parts)
        grid = (triton.cdiv(parts, constants["ROWS"]),)
        splat = Launch(_permutohedral_splat_kernel, grid, scalars, {**constants, "STEP": 4}, tile)
        join = Launch(_permutohedral_join_kernel, grid, scalars, {**constants, "STEP": 16}, tile)
        return splat, join, parts

    key = ("permutohedral_splat", values.device, layout_key(values, before, lattice.vertex))
    splat, join, parts = launch_for(key, make)
    partials = torch.empty((parts, 2, values.shape[2]), dtype=torch.float32, device=values.device)
    splat(values, before, lattice.row, lattice.point, lattice.share, table, partials)
    join(lattice.row, lattice.first, partials, table)


def permutohedral_blur(
    lattice: Permutohedral, values: torch.Tensor, before: torch.Tensor | None = None, reverse: bool = False
) -> torch.Tensor:
    """Splat and blur values fp32 [B, N, C] times `before` [B, N] to vertices fp32 [capacity, C], all dense.

    Splats and blurs along every axis; with `reverse` in the other order, which makes the whole filter's
    transpose. Rows past the lattice's `count` are not written.
    """
    shape = (lattice.capacity, values.shape[2])
    table, spare = (torch.empty(shape, dtype=torch.float32, device=values.device) for _ in range(2))
    _splat(lattice, values, before, table)

    def make() -> Launch:
        tile, constants = _tile(lattice, shape[1])
        programs = triton.cdiv(lattice.capacity, constants["ROWS"])
        grid = (min(programs, 32 * processors(values.device)),)
        return Launch(_permutohedral_blur_kernel, grid, (), constants, tile)

    key = ("permutohedral_blur", values.device, lattice.batch * lattice.points, layout_key(table))
    blur = launch_for(key, make)
    for neighbors in reversed(lattice.neighbors) if reverse else lattice.neighbors:
        blur(table, neighbors, lattice.count, spare)
        table, spare = spare, table
    return table


def permutohedral_slice(
    lattice: Permutohedral,
    table: torch.Tensor,
    after: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values of the points fp32 [B, N, C] from those of their vertices, times `after` [B, N]; all dense."""
    if out is None:
        shape = (lattice.batch, lattice.points, table.shape[1])
        out = torch.empty(shape, dtype=torch.float32, device=table.device)

    def make() -> Launch:
        tile, constants = _tile(lattice, table.shape[1])
        points = lattice.batch * lattice.points
        grid = (triton.cdiv(points, constants["ROWS"]),)
        return Launch(_permutohedral_slice_kernel, grid, (points,), {"D": lattice.dim, **constants}, tile)

    key = ("permutohedral_slice", table.device, layout_key(table, out, after, lattice.vertex))
    launch_for(key, make)(table, lattice.vertex, lattice.weights, after, out)
    return out
