"""`segfast compile-report`: compile every kernel for GPUs that need not be here and judge the machine code.

A row is one kernel with one tile, element type and architecture. It fails where the kernel does not compile,
registers spill, shared memory does not fit, the matrix instruction expected is missing, a store is narrower
than the channels allow, or a loop over pairs of points has too many instructions. What is compiled are
launches of the families' cases, by name (`launches` in `segfast/ops/_case.py`). With `--bounds` a second
table says what each could reach at best on an H200, modeled after its machine code (`_bounds.py`).
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from .._errors import UserError
from .._files import atomic_write
from .._table import format_table
from ..ops import FAMILIES, _case
from ._bounds import Bound, bound_of_launch, bounds_table
from ._load_model import dtype_name
from ._output import claim

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# Element types as rows name them; tf32 is float32 where cuDNN's flag allows it.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
_TENSOR_CORE = {"sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "mfma"}
HEADERS = ("arch", "dtype", "specimen", "kernel", "tile", "regs", "spill", "shared", "limit", "matrix",
           "store", "load", "async", "instr", "pair", "bar", "s", "problem")  # fmt: skip
# The matrix units' rate for a type, of that for 16 bits; fp32 is three products in TF32.
_RATES = {"tf32": 1 / 2, "fp32": 1 / 6}


@dataclasses.dataclass(frozen=True)
class Task:
    """The work of one process at a time: one case, in one type, for one architecture."""

    family: str
    arch: str
    dtype: str
    case: str
    all_candidates: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled kernel; widths in bytes, narrowest and widest."""

    arch: str
    dtype: str
    case: str
    kernel: str
    tile: str
    registers: int
    spills: int
    shared: int
    limit: int
    matrix: str
    store: tuple[int, int]
    load: tuple[int, int]
    async_copy: tuple[int, int]
    instructions: int
    per_pair: float
    barriers: int
    seconds: float
    problems: tuple[str, ...]
    bound: Bound | None = None  # on sm_90

    @classmethod
    def failed(cls, task: Task, problem: str, kernel: str = "-", tile: str = "-") -> "Row":
        """The row of what has no machine code."""
        none = (0, 0)
        return cls(task.arch, task.dtype, task.case, kernel, tile, 0, 0, 0, 0, "", none, none, none,
                   0, 0.0, 0, 0.0, (problem,))  # fmt: skip

    def cells(self) -> tuple:
        widths = (_span(self.store), _span(self.load), _span(self.async_copy))
        pair = f"{self.per_pair:.1f}" if self.per_pair else "-"
        return (self.arch, self.dtype, self.case, self.kernel, self.tile, self.registers, self.spills,
                self.shared, self.limit, self.matrix or "-", *widths, self.instructions,
                pair, self.barriers, f"{self.seconds:.1f}", "; ".join(self.problems) or "-")  # fmt: skip


def _span(widths: tuple[int, int]) -> str:
    low, high = widths
    return "-" if high == 0 else str(low) if low == high else f"{low}..{high}"


def tasks(families: Sequence[str], archs: Sequence[str], dtypes: Sequence[str],
          cases: Sequence[str] = ("",), all_candidates: bool = False) -> list[Task]:  # fmt: skip
    """The tasks whose `case` starts with one of `cases`; tf32 is NVIDIA's."""
    found = []
    for family in families:
        for dtype in dtypes:
            names = [name for name, _, _ in _cases(family, dtype) if name.startswith(tuple(cases))]
            for arch in archs:
                if dtype != "tf32" or arch.startswith("sm"):
                    found += [Task(family, arch, dtype, name, all_candidates) for name in names]
    return found


def _cases(family: str, dtype: str) -> Iterator[_case.Launch]:
    return _case.launches(family, DTYPES[dtype])


def compile_task(task: Task) -> list[Row]:
    """Record the launches of one task and compile each; an error becomes a row."""
    try:
        launches, store_bytes = _launches(task)
    except Exception as error:
        return [Row.failed(task, f"cannot be launched: {_last_line(error)}")]
    rows = []
    for launch, pointers in launches:
        try:
            rows.append(compile_launch(launch, pointers, task, store_bytes))
        except Exception as error:
            problem = f"does not compile: {_last_line(error)}"
            rows.append(Row.failed(task, problem, _kernel_name(launch, task), _tile(launch.tile)))
    return rows


