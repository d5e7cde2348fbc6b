"""A case from its inputs to its rows: what the GPU run, the pytest suites and the quick report share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import baselines
from benchmarks.cases import Case
from benchmarks.model_problems import ModelProblem
from benchmarks.problems import Problem
from benchmarks.rows import NAMES, append_rows, read_rows
from benchmarks.timing import Candidate, Measurement, measure, relative_error
from segfast._errors import UserError
from segfast._files import atomic_write

if TYPE_CHECKING:
    from benchmarks.network_problems import NetworkProblem

TITLE = "segfast benchmark"


def timing_device(device: torch.device | None = None) -> torch.device:
    """The device, by default the GPU, with cuDNN's search on; without one the CPU with one thread.

    Threads that wait for each other on a busy machine time whatever else runs there.
    """
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is not None and device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        return device
    torch.set_num_threads(1)
    return torch.device("cpu")


def make_problem(case: Case, device: torch.device) -> Problem | ModelProblem:
    """Raises LookupError for a model that has no plain twin here."""
    return ModelProblem(case, device) if case.op == "model" else Problem(case, device)


def candidates(
    problem: Problem | ModelProblem | NetworkProblem,
    *,
    with_peers: bool = True,
    with_ours: bool = True,
    compiled: bool = False,
) -> list[baselines.Peer]:
    """The peers of a problem, and ours on the backend in force."""
    found: list[baselines.Peer] = []
    whole = not isinstance(problem, Problem)
    if with_peers:
        found += problem.peers(compiled) if whole else baselines.peers(problem, compiled=compiled)
    if with_ours:
        # Imported late: the first GPU run measures peers whether or not our kernels import.
        from benchmarks.ours import on_auto, ours

        found += problem.ours() if whole else ours(problem)
        if problem.case.op == "model" and problem.device.type == "cuda":
            found += [on_auto(c) for c in found if isinstance(c, Candidate) and c.ours]
    return found


def measure_problem(
    problem: Problem | ModelProblem | NetworkProblem,
    found: Sequence[baselines.Peer],
    *,
    budget_s: float,
    min_rounds: int,
    log: Callable[[str], None] = print,
) -> list[Measurement]:
    """Gate and time `found`; whole models are replayed from a CUDA graph as well."""
    case = problem.case
    return measure(
        case,
        found,
        problem.reference(),
        problem.sample,
        problem.device,
        budget_s=budget_s,
        min_rounds=min_rounds,
        graphs=case.op == "model",
        error_of=getattr(problem, "error", relative_error),
        log=log,
    )


def write_outputs(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Write rows.csv, rows.json, report.md and report.html into `folder`; returns the summary."""
    from benchmarks.report import markdown, summary, write_report

    names = ("rows.csv", "rows.json", "report.md", "report.html")
    for path in (folder / name for name in names):
        if not _ours(path):
            raise UserError(f"{path}: exists and is not a benchmark report of segfast; move it away")
    with atomic_write(folder / "rows.csv") as path:
        append_rows(path, rows)
    written = read_rows(folder / "rows.csv")
    with atomic_write(folder / "rows.json") as path:
        content = {"title": TITLE, "rows": [_plain(row) for row in written]}
        path.write_text(json.dumps(content, indent=1) + "\n")
    write_report(written, folder / "report.html", TITLE)
    with atomic_write(folder / "report.md") as path:
        path.write_text(f"# {TITLE}\n\n{markdown(written)}")
    return summary(written)


def _ours(path: Path) -> bool:
    """Whether `path` may be written: it is not there, or an earlier report is."""
    if not path.exists():
        return True
    with path.open(errors="replace") as file:
        start = file.read(1000)
    return start.startswith(",".join(NAMES)) or TITLE in start


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what was not measured is null."""
    missing = {name for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
    return {name: None if name in missing else value for name, value in row.items()}
