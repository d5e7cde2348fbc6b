"""Which tile sizes a kernel runs with, which kernels are proven on which GPU, and what was measured there.

`choose_config` is a pure function of the problem: the user's cache, then this GPU's committed table, then a
table of the same architecture, then the family's heuristic; always pruned by the shared memory the device
really has.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from ._device import architecture, gpu_slug, interpreting, shared_memory_limit
from ._launch import forget_plans, separate_plans

_FOLDER = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Config:
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


def fit_registers(config: Config, accumulators: int) -> Config:
    """`config` with up to 8 warps, then fewer columns, until a thread holds at most so many products."""
    while config.block_m * config.block_n > accumulators * 32 * config.num_warps:
        if config.num_warps < 8:
            config = replace(config, num_warps=2 * config.num_warps)
        else:
            config = replace(config, block_n=config.block_n // 2)
    return config


def operands_in_registers(itemsize: int, arch: str) -> int:
    """How tight registers are: 1 for fp32, whose layout is seldom the matrix unit's, and 1 for mma.sync."""
    return (itemsize == 4) + (arch in ("sm_80", "sm_86", "sm_89", "sm_120"))


def fit_operands(config: Config, itemsize: int, arch: str) -> Config:
    """`config` with room in its registers for operands that pass through them."""
    passes = operands_in_registers(itemsize, arch)
    if passes == 0:
        return config
    return fit_registers(config, 64 if passes == 1 and config.num_warps == 8 else 32)


@dataclass(frozen=True)
class Problem:
    """What a configuration may depend on: never on the exact image size."""

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
        """The key of the measured tables."""
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


# Each family registers, per operation, a function (Problem, architecture) -> list of Config, best guess
# first.
_CANDIDATES: dict[str, Callable[[Problem, str], list[Config]]] = {}
_USES: dict[str, tuple[str, ...]] = {}
_overrides: dict[str, Config] = {}
_asked: list[Problem] | None = None


def register_candidates(
    operation: str, function: Callable[[Problem, str], list[Config]], uses: tuple[str, ...] = ()
) -> None:
    """`function` offers the tiles of `operation`; `uses` names other families whose kernels it may launch."""
    _CANDIDATES[operation] = function
    _USES[operation] = uses


def operations() -> list[str]:
    """Every operation that has tiles to choose."""
    return sorted(_CANDIDATES)