def _last_line(error: Exception) -> str:
    """The kind of `error` and what it says at the end; Triton's begin with the source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _launches(task: Task) -> tuple[list[tuple], int]:
    """The launches of one task, (launch, pointers), each machine code once, and the width of their stores."""
    from ..kernels import pretend_architecture, record_launches  # which needs triton

    call, store_bytes = next(
        (c, width) for name, c, width in _cases(task.family, task.dtype) if name == task.case
    )
    launches: dict[Any, Any] = {}
    with _precision("tf32" if task.dtype == "tf32" else "ieee"), pretend_architecture(task.arch):
        for override in _overrides(call) if task.all_candidates else [contextlib.nullcontext()]:
            with override, record_launches() as recorded:
                call()
            launches.update({_compiled_as(launch): (launch, pointers) for launch, pointers in recorded})
    return list(launches.values()), store_bytes


def _compiled_as(launch) -> tuple:
    """A key of the machine code: Triton looks at which integers 16 divides, too."""
    divisible = [isinstance(scalar, int) and scalar % 16 == 0 for scalar in launch.scalars]
    return (launch.kernel.__name__, launch.tile, *launch.constants.items(), *divisible)


def _overrides(call) -> list[contextlib.AbstractContextManager]:
    """One override for each tile that the tuner would try for the operation of `call`."""
    from ..kernels import candidates, override_tile, record_launches  # which needs triton
    from ..kernels._device import architecture, shared_memory_limit  # which needs triton
    from ..kernels._tiles import record_problems  # which needs triton

    meta = torch.device("meta")
    with record_problems() as problems, record_launches():
        call()
    return [
        override_tile(problem.operation, tile)
        for problem in problems
        for tile in candidates(problem, architecture(meta), shared_memory_limit(meta))
    ]


@contextlib.contextmanager
def _precision(value: str) -> Iterator[None]:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, value
    try:
        yield
    finally:
        conv.fp32_precision = before


def compile_launch(launch, pointers, task: Task, store_bytes: int) -> Row:
    """Compile one recorded launch for `task.arch` and judge it."""
    from ..kernels import compile_offline, pretend_architecture  # which needs triton
    from ..kernels._device import shared_memory_limit  # which needs triton
    from ._machine_code import inspect  # which needs triton

    start = time.perf_counter()
    compiled = compile_offline(launch, pointers, gpu_target(task.arch))
    seconds = time.perf_counter() - start
    code = inspect(compiled)
    with pretend_architecture(task.arch):
        limit = shared_memory_limit(torch.device("meta"))
    operands = re.search(r"tt\.dot [^\n]*: tensor<[0-9x]+x(\w+)>", compiled.asm["ttir"])
    expected = expected_matrix(task, launch, operands[1]) if operands else ("",)
    # AMD's matrix layout holds four values side by side.
    least = min(store_bytes, 4 * DTYPES[task.dtype].itemsize) if task.arch.startswith("gfx") else store_bytes
    problems = []
    if code.spills:
        problems.append("spills")
    if compiled.metadata.shared > limit:
        problems.append("shared memory")
    if code.matrix not in expected:
        problems.append(f"{' or '.join(expected)} expected")
    if code.store[0] < least:
        problems.append(f"{code.store[0]}-byte store")
    per_pair = pair_instructions(launch, code)
    if task.arch == "sm_90" and per_pair > most_per_pair(launch):
        problems.append(f"{per_pair:.2f} instructions a pair")
    bound = None
    if task.arch == "sm_90":
        rate = _RATES.get(task.dtype, 1.0)
        bound = bound_of_launch(launch, pointers, compiled, _useful_flops(task), rate)
    name, tile, shared = _kernel_name(launch, task), _tile(launch.tile), compiled.metadata.shared
    return Row(task.arch, task.dtype, task.case, name, tile, code.registers, code.spills, shared, limit,
               code.matrix, code.store, code.load, code.async_copy, code.instructions,
               per_pair, code.barriers, seconds,
               tuple(problems), bound)  # fmt: skip


def _useful_flops(task: Task) -> float:
    """Of the case whose launch it is; 0 where it counts none."""
    cases = _case.cases(task.family, "compile")
    return next((case.useful_flops for case in cases if task.case.startswith(f"{case.name} ")), 0.0)


def _kernel_name(launch, task: Task) -> str:
    return launch.kernel.__name__.removeprefix("_").removesuffix("_kernel").removeprefix(f"{task.family}_")


def _tile(tile) -> str:
    text = f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
    return f"{text} {tile.form}" if tile.form else text


def pair_instructions(launch, code) -> float:
    """Instructions of a thread's main loop for a pair of points, in kernels that go over all pairs; else 0.

    Counted where the exponents are a product, not in the direct form.
    """
    if launch.constants.get("DIRECT", True):
        return 0.0
    return code.loop * 32 * launch.tile.num_warps / (launch.tile.block_m * launch.tile.block_n)


def most_per_pair(launch) -> float:
    """The bound on `pair_instructions` of the filter of up to 32 channels in two halves with 8 warps.

    On Hopper an exponential takes as long as eight other instructions, and is to set the time. For a thread's
    32 pairs of a tile Triton 3.9 spends 147 instructions where 3.7 spends 140: one more barrier with its
    fence, and four more loads from shared memory.
    """
    from ..kernels._launch import TRITON  # which needs triton

    narrow = launch.constants.get("BLOCK_C", 128) <= 64 and launch.constants.get("DEPTH") == 32
    narrow &= "BLOCK_F" not in launch.constants
    most = 4.4 if TRITON < (3, 9) else 4.6
    return most if narrow and launch.tile.num_warps == 8 else math.inf


def expected_matrix(task: Task, launch, operands: str) -> tuple[str, ...]:
    """The matrix instructions, any of which a dot of "f32" or other operands must have become."""
    newest = _TENSOR_CORE.get(task.arch, "HMMA")
    if newest in ("HGMMA", "tcgen05"):
        # Both take 64 rows at least; fp32 operands do not always lie as they need them.
        rows = launch.tile.block_n if launch.tile.form == "fused" else launch.tile.block_m
        if rows < 64:
            return ("HMMA",)
        if operands == "f32":
            return (newest, "HMMA")
    return (newest,)


def gpu_target(arch: str):
    """Triton's target for "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def compile_report(work: Sequence[Task], processes: int = 2, progress: bool = True) -> list[Row]:
    """The rows of `work`, in its order. Triton's cache makes a second run quick."""
    from tqdm import tqdm

    results = _results(work, processes)
    bar = tqdm(results, total=len(work), disable=not progress, unit="case")
    return [row for rows in bar for row in rows]


