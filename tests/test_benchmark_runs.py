"""The GPU run's control flow, walked on a CPU."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import record, rows
from benchmarks.cases import CASES, find
from benchmarks.environment import ROOT
from benchmarks.gpu import DRY_RUN_S
from segfast._tune_calls import FAMILIES


def _run_gpu(folder, *arguments, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SEGFAST", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    done = _run_gpu(folder, "--tier", "T0", "full", "T1", "T2", "T3", "T4", SEGFAST_DRY_RUN="1")
    assert done.returncode == 0, done.stdout[-2000:] + (folder / "gpu.log").read_text()[-4000:]
    return folder, done.stdout


def test_dry_run_walks_all_tiers(dry_run):
    folder, printed = dry_run
    names = {"gpu.log", "rows.csv", "ceilings.json", "configs.json", "proven.json", "report.html"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.stat().st_size < 16e6 for path in folder.iterdir())
    found = rows.read_rows(folder / "rows.csv")
    assert {row["tier"] for row in found} == {"T1", "T2", "T3", "T4"}
    assert all(row["dry_run"] for row in found)
    assert not [row for row in found if row["status"] in ("failed", "wrong")]
    # Of cases that only differ in size one is walked.
    assert {find(row["case"]).tiny().work for row in found if row["tier"] == "T1"} == {
        case.tiny().work for case in CASES
    }
    assert {row["direction"] for row in found if row["tier"] == "T3"} == {"backward", "train"}
    assert printed.rstrip().endswith("no GPU figure was taken.")
    assert "34 of 34 checks passed" in printed
    log = (folder / "gpu.log").read_text()
    assert "Traceback" not in log
    assert "WRONG" not in log
    assert json.loads((folder / "proven.json").read_text())["cpu"]
    tuned = json.loads((folder / "configs.json").read_text())["operations"]
    assert set(tuned) == {operation for family in FAMILIES.values() for operation in family.operations}
    assert {row["case"] for row in found if row["tier"] == "T4"} >= {"unet_up1_bare", "decoder_sep_256_bare"}


def test_dry_run_cannot_be_filed(dry_run):
    with pytest.raises(record.Refused, match="dry run"):
        record.record(dry_run[0], ROOT / "out" / "nowhere")


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A worker of a dry run in this process."""
    import segfast
    from benchmarks.tiers import Session

    monkeypatch.setenv("SEGFAST_DRY_RUN", "1")
    threads = torch.get_num_threads()

    def start(tier, *names, **options):
        return Session(tier, tmp_path, DRY_RUN_S, None, names, **options)

    with segfast.backend("auto"):
        yield start
    torch.set_num_threads(threads)


def _cells(folder, *names):
    with (folder / "rows.csv").open() as file:
        return {tuple(row[name] for name in names) for row in csv.DictReader(file)}


def test_bench_tier_takes_every_direction(session, tmp_path):
    from benchmarks.tiers import run_tier

    run_tier(session("bench", "unet_up3", "unet_up3_concat"))
    assert _cells(tmp_path, "case", "direction", "candidate") == {
        (case, direction, candidate)
        for case in ("unet_up3", "unet_up3_concat")
        for direction in ("forward", "backward", "train")
        for candidate in ("aten_nchw", "aten_nhwc", "segfast")
    }


def test_bench_tier_takes_both_columns_of_a_depthwise_row(session, tmp_path):
    from benchmarks.tiers import run_tier

    names = ("xception_middle_dw", "xception_middle_dw_layer", "mobilenetv2_dw96_s2_n1", "decoder_sep_256")
    run_tier(session("bench", *names))
    assert _cells(tmp_path, "case", "direction") == {
        *((name, "forward") for name in names),
        *(("xception_middle_dw", direction) for direction in ("backward", "train")),
        *(("decoder_sep_256", direction) for direction in ("backward", "train")),
        *(("xception_middle_dw_layer", direction) for direction in ("grad_input", "grad_weight", "train")),
        ("mobilenetv2_dw96_s2_n1", "train"),
    }
    assert _cells(tmp_path, "status") == {("ok",)}
    layouts = ("aten_nchw", "aten_nhwc")
    found = _cells(tmp_path, "direction", "candidate")
    assert {name for direction, name in found if direction == "train"} == {
        "segfast",
        *(layout + kernels for layout in layouts for kernels in ("", "_native", "_cudnn")),
    }