def candidates(problem: Problem, arch: str, shared_limit: int | None = None) -> list[Config]:
    """The configurations worth timing for `problem`: the heuristic's choice first, none that does not fit."""
    limit = shared_limit if shared_limit is not None else math.inf
    itemsize = problem.dtype.itemsize
    found = []
    for config in _CANDIDATES[problem.operation](problem, arch):
        while config.shared_memory(itemsize) > limit and config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        while config.shared_memory(itemsize) > limit and config.block_k > 16:
            config = replace(config, block_k=config.block_k // 2)
        if config.shared_memory(itemsize) <= limit and config not in found:
            found.append(config)
    return found


def choose_config(problem: Problem, device: torch.device) -> Config:
    """The configuration to run `problem` with on `device`."""
    if _asked is not None:
        _asked.append(problem)
    if problem.operation in _overrides:
        return _overrides[problem.operation]
    row = None
    if device.type == "cuda":
        row = measured(problem.operation, problem.bucket, gpu_slug(device), architecture(device))
    limit = shared_memory_limit(device)
    if row is not None:
        config = Config(**row["config"])
        if config.shared_memory(problem.dtype.itemsize) <= limit:
            return config
    arch = architecture(device)
    if device.type == "cuda" and not interpreting():
        _warn_untuned(problem.operation, arch)
    return candidates(problem, arch, limit)[0]


@functools.cache
def _warn_untuned(operation: str, arch: str) -> None:
    warnings.warn(
        f"segfast: no measured configuration for {operation} on {arch}, using a heuristic; "
        "`segfast tune` measures",
        stacklevel=2,
    )


@contextlib.contextmanager
def override_config(operation: str, config: Config, plans: dict | None = None) -> Iterator[None]:
    """Run `operation` with `config` whatever the tables say: for tests, the tuner and benchmarks.

    A dictionary `plans` keeps the launches from one time to the next, so that a repeated call is as short as
    any other.
    """
    previous = _overrides.get(operation)
    _overrides[operation] = config
    try:
        with separate_plans(plans):
            yield
    finally:
        if previous is None:
            del _overrides[operation]
        else:
            _overrides[operation] = previous


@contextlib.contextmanager
def record_problems() -> Iterator[list[Problem]]:
    """Collect the problems a configuration is chosen for: how the tuner learns what a call consists of."""
    global _asked
    previous, _asked = _asked, []
    forget_plans()
    try:
        yield _asked
    finally:
        _asked = previous


# --- measured tables and proofs
# -------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where this user's own proofs and tables are kept: `SEGFAST_CACHE`, else `$XDG_CACHE_HOME/segfast`."""
    if "SEGFAST_CACHE" in os.environ:
        return Path(os.environ["SEGFAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "segfast"


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"segfast: cannot read {path}: {error}; ignored", stacklevel=2)
        return {}


@functools.cache
def tables(slug: str, arch: str) -> list[dict]:
    """Measured tables in the order they are asked: the user's, this GPU's, others of the same architecture.

    A table is {"architecture": "sm_90", "operations": {operation: {bucket: {"config": {...}, "us": float,
    "aten_us": float}}}}; "us" and "aten_us" are medians of GPU time from the same run. A row may have
    "cudnn_relu_us" and "cudnn_graph_us" of that run, of calls that take a convolution's epilogue along, and
    "timed_as" where the times are those of another operation that launches this kernel.
    """
    found = [_read(cache_folder() / f"{slug}.json"), _read(_FOLDER / f"{slug}.json")]
    others = [_read(p) for p in sorted(_FOLDER.glob("*.json")) if p.stem not in (slug, "proven")]
    return [t for t in found + [o for o in others if o.get("architecture") == arch] if t]


def measured(operation: str, bucket: str, slug: str, arch: str) -> dict | None:
    """The measured row nearest to `bucket`: same channels, taps and dtype, pixels within a factor of four.

    A bucket that ends in "-p" leaves the pixels open; the row least favourable to our kernel is returned.
    """
    prefix, _, pixels = bucket.rpartition("-p")
    for table in tables(slug, arch):
        rows = table.get("operations", {}).get(operation, {})
        same = {key: row for key, row in rows.items() if key.rpartition("-p")[0] == prefix}
        if not pixels and same:
            return max(same.values(), key=lambda row: row["us"] / row["aten_us"])
        near = [(abs(int(key.rpartition("-p")[2]) - int(pixels)), key) for key in same] if pixels else []
        if near and min(near)[0] <= 2:
            return same[min(near)[1]]
    return None


def rows_of(operation: str, slug: str, arch: str) -> Iterator[tuple[str, dict]]:
    """Every (bucket, measured row) of an operation, of the first table that has any."""
    for table in tables(slug, arch):
        rows = table.get("operations", {}).get(operation, {})
        if rows:
            yield from rows.items()
            return


# What kernels of several families are made with.
_SHARED_CODE = ("_epilogue.py", "_fold.py", "_launch.py", "_operands.py", "_reduce.py")


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
def proven_entries(arch: str) -> frozenset[str]:
    """The "operation.dtype" pairs proven on a GPU of architecture `arch`: committed, or in the user's cache.

    A proof is {arch: {"operation.dtype": {"source": digest, "gpu": ..., "torch": ..., "triton": ..., "date":
    ...}}}; one made with other device code, or by a Triton of another minor version, does not count.
    """
    found = set()
    for path in (_FOLDER / "proven.json", cache_folder() / "proven.json"):
        for key, proof in _read(path).get(arch, {}).items():
            operation = key.rpartition(".")[0]
            if (
                operation in _CANDIDATES
                and proof.get("source") == source_digest(operation)
                and minor_version(proof.get("triton", "")) == minor_version(triton.__version__)
            ):
                found.add(key)
    return frozenset(found)


def minor_version(version: str) -> list[str]:
    """The first two numbers of "3.7.1": compilers that differ in them make different machine code."""
    return version.split(".")[:2]


def proven(operation: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `operation` in `dtype` was proven right on a GPU of this architecture."""
    return f"{operation}.{str(dtype).removeprefix('torch.')}" in proven_entries(architecture(device))


def forget_tables() -> None:
    """Read the tables and proofs anew at their next use."""
    tables.cache_clear()
    proven_entries.cache_clear()
    forget_plans()


def config_row(config: Config, us: float, aten_us: float, **rivals: float) -> dict:
    """A row of a measured table; `rivals` are what else was timed, "cudnn_relu" for instance."""
    times = {"us": us, "aten_us": aten_us, **{f"{name}_us": time for name, time in rivals.items()}}
    return {"config": asdict(config), **{name: round(time, 3) for name, time in times.items()}}
