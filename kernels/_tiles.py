"""The tile a kernel runs with: its block sizes, warps and stages.

`choose_tile` answers with what was measured on this GPU near the problem, else with the family's heuristic;
always pruned by the shared memory the device really has.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ._device import architecture, dot_precision, gpu_slug, shared_memory_limit
from ._launch import forget_launches, separate_launches


@dataclass(frozen=True)
class Tile:
    """Tile sizes and launch options of one kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    form: str = ""  # which of its algorithms an operation runs, where it has several

    def shared_memory(self, itemsize: int) -> int:
        """Bytes the operand tiles of the software pipeline take."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages


def fit_registers(tile: Tile, accumulators: int) -> Tile:
    """`tile` with up to 8 warps, then fewer columns, until a thread holds at most so many products."""
    while tile.block_m * tile.block_n > accumulators * 32 * tile.num_warps:
        if tile.num_warps < 8:
            tile = replace(tile, num_warps=2 * tile.num_warps)
        else:
            tile = replace(tile, block_n=tile.block_n // 2)
    return tile


def operands_in_registers(itemsize: int, arch: str) -> int:
    """How tight registers are: 1 for fp32, whose layout is seldom the matrix unit's, and 1 for mma.sync."""
    return (itemsize == 4) + (arch in ("sm_80", "sm_86", "sm_89", "sm_120"))


def fit_operands(tile: Tile, itemsize: int, arch: str) -> Tile:
    """`tile` with room in its registers for operands that pass through them."""
    passes = operands_in_registers(itemsize, arch)
    if passes == 0:
        return tile
    return fit_registers(tile, 64 if passes == 1 and tile.num_warps == 8 else 32)


@dataclass(frozen=True)
class Problem:
    """A kernel's work, as far as its tile may depend on it: never on the exact image size."""

    operation: str  # "conv_transpose2d_forward"
    channels_in: int
    channels_out: int
    taps: int
    groups: int
    dtype: torch.dtype
    pixels: int  # of the whole batch, at the input's resolution
    rows: int  # the GEMM's
    columns: int
    depth: int
    variant: str = ""  # what else tells one problem from another: "-s2d1" for stride 2, dilation 1

    @property
    def bucket(self) -> str:
        """The name that what was measured is kept under."""
        prefix = stem(self.channels_in, self.channels_out, self.taps, self.groups, self.dtype, self.variant)
        return f"{prefix}{log2(self.pixels)}"


def stem(
    channels_in: int, channels_out: int, taps: int, groups: int, dtype: torch.dtype, variant: str = ""
) -> str:
    """The part of a bucket's name before log2 of the pixels."""
    name = str(dtype).removeprefix("torch.")
    return f"ci{channels_in}-co{channels_out}-t{taps}-g{groups}{variant}-{name}-p"


def geometry_variant(stride: tuple[int, int], dilation: tuple[int, int], kernel: tuple[int, int]) -> str:
    """How a problem's `variant` names its geometry: "-s2d1", "-s1x2d1-k1x9" where sides differ."""
    parts = [str(a) if a == b else f"{a}x{b}" for a, b in (stride, dilation)]
    shape = "" if kernel[0] == kernel[1] else f"-k{kernel[0]}x{kernel[1]}"
    return f"-s{parts[0]}d{parts[1]}{shape}"


def log2(n: int) -> int:
    return max(n, 1).bit_length() - 1


# Each family registers, per operation, a function (Problem, architecture) -> list of Tile, best guess
# first.
_CANDIDATES: dict[str, Callable[[Problem, str], list[Tile]]] = {}
_USES: dict[str, tuple[str, ...]] = {}
_overrides: dict[str, Tile] = {}
_asked: list[Problem] | None = None


def register_candidates(
    operation: str, function: Callable[[Problem, str], list[Tile]], uses: tuple[str, ...] = ()
) -> None:
    """`function` offers the tiles of `operation`; `uses` names other families whose kernels it may launch."""
    _CANDIDATES[operation] = function
    _USES[operation] = uses


def operations() -> list[str]:
    """Every operation that has tiles to choose."""
    return sorted(_CANDIDATES)