def test_last_tier_takes_models_and_their_training(session, tmp_path):
    from benchmarks.tiers import run_tier

    run_tier(session("T5", "unet_572", "unet_up3"))
    assert _cells(tmp_path, "case", "direction", "candidate") == {
        ("unet_572", "forward", "eager_nhwc"),
        ("unet_572", "forward", "segfast"),
        ("unet_572", "train", "eager_nhwc"),
        ("unet_572", "train", "segfast"),
        *(("unet_up3", "forward", name) for name in ("aten_nchw", "aten_nhwc", "segfast")),
    }
    assert _cells(tmp_path, "status") == {("ok",)}


def test_a_worker_that_takes_over_skips_what_was_begun(session, tmp_path):
    from benchmarks.tiers import run_tier

    begun = frozenset({f"T1 {find('unet_up3').tiny().key}"})
    run_tier(session("T1", "unet_up3", "unet_up4", begun=begun))
    assert _cells(tmp_path, "case") == {("unet_up4",)}


def test_a_failing_case_does_not_stop_the_tier(session, tmp_path, monkeypatch):
    from benchmarks import suite
    from benchmarks.tiers import run_tier

    make = suite.make_problem

    def failing(case, device):
        if case.name == "unet_up3":
            raise RuntimeError("planted")
        return make(case, device)

    monkeypatch.setattr("benchmarks.tiers.make_problem", failing)
    run_tier(session("T1", "unet_up3", "unet_up4"))
    found = rows.read_rows(tmp_path / "rows.csv")
    assert [(row["status"], row["note"]) for row in found if row["case"] == "unet_up3"] == [
        ("failed", "RuntimeError: planted")
    ]
    assert {row["status"] for row in found if row["case"] == "unet_up4"} == {"ok"}


def test_a_dead_worker_costs_one_case(tmp_path, monkeypatch):
    """A process that dies in a case leaves a row that says so; the next one takes up after it."""
    from benchmarks import gpu

    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, os\n"
        "begun = sys.argv[sys.argv.index('--begun') + 1 :] if '--begun' in sys.argv else []\n"
        "for name in ('T1 a/bfloat16/forward/full', 'T1 b/bfloat16/forward/full'):\n"
        "    if name in begun: continue\n"
        "    print('begin ' + name, flush=True)\n"
        "    if '/a/' in name.replace(' ', '/'): os.kill(os.getpid(), 11)\n"
    )
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(interpreter))
    monkeypatch.setenv("SEGFAST_DRY_RUN", "1")
    assert gpu.main(["--tier", "T1", "--out", str(tmp_path / "out")]) == 0
    found = rows.read_rows(tmp_path / "out" / "rows.csv")
    assert [(row["case"], row["status"]) for row in found] == [("a", "failed")]
    assert "-11" in found[0]["note"]
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert log.count("begin T1 a") == log.count("begin T1 b") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is no GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = _run_gpu(tmp_path / "out", "--tier", "T1")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_peers_need_no_kernel_of_ours(tmp_path):
    """The first tier runs where segfast's kernels cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from pathlib import Path\n"
        "from benchmarks.tiers import Session, run_tier\n"
        f"names, folder = ['unet_up3', 'resnet_layer3_d2'], Path({str(tmp_path)!r})\n"
        f"run_tier(Session('T1', folder, {DRY_RUN_S}, None, names))\n"
    )
    environment = dict(os.environ, SEGFAST_DRY_RUN="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {row["case"] for row in rows.read_rows(tmp_path / "rows.csv")} == {"unet_up3", "resnet_layer3_d2"}
