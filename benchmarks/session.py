"""A worker of the GPU run: it measures cases, appending rows as they come, and leaves with a code."""

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import segfast
from benchmarks import peaks
from benchmarks.cases import Case
from benchmarks.environment import dry_run, environment
from benchmarks.peers import Peer
from benchmarks.rows import append_rows, make_row
from benchmarks.suite import AnyTrial, candidates, make_trial, measure_trial
from benchmarks.timing import Measurement
from segfast.ops import _measure

WRONG = 3  # exit code of a worker that ran to its end and found a kernel wrong
STICKY = 75  # exit code of a worker whose CUDA context is lost: the rest of the step needs another process
CASE_SECONDS = 1.5  # of timing, of a case; a step with less time for each takes less
DTYPES = ("bfloat16", "float16", "tf32", "float32")


def log(text: str) -> None:
    """Write a line to the log only."""
    print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Write a line to the log and the terminal."""
    print(text, flush=True)


@dataclasses.dataclass
class Session:
    """One worker: where it writes, until when it may run, and what an earlier worker has begun already.

    `dtype` replaces the cases' own. `tiny` cases walk through the control flow; they are those of a dry run.
    """

    step: str
    out: Path
    budget_s: float
    family: str | None = None
    names: Sequence[str] = ()
    begun: frozenset[str] = frozenset()
    dtype: str | None = None
    tiny: bool = dataclasses.field(default_factory=dry_run)

    def __post_init__(self) -> None:
        self.dry = dry_run()
        self.device = torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())
        self.deadline = time.monotonic() + self.budget_s
        self.environment = environment(self.device)
        self.ceilings: Mapping[str, float] = {}
        if not self.dry:
            torch.backends.cudnn.benchmark = True
        else:
            torch.set_num_threads(1)
            # What a dry run chose is kept however busy the machine is.
            _measure.quiet_check = lambda: lambda: True

    def left(self) -> float:
        """Seconds until this worker's time is up."""
        return self.deadline - time.monotonic()

    def begins(self, what: str) -> bool:
        """Tell the process that watches what comes next; False if it was begun already."""
        if f"{self.step} {what}" in self.begun:
            return False
        self.begun |= {f"{self.step} {what}"}
        say(f"begin {self.step} {what}")
        return True

    def is_over(self, done: int, of: int, what: str) -> bool:
        """True if the time is up; says so, and how much was not run."""
        if self.left() > 0:
            return False
        say(f"  time is up: {of - done} of {of} {what} not run")
        return True

    def selected(self, cases: Sequence[Case]) -> list[Case]:
        """Those of the asked-for family and names, in the size and dtype asked for.

        Of tiny ones that only differ in size there is one, but for what is named.
        """
        wanted = [
            case
            for case in cases
            if self.family in (None, case.family) and (not self.names or case.name in self.names)
        ]
        if self.tiny:
            dtype = {} if self.dry else {"dtype": "bfloat16"}
            distinct: dict[Any, Case] = {}
            for case in (case.tiny().replace(**dtype) for case in wanted):
                distinct.setdefault(case.key if self.names else case.work, case)
            wanted = list(distinct.values())
        return wanted if self.dtype is None else [case.replace(dtype=self.dtype) for case in wanted]

    def measure_ceilings(self) -> None:
        """The ceilings of this run: measured once, kept in `ceilings.json`."""
        path = self.out / "ceilings.json"
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["gpu"] == self.environment["gpu"]:
                self.ceilings = kept["ceilings"]
                return
        self.ceilings = peaks.ceilings(self.device)
        content = {"dry_run": self.dry, **self.environment, "ceilings": self.ceilings}
        path.write_text(json.dumps(content, indent=1) + "\n")
        for name, value in self.ceilings.items():
            say(f"  {name:12} {value:10.1f}")

    def run_cases(
        self, cases: Sequence[Case], made: Callable[[AnyTrial], list[Peer]] = candidates, label: str = ""
    ) -> None:
        """Measure the candidates that are `made` for each case, in order, until the time is up.

        `label` tells a second pass over the same cases from the first.
        """
        for i, case in enumerate(cases):
            if self.is_over(i, len(cases), "cases"):
                break
            if not self.begins(" ".join(filter(None, [case.key, label]))):
                continue
            share = self.left() / (len(cases) - i)
            budget = 0.02 if self.tiny else min(CASE_SECONDS, 0.5 * share)
            try:
                with fp32_precision(case.dtype):
                    results = self._measure(case, budget, made)
            except Exception as error:
                log(traceback.format_exc())
                results = [Measurement("", False, "failed", f"{type(error).__name__}: {error}"[:200])]
            self._append(case, results)
            self.check_context()

    def _measure(self, case: Case, budget: float, made) -> list[Measurement]:
        try:
            trial = make_trial(case, self.device)
        except LookupError as error:
            return [Measurement("plain", False, "skipped", str(error.args[0]))]
        # Our kernels are asked for by name: what "auto" makes of the call is a candidate beside.
        with segfast.backend("aten" if self.dry else "triton"):
            rounds = 2 if self.tiny else 5
            return measure_trial(trial, made(trial), budget_s=budget, min_rounds=rounds, log=log)

    def _append(self, case: Case, results: Sequence[Measurement]) -> None:
        rows = [
            make_row(self.step, case, result, self.ceilings, self.environment, self.dry) for result in results
        ]
        append_rows(self.out / "rows.csv", rows)
        for result in results:
            figure = f"{result.timing.us:10.1f} us" if result.timing else f"{result.status:>13}"
            say(f"  {result.candidate:18} {figure}  {result.note}")

    def check_context(self) -> None:
        """Leave with STICKY if the CUDA context has become unusable; else give the case's memory back."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except Exception:
            log(traceback.format_exc())
            sys.stderr.flush()
            raise SystemExit(STICKY) from None


@contextlib.contextmanager
def fp32_precision(dtype: str) -> Iterator[None]:
    """cuDNN's and cuBLAS's own switch for fp32: tf32 for the dtype of that name, exact for float32."""
    precision = {"tf32": "tf32", "float32": "ieee"}.get(dtype)
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    saved = conv.fp32_precision, matmul.fp32_precision
    if precision is not None:
        conv.fp32_precision = matmul.fp32_precision = precision
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = saved
