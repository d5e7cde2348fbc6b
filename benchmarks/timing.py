"""The harness: every candidate must be right before it is timed, and all of a case are timed together."""

import contextlib
import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import Case
from segfast._timing import Timing, graph_us, interleave

# ||out - ref|| / ||ref||: operands rounded to the dtype, sums in fp32. tf32 rounds to 10 bits.
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "tf32": 2e-3, "float32": 1e-4}
# A candidate that takes so many seconds, and so often the fastest one's time, is timed apart: beside it the
# others would be called as seldom as it is.
SLOW_S, SLOW_RATIO = 0.2, 10.0


@dataclasses.dataclass
class Candidate:
    """One way to compute a case: `run()` returns the output, or the gradients in the trial's order."""

    name: str
    run: Callable[[], Any]
    ours: bool = False
    note: str = ""
    tolerance: float | None = None  # of the error; else the dtype's
    dtype: str = ""  # what it computes in, where that is not the case's


@dataclasses.dataclass
class Skipped:
    """A peer that does not exist here, and why."""

    name: str
    note: str


@dataclasses.dataclass
class Measurement:
    """The result of measuring one candidate: `status` is ok, wrong, failed or skipped."""

    candidate: str
    ours: bool
    status: str
    note: str = ""
    error: float = math.nan
    timing: Timing | None = None
    graph_us: float = math.nan
    cold_ms: float = math.nan
    peak_mb: float = math.nan
    dtype: str = ""  # what it computes in, where that is not the case's


def relative_error(output: Any, reference: Any) -> float:
    """Largest ||out - ref|| / ||ref|| over the tensors; infinite on NaN, missing tensors or another shape."""
    outputs, references = (
        [value] if isinstance(value, torch.Tensor) else list(value) for value in (output, reference)
    )
    if len(outputs) != len(references):
        return math.inf
    worst = 0.0
    for out, ref in zip(outputs, references, strict=True):
        if out.shape != ref.shape:
            return math.inf
        ref = ref.double()
        error = float(
            (out.to(ref.device).double() - ref).norm() / ref.norm().clamp_min(torch.finfo(torch.float64).tiny)
        )
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it, what `torch.empty` and its relatives return holds NaN, so that an unwritten output shows."""

    def fill(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() and made.device.type != "meta" else made

        return call

    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like", "empty_strided"):
            stack.enter_context(mock.patch.object(torch, name, fill(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", fill(torch.Tensor.new_empty)))
        yield


def measure(
    case: Case,
    candidates: Iterable[Candidate | Skipped],
    reference: Any,
    sample: Callable[[Any], Any],
    device: torch.device,
    *,
    budget_s: float = 1.0,
    graphs: bool = False,
    min_rounds: int = 5,
    error_of: Callable[[Any, Any], float] = relative_error,
    tolerance: float | None = None,
    log: Callable[[str], None] = print,
) -> list[Measurement]:
    """Gate each candidate against `reference` on `sample(output)`, then time those that pass, interleaved.

    Without a `tolerance` of its own a candidate has this one, or the dtype's.
    """
    results, passed, seconds = [], {}, {}
    for candidate in candidates:
        if isinstance(candidate, Skipped):
            results.append(Measurement(candidate.name, False, "skipped", candidate.note))
            continue
        result = Measurement(candidate.name, candidate.ours, "ok", candidate.note, dtype=candidate.dtype)
        results.append(result)
        try:
            result.cold_ms, warm_s, output = _gate(candidate, device)
            result.error, result.note = error_of(sample(output), reference), candidate.note
            result.peak_mb = _peak_mb(candidate.run, device)
        except Exception as error:
            log(f"{case.key} {candidate.name}\n{traceback.format_exc()}")
            result.status, result.note = "failed", f"{type(error).__name__}: {str(error).splitlines()[:1]}"
            continue
        usual = TOLERANCE[candidate.dtype or case.dtype] if tolerance is None else tolerance
        if not result.error <= (usual if candidate.tolerance is None else candidate.tolerance):
            result.status = "wrong"
            log(f"{case.key} {candidate.name}: error {result.error:.3g}, not timed")
        else:
            passed[candidate.name], seconds[candidate.name] = candidate.run, warm_s
    timings = {}
    for names in _paced(seconds):
        together = {name: passed[name] for name in names}
        timings |= interleave(together, device, budget_s=budget_s, min_rounds=min_rounds)
    for result in results:
        if result.status == "ok":
            result.timing = timings[result.candidate]
            if graphs and device.type == "cuda":
                result.graph_us = _graph(passed[result.candidate], device, log)
    return results


def _paced(seconds: Mapping[str, float]) -> list[list[str]]:
    """The names in one group, or in two where some are far slower than the others."""
    most = max(SLOW_S, SLOW_RATIO * min(seconds.values(), default=0.0))
    groups = [[n for n, s in seconds.items() if s <= most], [n for n, s in seconds.items() if s > most]]
    return [group for group in groups if group]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gate(candidate, device) -> tuple[float, float, Any]:
    """Milliseconds of the first call, seconds and output of one whose buffers were poisoned."""
    first_s, _ = _timed(candidate.run, device)
    with poisoned():
        warm_s, output = _timed(candidate.run, device)
    return 1e3 * first_s, warm_s, output


def _timed(run, device) -> tuple[float, Any]:
    _synchronize(device)
    start = time.perf_counter()
    output = run()
    _synchronize(device)
    return time.perf_counter() - start, output


def _peak_mb(run, device) -> float:
    """Megabytes that one call takes beyond what was allocated before it."""
    if device.type != "cuda":
        return math.nan
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _graph(run, device, log) -> float:
    try:
        return graph_us(run, device)
    except Exception:
        log(traceback.format_exc())
        return math.nan
