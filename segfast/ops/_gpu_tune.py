"""Proving, compiling and measuring the calls of a model on a GPU, most expensive first, within a budget."""

import atexit
import importlib
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterable

import torch

from . import _measure_apart, _prove_apart
from ._backend import too_old
from ._choice import ATEN, Choice, when_tuned
from ._choice_files import write
from ._gpu import keep, left_to_parts
from ._gpu_call import FEW, GPU_OPERATIONS, GpuCall, GpuOperation
from ._gpu_measure import measure
from ._proofs import disproven, prove_family, unjudged
from ._prove import ProofRow

# In processes of their own kernels are proven, compiled and measured: a fault in one is not the caller's.
APART = True
_MOST_SECONDS = 120.0  # for one call that `autotune` measures
_lock = threading.Lock()


def measure_and_keep(
    calls: Iterable[GpuCall],
    device: torch.device,
    *,
    budget_s: float = math.inf,
    most: int = FEW,
    on_call: Callable[[GpuCall], None] = lambda call: None,
) -> dict[GpuCall, Choice]:
    """Choose for each of `calls`, and remember it on disk as it comes.

    Of our kernels only what is proven is tried (`prove_missing`). Operations that consist of others come
    last. `most` tiles of each kernel are tried; `on_call` is told of each call that is done. Calls that do
    not fit into `budget_s` seconds are left out.
    """
    calls = sorted(calls, key=lambda call: (_operation(call).composite, -call.multiplications()))
    end = time.perf_counter() + budget_s
    found: dict[GpuCall, Choice] = {}

    def take(call: GpuCall, answer: Choice | str) -> None:
        found[call] = _kept(call, answer)
        on_call(call)

    if APART and calls:
        torch.cuda.empty_cache()  # for the other processes
        half = time.perf_counter() + budget_s / 2
        try:
            _measure_apart.compile_apart(calls, device, most, half)
            _measure_apart.measure_apart(calls, device, most, end, take)
        except OSError as error:
            _warn(f"no process can be started to measure in ({error})")
        return found
    for call in calls:
        if time.perf_counter() > end:
            break
        take(call, measure(call, device, most))
    return found


def _kept(call: GpuCall, answer: Choice | str) -> Choice:
    """Remember a choice, on disk too. Where there is none but a reason, it is ATen's in this process."""
    if isinstance(answer, str):
        _warn(f"{call} was not measured and stays ATen's for now: {answer}")
        choice = Choice(ATEN, {})
        keep(call, choice)
        return choice
    keep(call, answer)
    write({call: answer})
    return answer


def _warn(message: str) -> None:
    warnings.warn(f"segfast: {message}", stacklevel=3)


# Those that `autotune` gives calls to, by device.
_workers: dict[torch.device, _measure_apart.Worker] = {}


def measure_now(call: GpuCall, device: torch.device) -> Choice:
    """Choose for one call, once what it needs is proven."""
    with left_to_parts(call.operation):  # measuring calls it
        prove_missing([call], device)
        return _kept(call, _ask_worker(call, device) if APART else measure(call, device))


def _ask_worker(call: GpuCall, device: torch.device) -> Choice | str:
    with _lock:
        worker = _workers.get(device)
        if worker is None:
            worker = _workers[device] = _measure_apart.Worker(device, FEW)
        try:
            answer = worker.measure(call, _MOST_SECONDS)
        except BaseException:  # an interrupt: its answer must not be the next call's
            _workers.pop(device).close()
            raise
        return _workers.pop(device).why() if answer is None else answer


def close_workers() -> None:
    """End the processes that `autotune` gave calls to."""
    while _workers:
        _workers.popitem()[1].close()


atexit.register(close_workers)
when_tuned(close_workers)


def prove_missing(
    calls: Iterable[GpuCall],
    device: torch.device,
    on_row: Callable[[ProofRow], None] = lambda row: None,
    others: Iterable[tuple[str, torch.dtype]] = (),
) -> None:
    """Prove the families of `calls`, in their dtypes, and `others`, where nothing is known of them here."""
    if too_old(device):
        return  # the kernels do not run there
    try:
        _prove_each(calls, device, on_row, others)
    except OSError as error:
        _warn(f"no process can be started to prove kernels in ({error})")


def _prove_each(
    calls: Iterable[GpuCall],
    device: torch.device,
    on_row: Callable[[ProofRow], None],
    others: Iterable[tuple[str, torch.dtype]],
) -> None:
    needed: dict[str, dict[torch.dtype, None]] = {}
    for family, dtype in dict.fromkeys([(_operation(c).family, c.dtype) for c in calls] + list(others)):
        operations = importlib.import_module(f"{__package__}.{family}").OPERATIONS
        if unjudged(operations, dtype, device):
            needed.setdefault(family, {})[dtype] = None
    if APART and needed:
        every = {dtype: None for dtypes in needed.values() for dtype in dtypes}
        _prove_apart.compile_proofs(device, list(every), list(needed))
    for family, dtypes in needed.items():
        _prove(family, tuple(dtypes), device, on_row)


def _prove(
    family: str,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    on_row: Callable[[ProofRow], None],
) -> None:
    """`prove_family`; what it does not prove is a warning."""
    wrong = []

    def tell(row: ProofRow) -> None:
        on_row(row)
        if not row.passed:
            wrong.append(row)

    prove_family(family, device, dtypes, tell, apart=APART)
    if wrong:
        operations = ", ".join(dict.fromkeys(row.operation for row in wrong))
        _warn(f"not proven right on this GPU, and not used: {operations}; the first case: {wrong[0]}")


def may_join(call: GpuCall, choice: Choice, device: torch.device) -> bool:
    """True if what was left out of a choice for want of a proof is proven now, or may be."""
    operations = _operation(call).proofs(call.gradients)
    return bool(choice.unproven) and not any(disproven(name, call.dtype, device) for name in operations)


def _operation(call: GpuCall) -> GpuOperation:
    return GPU_OPERATIONS[call.operation]