def candidates(problem: Problem, arch: str, shared_limit: int | None = None) -> list[Tile]:
    """The tiles worth timing for `problem`: the heuristic's choice first, none that does not fit."""
    limit = shared_limit if shared_limit is not None else math.inf
    itemsize = problem.dtype.itemsize
    found = []
    for tile in _CANDIDATES[problem.operation](problem, arch):
        while tile.shared_memory(itemsize) > limit and tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        while tile.shared_memory(itemsize) > limit and tile.block_k > 16:
            tile = replace(tile, block_k=tile.block_k // 2)
        if tile.shared_memory(itemsize) <= limit and tile not in found:
            found.append(tile)
    return found


def choose_tile(problem: Problem, device: torch.device) -> Tile:
    """The tile to run `problem` with on `device`: one measured near it, else the first guess.

    A launcher may narrow it (`fit_registers`) for what a problem does not say: alignment, a residual, gelu.
    """
    if _asked is not None:
        _asked.append(problem)
    if problem.operation in _overrides:
        return _overrides[problem.operation]
    limit = shared_memory_limit(device)
    if _measured and device.type == "cuda":
        precision = dot_precision(problem.dtype) if problem.dtype == torch.float32 else ""
        tile = measured_tile(problem, f"{gpu_slug(device)}{precision}")
        if tile is not None and tile.shared_memory(problem.dtype.itemsize) <= limit:
            return tile
    return candidates(problem, architecture(device), limit)[0]


# By GPU, operation and the part of a bucket before its pixels: tiles by log2 of the pixels.
_measured: dict[tuple[str, str, str], dict[int, Tile]] = {}


def keep_tile(gpu: str, operation: str, bucket: str, tile: Tile) -> None:
    """Run problems near `bucket` with `tile`, which was measured to be the fastest.

    On GPUs named `gpu`, where for fp32 the precision of its products follows (`dot_precision`).
    """
    prefix, _, pixels = bucket.rpartition("-p")
    _measured.setdefault((gpu, operation, prefix), {})[int(pixels)] = tile
    forget_launches()


def measured_tile(problem: Problem, gpu: str) -> Tile | None:
    """The measured tile nearest to `problem`: its pixels within a factor of four."""
    prefix, _, pixels = problem.bucket.rpartition("-p")
    known = _measured.get((gpu, problem.operation, prefix))
    if not known:
        return None
    nearest = min(known, key=lambda other: abs(other - int(pixels)))
    return known[nearest] if abs(nearest - int(pixels)) <= 2 else None


def forget_tiles() -> None:
    """Forget every tile that `keep_tile` was told of."""
    _measured.clear()
    forget_launches()


@contextlib.contextmanager
def override_tile(operation: str, tile: Tile, launches: dict | None = None) -> Iterator[None]:
    """Run `operation` with `tile` whatever was measured: for tests, proofs and those who measure.

    A dictionary `launches` keeps the launches from one time to the next, so that a repeated call is as short
    as any other.
    """
    previous = _overrides.get(operation)
    _overrides[operation] = tile
    try:
        with separate_launches(launches):
            yield
    finally:
        if previous is None:
            del _overrides[operation]
        else:
            _overrides[operation] = previous


@contextlib.contextmanager
def record_problems() -> Iterator[list[Problem]]:
    """Collect the problems a tile is chosen for: what a call consists of."""
    global _asked
    previous, _asked = _asked, []
    forget_launches()
    try:
        yield _asked
    finally:
        _asked = previous


# What kernels of several families are made with.
_SHARED_CODE = ("_epilogue.py", "_fold.py", "_launch.py", "_split.py", "_tf32.py")


@functools.cache
def source_digest(operation: str) -> str:
    """A digest of the device code behind `operation`: a proof holds for the code it was made with."""
    folder = Path(__file__).parent
    family = _CANDIDATES[operation].__module__.rpartition(".kernels.")[2].split(".")[0]
    files = [folder / name for name in _SHARED_CODE]
    for name in (family, *_USES[operation]):
        files += sorted(folder.glob(f"{name}.py")) + sorted(folder.glob(f"{name}/*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def whole_digest() -> str:
    """A digest of every file of this package: what was measured holds for the code it was measured with."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
