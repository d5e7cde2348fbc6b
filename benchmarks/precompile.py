"""Compile every kernel a run will launch, in parallel processes: none is compiled inside a timed loop.

Each process goes through its share of the calls with launches recorded instead of made, and compiles what was
recorded; Triton's cache on disk hands the results to the processes that measure.
"""

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch

from benchmarks.cases import Case, find
from benchmarks.environment import dry_run

PROOF_SLICES = 5
WORKER_BYTES = 4 << 30  # of device memory: the largest case's tensors and a context

# ("proof", family, dtype, slice), ("case", name, direction, dtype), or, with every configuration there is,
# ("tune", family, operation, layer, dtype)
Task = tuple


def tasks(cases: Sequence[Case], directions: Sequence[str]) -> list[Task]:
    """The work of a run over `cases`, the proofs' first."""
    from segfast.ops import FAMILIES
    from segfast.ops._prove import DTYPES

    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    slices = range(PROOF_SLICES)
    work: list[Task] = [("proof", family, name, i) for family in FAMILIES for name in names for i in slices]
    return work + [("case", case.name, direction, case.dtype) for case in cases for direction in directions]


def compile_all(work: Sequence[Task], budget_s: float, log: Callable[[str], None]) -> int:
    """Run the tasks in as many processes as there are cores and memory; returns the kernels compiled."""
    workers = 2
    if torch.cuda.is_available() and not dry_run():
        free = torch.cuda.mem_get_info()[0]
        workers = max(1, min(os.cpu_count() or 1, free // WORKER_BYTES, len(work)))
    start, compiled = time.monotonic(), 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pending = [(task, pool.apply_async(run_task, (task,))) for task in work]
        for task, result in pending:
            try:
                compiled += result.get(max(0.1, budget_s - (time.monotonic() - start)))
            except multiprocessing.TimeoutError:
                log(f"compilation stopped after {budget_s:.0f} s; the rest compiles at first use")
                break
            except Exception:
                log(f"compiling {task}\n{traceback.format_exc()}")
        pool.terminate()
    return compiled


def run_task(task: Task) -> int:
    """Record one task's launches and compile them for the current device."""
    import segfast
    from segfast.kernels import record_launches

    device = torch.device("cpu" if dry_run() else "cuda")
    torch.set_num_threads(1)
    segfast.backend("aten" if dry_run() else "triton")
    if task[0] == "proof":
        _, family, dtype, part = task
        module = importlib.import_module(f"segfast.ops.{family}")
        with record_launches() as launches:
            if not dry_run():
                for item in module.proofs(device, getattr(torch, dtype)):
                    item.actual()
        launches = launches[part::PROOF_SLICES]
    elif task[0] == "tune":
        launches = _tuning_launches(device, *task[1:])
    else:
        launches = _case_launches(device, *task[1:])
    return warm_up(launches)


def warm_up(launches: list) -> int:
    """Compile the recorded launches; returns how many. One that fails costs none of the others."""
    failures = []
    for plan, pointers in launches:
        try:
            plan.warmup(*pointers)
        except Exception as error:
            failures.append(f"{plan.kernel.__name__}: {type(error).__name__}: {error}")
    if failures:
        print(*failures, sep="\n", file=sys.stderr, flush=True)
    return len(launches) - len(failures)


def _case_launches(device: torch.device, name: str, direction: str, dtype: str) -> list:
    from benchmarks.ours import ours
    from benchmarks.problems import Problem
    from benchmarks.timing import Candidate
    from segfast.kernels import record_launches

    case = find(name).replace(direction=direction, dtype=dtype)
    problem = Problem(case.cpu() if dry_run() else case, device)
    found = []
    for candidate in ours(problem):
        if isinstance(candidate, Candidate):
            with record_launches() as launches:
                candidate.run()
            found += launches
    return found


def _tuning_launches(device: torch.device, family: str, operation: str, layer, dtype: str) -> list:
    from segfast._tune import Tuner, variants
    from segfast._tune_calls import FAMILIES

    calls = Tuner(getattr(torch, dtype), device).calls(FAMILIES[family], operation, layer)
    return [launch for variant in variants(operation, calls.ours, device) for launch in variant.launches]
