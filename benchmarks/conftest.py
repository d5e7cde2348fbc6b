"""Fixtures of the benchmark suites: cases measured by the harness, rows collected, a report at the end."""

import pytest
import torch

from benchmarks.crf_peers import core_count
from benchmarks.environment import ROOT, environment
from benchmarks.rows import MEASURED, append_rows, make_row
from benchmarks.suite import candidates, make_trial, measure_trial, timing_device, write_outputs
from benchmarks.timing import Measurement, Skipped
from segfast._optimize import measure
from segfast._timing import interleave
from segfast.ops._choice import forget_choices

SECONDS = 1.0  # of timing, each case
FOLDER = ROOT / "out" / "benchmark"
ROWS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return timing_device()


@pytest.fixture(autouse=True)
def own_choices(request, tmp_path, monkeypatch):
    """`optimize` knows nothing of earlier runs nor of other tests; without --benchmark it times nothing."""
    monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "cache"))
    if not request.config.getoption("--benchmark"):
        monkeypatch.setattr(measure, "MEASURES", False)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture(scope="session")
def ceilings(request, device):
    """Measured where the rows get a floor: on a GPU, in a benchmark proper."""
    if device.type != "cuda" or not request.config.getoption("--benchmark"):
        return {}
    from benchmarks import peaks

    return peaks.ceilings(device)


@pytest.fixture(scope="session")
def shared_columns(device):
    return environment(device)


class Comparison:
    """Measures one case, keeps its rows for the report, and hands our candidate to pytest-benchmark."""

    def __init__(self, request, benchmark, device, ceilings, shared_columns):
        self.benchmark, self.device = benchmark, device
        self.ceilings, self.columns = ceilings, shared_columns
        self.proper = request.config.getoption("--benchmark")
        self.rows = request.config.stash.setdefault(ROWS, [])

    def __call__(self, case, trial=None, found=None, seconds=SECONDS):
        """The case's measurements; `found` are the candidates, else peers and ours. Ours must be right."""
        case = case if self.device.type == "cuda" else case.cpu()
        trial = trial or make_trial(case, self.device)
        found = found or candidates(trial)
        effort = {"budget_s": seconds, "min_rounds": 5} if self.proper else {"budget_s": 0.0, "min_rounds": 1}
        results = measure_trial(trial, found, **effort)
        case = trial.case
        self.keep(case, results)
        self.benchmark.extra_info["case"] = case.key
        # The fixture times one call a test: ours, or a peer where there is none of ours.
        runs = [c for c in found if not isinstance(c, Skipped)]
        self.benchmark.pedantic(next((c for c in runs if c.ours), runs[0]).run, rounds=5, warmup_rounds=1)
        bad = [m for m in results if m.ours and m.status not in ("ok", "skipped")]
        assert not bad, bad
        return results

    def side_by_side(self, case, runs, notes=None, seconds=SECONDS):
        """Time calls by their candidates' names, "segfast" being ours, whose results the test has compared.

        Without --benchmark nothing is timed. The report shows the ratio; no test fails for it.
        """
        self.benchmark.extra_info["case"] = case.key
        self.benchmark.pedantic(runs["segfast"], rounds=5 if self.proper else 1)
        if self.proper:
            times = interleave(runs, self.device, budget_s=seconds, min_rounds=3)
            self.keep(
                case,
                [
                    Measurement(name, name == "segfast", "ok", (notes or {}).get(name, ""), timing=timed)
                    for name, timed in times.items()
                ],
            )

    def keep(self, case, results):
        """Add the rows of measurements to the report, and, with --benchmark, at once to measured.csv."""
        columns = {**self.columns, "threads": str(torch.get_num_threads())}
        rows = [make_row("pytest", case, m, self.ceilings, columns, False) for m in results]
        self.rows += rows
        if self.proper:
            FOLDER.mkdir(parents=True, exist_ok=True)
            append_rows(FOLDER / MEASURED, rows)


@pytest.fixture
def compare(request, benchmark, device, ceilings, shared_columns):
    return Comparison(request, benchmark, device, ceilings, shared_columns)


@pytest.fixture
def threads(request):
    """All cores, as users have them; without --benchmark two, so that ours are at work."""
    before = torch.get_num_threads()
    torch.set_num_threads(core_count() if request.config.getoption("--benchmark") else 2)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def pytest_sessionstart(session):
    session.config.stash[ROWS] = []


def pytest_sessionfinish(session):
    rows = session.config.stash.get(ROWS, [])
    if session.config.getoption("--benchmark") and rows:
        print(f"\n{write_outputs(rows, FOLDER)}\nreport: {FOLDER / 'report.html'}")