def _results(work: Sequence[Task], processes: int) -> Iterator[list[Row]]:
    """The rows of each task. A compiler that ends its process costs the task a row, and no other."""
    done = 0
    try:
        with _pool(processes) as pool:
            for rows in pool.map(compile_task, work):
                yield rows
                done += 1
    except BrokenProcessPool:
        for task in work[done:]:
            try:
                with _pool(1) as pool:
                    yield pool.submit(compile_task, task).result()
            except BrokenProcessPool:
                yield [Row.failed(task, "the compiler ended its process")]


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `segfast compile-report`."""

    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="default: %(default)s")
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), help="default: %(default)s")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), help="default: %(default)s")
    parser.add_argument("--specimen", nargs="+", default=[""], help="only those whose names start so")
    parser.add_argument("--all-candidates", action="store_true", help="also what only the tuner tries")
    parser.add_argument(
        "--bounds", action="store_true", help="also what each could reach at best on an H200, modeled"
    )
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the table here too")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a row has a problem."""
    from ..kernels import interpreting  # which needs triton

    args.dtype = [dtype_name(text, list(DTYPES)) for text in args.dtype]
    for option, given, known in (("--arch", args.arch, ARCHITECTURES), ("--family", args.family, FAMILIES)):
        for value in given:
            if value not in known:
                raise UserError(f"{option} must be among {', '.join(known)}, got {value!r}")
    if args.processes < 1:
        raise UserError(f"--processes must be positive, got {args.processes}")
    if args.out is not None:
        claim(args.out, force=True)
    if interpreting():
        return _without_interpreter(args)
    work = tasks(args.family, args.arch, args.dtype, args.specimen, args.all_candidates)
    if not work:
        raise UserError(f"--specimen: no case's name starts with {' or '.join(map(repr, args.specimen))}")
    rows = compile_report(work, args.processes)
    bad = sum(bool(row.problems) for row in rows)
    table = format_table(HEADERS, [row.cells() for row in rows])
    units = "store, load and async are bytes a thread moves at a time, instr and bar count the whole program"
    units += ", pair the instructions of a main loop for a pair of points"
    text = f"{table}\n\n{len(rows)} kernels, {bad} with a problem; {units}"
    if args.bounds:
        found = [((row.dtype, row.case, row.kernel, row.tile), row.bound) for row in rows if row.bound]
        text += f"\n\n{bounds_table(found)}"
    print(text)
    if args.out is not None:
        with atomic_write(args.out) as temporary:
            temporary.write_text(text + "\n")
    return 1 if bad else 0


def _without_interpreter(args: argparse.Namespace) -> int:
    """Run the same command in a process that compiles: under TRITON_INTERPRET=1 this one cannot."""
    command = [sys.executable, "-m", "segfast", "compile-report", "--processes", str(args.processes)]
    for name in ("arch", "family", "dtype", "specimen"):
        command += [f"--{name}", *getattr(args, name)]
    command += ["--all-candidates"] * args.all_candidates + ["--bounds"] * args.bounds
    command += [] if args.out is None else ["--out", str(args.out)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, env=environment).returncode
