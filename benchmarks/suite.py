"""A case from its inputs to its rows: what the GPU run, the pytest suites and the quick report share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from benchmarks.cases import Case
from benchmarks.model_trial import ModelTrial
from benchmarks.ours import ours
from benchmarks.peers import Peer, peers
from benchmarks.rows import NAMES, append_rows, read_rows
from benchmarks.timing import TOLERANCE, Measurement, measure, relative_error
from benchmarks.trial import Trial
from segfast._errors import UserError
from segfast._files import atomic_write

if TYPE_CHECKING:
    from benchmarks.network_trial import NetworkTrial

AnyTrial: TypeAlias = "Trial | ModelTrial | NetworkTrial"
TITLE = "segfast benchmark"
CORNERED = ("relu", "relu6")
MOST_BEHIND_A_CORNER = 0.15


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


def make_trial(case: Case, device: torch.device) -> Trial | ModelTrial:
    """Raises LookupError for a model that has no plain twin here."""
    return ModelTrial(case, device) if case.op == "model" else Trial(case, device)


def candidates(trial: AnyTrial, *, compiled: bool = False) -> list[Peer]:
    """The peers of a trial, and ours on the backend in force."""
    if isinstance(trial, Trial):
        return [*peers(trial, compiled=compiled), *ours(trial)]
    return [*trial.peers(compiled), *trial.ours(compiled)]


def measure_trial(
    trial: AnyTrial,
    found: Sequence[Peer],
    *,
    budget_s: float,
    min_rounds: int,
    log: Callable[[str], None] = print,
) -> list[Measurement]:
    """Gate and time `found`; whole models are replayed from a CUDA graph as well."""
    case, reference = trial.case, trial.reference()
    return measure(
        case,
        found,
        reference,
        trial.sample,
        trial.device,
        budget_s=budget_s,
        min_rounds=min_rounds,
        graphs=case.op == "model",
        error_of=getattr(trial, "error", relative_error),
        tolerance=_tolerance(trial, reference),
        log=log,
    )


def _tolerance(trial: AnyTrial, reference: Any) -> float | None:
    """Twice the error of the plain formula, for gradients behind a relu; else None, the dtype's.

    A last digit decides whether an element next to the corner has a gradient, which is then all wrong.
    """
    case = trial.case
    if not isinstance(trial, Trial) or case.direction == "forward" or case.activation not in CORNERED:
        return None
    error = relative_error(trial.sample(trial.bind(trial.formula)()), reference)
    return max(TOLERANCE[case.dtype], min(2 * error, MOST_BEHIND_A_CORNER))


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
    """True if `path` may be written: it is not there, or an earlier report is."""
    if not path.exists():
        return True
    with path.open(errors="replace") as file:
        start = file.read(1000)
    return start.startswith(",".join(NAMES)) or TITLE in start


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what was not measured is null."""
    missing = {name for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
    return {name: None if name in missing else value for name, value in row.items()}
