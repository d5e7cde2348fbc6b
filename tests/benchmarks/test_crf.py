"""The dense CRF's benchmark: its cases, its peers where they are and where they are not, its table."""

import csv
import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks import crf_peers, rows, suite, timing
from benchmarks.cases import CASES, find, is_crf
from benchmarks.crf_cases import GOALS_MS, PHOTOS
from benchmarks.environment import ROOT
from benchmarks.report import markdown, ratio
from benchmarks.trial import Trial

CPU = torch.device("cpu")


def _small(name, **more):
    case = find(name)
    params = {**case.params, "h": 12, "w": 16, "iterations": 2, **more}
    return Trial(case.replace(params=params), CPU)


def test_sizes_labels_batches_and_photographs_are_measured():
    found = [case for case in CASES if is_crf(case)]

    def values(*names):
        return {tuple(case[name] for name in names) for case in found}

    for alpha, beta in ((67, 3), (80, 13)):
        for size in ((321, 321), (512, 512), (512, 1024)):
            assert (*size, alpha, beta, 10) in values("h", "w", "alpha", "beta", "iterations")
        photos = {case["image"] for case in found if case.name.startswith(f"crf_512_{alpha}_{beta}")}
        assert photos == set(PHOTOS)
    assert values("labels") == {(2,), (21,), (150,)}
    assert values("n") == {(1,), (16,)}
    one_filter = [case for case in found if case.op == "gaussian_filter"]
    assert {case["n"] for case in one_filter} == {1, 16} and {case["iterations"] for case in one_filter} == {
        1
    }
    assert any(case.op == "dense_crf" and case["iterations"] == 1 for case in found)
    assert {name for name, _ in GOALS_MS} <= {case.name for case in found}


def test_absent_peers_say_so_and_the_rest_is_measured(monkeypatch):
    find_spec = importlib.util.find_spec
    absent = ("pykeops", "pydensecrf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    trial = _small("crf_512_67_3")
    results = suite.measure_trial(trial, suite.candidates(trial), budget_s=0.0, min_rounds=1)
    assert {m.candidate: m.note for m in results if m.status == "skipped"} == {
        "keops": "pykeops is not installed",
        "keops_blocks": "pykeops is not installed",
        "pydensecrf": "pydensecrf is not installed (pydensecrf2 on PyPI)",
        "pydensecrf_all_cores": "pydensecrf is not installed (pydensecrf2 on PyPI)",
    }
    assert {m.candidate for m in results if m.status == "ok"} == {
        "pytorch_exact", "segfast", "segfast_exact", "segfast_lattice"
    }  # fmt: skip
    assert len(results) == 8


def test_pydensecrf_on_all_cores_solves_every_image():
    pytest.importorskip("pydensecrf", reason="needs pydensecrf (pydensecrf2 on PyPI)")
    trial = _small("crf_512_67_3_n16", n=3)
    cores = 2
    run = crf_peers._in_processes(trial, cores)
    try:
        first, second = run().clone(), run()
    finally:
        crf_peers._processes(cores).shutdown()
        crf_peers._processes.cache_clear()
    assert torch.equal(first, second)
    assert torch.equal(first, crf_peers._one_by_one(trial))
    assert timing.relative_error(trial.sample(first), trial.reference()) < crf_peers.LATTICE


def test_keops_is_given_the_pairs_of_tiles_that_are_listed():
    points, height, width = 700, 128, 64
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(6, 12, generator=generator) < 0.6
    keep[2], keep[:, 11] = False, True
    # What is behind the end of a list is anything.
    lists = torch.randint(12, (6, 12), generator=generator)
    counts = keep.sum(1)
    for row, kept in enumerate(keep):
        lists[row, : counts[row]] = kept.nonzero()[:, 0]
    pairs = SimpleNamespace(lists=lists.short(), counts=counts.int(), padded=6 * height, points=points)

    tiles, slices, runs = crf_peers.block_ranges(pairs)
    assert tiles.dtype == slices.dtype == runs.dtype == torch.int32
    assert tiles.tolist() == [[start, min(start + height, points)] for start in range(0, points, height)]
    listed, begin = torch.zeros(6, points, dtype=torch.bool), 0
    for row, end in enumerate(slices.tolist()):
        for first, last in runs[begin:end].tolist():
            assert not listed[row, first:last].any()
            listed[row, first:last] = True
        begin = end
    assert begin == len(runs)
    assert torch.equal(listed, keep.repeat_interleave(width, 1)[:, :points])
    # Runs, not tiles: the fewest that there can be.
    assert len(runs) == (keep & ~torch.nn.functional.pad(keep, (1, 0))[:, :-1]).sum()


def test_report_has_the_median_and_the_worst_photograph():
    def row(case, candidate, ms, ours=False):
        timed = timing.Timing(1e3 * ms, *[float("nan")] * 5, 5)
        measured = timing.Measurement(candidate, ours, "ok", "", 1e-3, timed)
        columns = dict.fromkeys(rows.VERSIONS, "") | {"gpu": "nvidia-h200"}
        return rows.make_row("bench", find(case), measured, {}, columns, False)

    photos = ["", *(f"_{name}" for name in PHOTOS[1:])]
    found = [
        row(f"crf_512_67_3{photo}", candidate, ms * (1 + i), "segfast" in candidate)
        for i, photo in enumerate(photos)
        for candidate, ms in (("segfast_exact", 8), ("segfast", 8.5), ("keops_blocks", 32))
    ]
    found.append(row("crf_512_67_3_n16", "pydensecrf_all_cores", 2000))
    text = markdown(found)
    assert "| crf_512_67_3 | segfast_exact | 4 | 20 | 32 | 50 | 20 | 4 |" in text
    assert "| crf_512_67_3 | keops_blocks | 4 | 80 | 128 | 12.5 |  |  |" in text
    assert "| crf_512_67_3_n16 | pydensecrf_all_cores | 1 | 2000 | 2000 | 8 |  |  |" in text
    # What "auto" takes is rated, not what it might have taken.
    assert ratio(found[:3]) == pytest.approx(32 / 8.5)


def test_the_docs_figures_are_those_of_the_rows():
    """docs/dense_crf.md's table: pydensecrf's median over ours."""
    with (ROOT / "benchmarks" / "results" / "cpu" / "dense_crf.csv").open(newline="") as file:
        measured = list(csv.DictReader(file))
    ours = [row for row in measured if row["candidate"] == "segfast"]
    found = set()
    for mine, theirs in zip(ours, (row for row in measured if row["candidate"] == "pydensecrf"), strict=True):
        assert mine["case"] == theirs["case"]
        threads = re.fullmatch(r"CPU, (\d) threads", mine["note"])[1]
        found.add((mine["case"], threads, f"{float(theirs['wall_us']) / float(mine['wall_us']):.2f}"))
    columns = ("321_80_13", "321_67_3", "512_80_13", "512_67_3")
    said = set()
    for line in (ROOT / "docs" / "dense_crf.md").read_text().splitlines():
        row = re.match(r"\| (one|four) images?, (one|two) threads? \|(.*)\|$", line)
        if row:
            batch, threads = "_n4" * (row[1] == "four"), "2" if row[2] == "two" else "1"
            cells = (cell.strip() for cell in row[3].split("|"))
            said |= {
                (f"crf_{c}{batch}", threads, cell) for c, cell in zip(columns, cells, strict=True) if cell
            }
    assert len(said) == 12 and said == found
