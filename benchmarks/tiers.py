"""The tiers of a GPU run, each useful alone: a worker process runs one, appending rows as they come."""

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import baselines, peaks
from benchmarks.cases import (
    BLOCKS,
    CASES,
    CONVOLUTIONS,
    CRFS,
    DIRECTIONS,
    HEADS,
    LAYERS,
    OPERATORS,
    Case,
    directions,
    find,
    headline,
    is_crf,
)
from benchmarks.environment import dry_run, environment
from benchmarks.problems import Problem
from benchmarks.rows import append_rows, make_row, read_rows
from benchmarks.suite import candidates, make_problem, measure_problem
from benchmarks.timing import Measurement

WRONG = 3  # exit code of a worker that ran to its end and found a kernel wrong
STICKY = 75  # exit code of a worker whose CUDA context is lost: the rest of the tier needs another process
CASE_SECONDS = 1.5  # of timing, of an operator case; a tier with less time for each takes less
DTYPES = ("float16", "tf32", "float32")
UNSEEN_IN_A_DRY_RUN = 3
DRY_PROOFS = 1  # of each family: some take half a minute in the interpreter


def log(text: str) -> None:
    """For the log only."""
    print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """For the log and the terminal."""
    print(text, flush=True)


@dataclasses.dataclass
class Session:
    """One worker: where it writes, until when it may run, and what an earlier worker has begun already."""

    tier: str
    out: Path
    budget_s: float
    family: str | None = None
    names: Sequence[str] = ()
    begun: frozenset[str] = frozenset()

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

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def selected(self, cases: Sequence[Case]) -> list[Case]:
        """Those of the asked-for family and names, in the size this machine runs.

        A dry run takes one of those that only differ in size, but what is named.
        """
        wanted = [
            case
            for case in cases
            if self.family in (None, case.family) and (not self.names or case.name in self.names)
        ]
        if not self.dry:
            return wanted
        distinct: dict[Any, Case] = {}
        for case in (case.tiny() for case in wanted):
            distinct.setdefault(case.key if self.names else case.work, case)
        return list(distinct.values())

    def measure_ceilings(self, fresh: bool = False) -> None:
        """The ceilings of this run: measured once, kept in `ceilings.json`."""
        path = self.out / "ceilings.json"
        if path.exists() and not fresh:
            kept = json.loads(path.read_text())
            if kept["gpu"] == self.environment["gpu"]:
                self.ceilings = kept["ceilings"]
                return
        self.ceilings = peaks.ceilings(self.device)
        content = {"dry_run": self.dry, **self.environment, "ceilings": self.ceilings}
        path.write_text(json.dumps(content, indent=1) + "\n")
        for name, value in self.ceilings.items():
            say(f"  {name:12} {value:10.1f}")

    def use_found_tables(self) -> None:
        """Have "auto" choose by what this run has proven and tuned so far, where it has."""
        if self.dry or not (self.out / "configs.json").exists():
            return
        from segfast.kernels import gpu_slug
        from segfast.ops._backend import forget_decisions

        folder = Path(tempfile.mkdtemp())
        for name, cached in (
            ("configs.json", f"{gpu_slug(self.device)}.json"),
            ("proven.json", "proven.json"),
        ):
            if (self.out / name).exists():
                shutil.copy(self.out / name, folder / cached)
        os.environ["SEGFAST_CACHE"] = str(folder)
        forget_decisions()

    def run_cases(
        self,
        cases: Sequence[Case],
        *,
        with_ours: bool,
        with_peers: bool = True,
        compiled: bool = False,
        found: Callable[[Problem], list[baselines.Peer]] | None = None,
    ) -> None:
        """Measure the cases in order until the time is up; `found` makes their candidates, if given."""
        cases = [case for case in cases if f"{self.tier} {case.key}" not in self.begun]
        for i, case in enumerate(cases):
            if self.left() <= 0:
                say(f"  time is up: {len(cases) - i} of {len(cases)} cases not run")
                break
            say(f"begin {self.tier} {case.key}")
            share = self.left() / (len(cases) - i)
            budget = min(CASE_SECONDS, 0.5 * share) if not self.dry else 0.02
            try:
                results = self._measure(case, budget, with_ours, with_peers, compiled, found)
            except Exception as error:
                log(traceback.format_exc())
                results = [Measurement("", False, "failed", f"{type(error).__name__}: {error}"[:200])]
            self.append(case, results)
            self.check_context()

    def _measure(self, case, budget, with_ours, with_peers, compiled, found) -> list[Measurement]:
        try:
            problem = make_problem(case, self.device)
        except LookupError as error:
            return [Measurement("plain", False, "skipped", str(error.args[0]))]
        if with_ours:
            import segfast

            # Asked for by name: whether "auto" would take it is what the figures decide.
            segfast.backend("aten" if self.dry else "triton")
        if found is not None:
            made = found(problem)
        else:
            made = candidates(problem, with_peers=with_peers, with_ours=with_ours, compiled=compiled)
        return measure_problem(problem, made, budget_s=budget, min_rounds=2 if self.dry else 5, log=log)

    def append(self, case: Case, results: Sequence[Measurement]) -> None:
        rows = [
            make_row(self.tier, case, result, self.ceilings, self.environment, self.dry) for result in results
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


def precompile(session: Session) -> None:
    """Before anything is timed: the kernels of the proofs and of the headline rows."""
    from benchmarks.precompile import compile_all, tasks

    served = _served(session.selected(headline()))
    work = tasks(served, ("forward", "train"))
    work = work[:2] if session.dry else work
    count = compile_all(work, session.budget_s, log)
    say(f"  {count} kernels compiled in {session.budget_s - session.left():.0f} s")


def t0(session: Session) -> None:
    """Every kernel, dtype and direction on odd shapes against fp64; writes proven.json."""
    from segfast.ops import FAMILIES
    from segfast.ops._prove import DTYPES, write_proofs
    from segfast.ops._prove_apart import prove_apart

    dtypes = (torch.float32,) if session.dry else DTYPES
    wrong = False
    for family in FAMILIES:
        if f"T0 {family}" in session.begun:
            continue
        say(f"begin T0 {family}")
        rows = []
        most = DRY_PROOFS if session.dry else None
        for row in prove_apart(session.device, dtypes, most, (family,)):
            rows.append(row)
            log(str(row))
            if not row.passed:
                say(f"  {row}")
        # Family by family, in processes of their own: a fault in one leaves these proofs standing.
        part = write_proofs(rows, session.device, session.out / "proven.json")
        good = sum(row.passed for row in rows)
        wrong |= good < len(rows)
        say(f"  {family}: {good} of {len(rows)} right; {len(part)} operations proven so far")
        session.check_context()
    if wrong:
        raise SystemExit(WRONG)


def full(session: Session) -> None:
    """What takes longer than a proof: fuzz, offsets past 2**31, CUDA graphs, streams, the sanitizer."""
    import segfast
    from benchmarks.full import checks

    segfast.backend("triton")
    count = wrong = 0
    for name, passed, note in checks(session.device):
        count, wrong = count + 1, wrong + (not passed)
        say(f"  {'ok' if passed else 'WRONG':6} {name}  {note}")
        if session.left() <= 0:
            say("  time is up: the rest is not run")
            break
    say(f"  {count - wrong} of {count} checks passed")
    if wrong:
        raise SystemExit(WRONG)


def t1(session: Session) -> None:
    """The ceilings, and every row against the peers only."""
    session.measure_ceilings(fresh=True)
    # A CRF in plain PyTorch takes seconds a call: late, lest it take the others' time. The other networks'
    # layers come last: they have the time that is left where this tier runs alone.
    further = {case.name for case in LAYERS + CONVOLUTIONS + CRFS}
    cases = sorted(session.selected(CASES), key=lambda case: (case.name in further, is_crf(case)))
    session.run_cases(cases, with_ours=False)


def t2(session: Session) -> None:
    """The headline rows forward, ours beside the peers."""
    session.measure_ceilings()
    session.run_cases(_served(session.selected(headline())), with_ours=True)


def t3(session: Session) -> None:
    """Backward and training step of the same rows."""
    session.measure_ceilings()
    cases = _served(session.selected(headline()))
    directed = [case.replace(direction=direction) for direction in ("backward", "train") for case in cases]
    session.run_cases(directed, with_ours=True)


def t4(session: Session) -> None:
    """Tile sizes beside cuDNN, for what no table holds yet; writes configs.json."""
    import segfast
    from benchmarks.precompile import compile_all
    from benchmarks.tuning import tuned_rows, tuning_tasks, work
    from segfast._tune import Tuner, merge_table

    segfast.backend("triton")
    session.measure_ceilings()
    # The networks' many convolutions take the time of all other families: where they are asked for.
    further = CONVOLUTIONS + CRFS if session.family or session.names or session.dry else []
    todo = work(session.selected(OPERATORS + BLOCKS + HEADS + LAYERS + further), tiny=session.dry)
    todo = [item for item in todo if f"T4 {item.case.key}" not in session.begun]
    if not session.dry:
        compile_all(tuning_tasks(todo), 0.4 * session.left(), log)
    tuners = {item.dtype: Tuner(item.dtype, session.device, log) for item in todo}
    for i, item in enumerate(todo):
        if session.left() <= 0:
            say(f"  time is up: {len(todo) - i} of {len(todo)} calls not tuned")
            break
        say(f"begin T4 {item.case.key}")
        budget = min(2.0, 0.5 * session.left() / (len(todo) - i))
        try:
            tuned = tuners[item.dtype].tune(item.family, item.operation, item.layer, budget)
            session.append(item.case, tuned_rows(tuned, session.dry, log))
            if tuned is not None:
                merge_table(session.out / "configs.json", [tuned], session.device)
        except Exception:
            log(traceback.format_exc())
            say("  failed; the log says why")
        session.check_context()


def t5(session: Session) -> None:
    """Whole models, other dtypes, and torch.compile beside everything."""
    session.measure_ceilings()
    session.use_found_tables()
    # Batch 8 before batch 1: where the time does not suffice for all, those are missing.
    models = sorted((case for case in CASES if case.op == "model"), key=lambda case: -case["n"])
    trained = [case.replace(direction="train") for case in models]
    compiled = not session.dry
    session.run_cases(session.selected(models + trained), with_ours=True, compiled=compiled)
    operators = [case for case in OPERATORS + BLOCKS + HEADS + LAYERS + CONVOLUTIONS if not is_crf(case)]
    session.run_cases(session.selected(operators), with_ours=True, compiled=compiled)
    for dtype in DTYPES:
        with fp32_precision(dtype):
            cases = session.selected([case.replace(dtype=dtype) for case in _served(headline())])
            session.run_cases(cases, with_ours=True)
    # A CRF's reference takes seconds: last.
    session.run_cases(session.selected([case for case in CASES if is_crf(case)]), with_ours=True)


def bench(session: Session) -> None:
    """Every row of one family, then its gradients, ours beside the peers."""
    session.measure_ceilings()
    session.use_found_tables()
    cases = session.selected(CASES)
    gradients = [(direction, case) for case in cases for direction in directions(case)]
    gradients.sort(key=lambda work: DIRECTIONS.index(work[0]))
    session.run_cases(cases + [case.replace(direction=d) for d, case in gradients], with_ours=True)


def unseen(session: Session) -> None:
    """What "auto" makes of convolutions that no table holds, beside ATen."""
    from benchmarks.unseen import candidates_of, unseen_cases, verdict

    session.measure_ceilings()
    session.use_found_tables()
    cases = session.selected(unseen_cases(UNSEEN_IN_A_DRY_RUN) if session.dry else unseen_cases())
    session.run_cases(cases, with_ours=True, found=candidates_of)
    rows = [row for row in read_rows(session.out / "rows.csv") if row["tier"] == session.tier]
    say(f"  {'no verdict in a dry run' if session.dry else verdict(rows)}")


TIERS: dict[str, Callable[[Session], None]] = {
    "compile": precompile,
    "T0": t0,
    "full": full,
    "T1": t1,
    "T2": t2,
    "T3": t3,
    "T4": t4,
    "T5": t5,
    "bench": bench,
    "unseen": unseen,
}


class fp32_precision:
    """cuDNN's and cuBLAS's own switch for fp32: tf32 for the dtype of that name, exact for float32."""

    def __init__(self, dtype: str) -> None:
        self.precision = {"tf32": "tf32", "float32": "ieee"}.get(dtype)

    def __enter__(self) -> None:
        self.saved = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        if self.precision is not None:
            torch.backends.cudnn.conv.fp32_precision = self.precision
            torch.backends.cuda.matmul.fp32_precision = self.precision

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = self.saved


def _served(cases: Sequence[Case]) -> list[Case]:
    """Those of families that have landed: the others' peers are the first tier's."""
    from segfast.ops import FAMILIES

    return [case for case in cases if case.family in FAMILIES]


def run_tier(session: Session) -> None:
    """One tier in this process."""
    if session.names:
        for name in session.names:
            find(name)
    TIERS[session.tier](session)
