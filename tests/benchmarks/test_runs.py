"""The GPU run's control flow, walked on a CPU."""

import contextlib
import csv
import os
import select
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, record, rows
from benchmarks.cases import find
from benchmarks.environment import ROOT
from benchmarks.session import Session
from benchmarks.steps import MODELS, PARTS, STEPS

LAYERS = ("unet_up4_concat", "xception_middle_dw")  # of the headline rows
ENOUGH_S = 1e6


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
    done = _run_gpu(folder, "--case", *LAYERS, "unet_572", SEGFAST_DRY_RUN="1")
    assert done.returncode == 0, done.stdout[-2000:] + (folder / "gpu.log").read_text()[-4000:]
    return folder, done.stdout


def test_dry_run_walks_both_parts(dry_run):
    folder, printed = dry_run
    # In models/ is what optimize found on a CPU.
    names = {"gpu.log", "rows.csv", "ceilings.json", "report.html", "choices", "models"}
    assert {path.name for path in folder.iterdir()} == names
    for step in ("compile", "prove", "choose", "headline", "tune", "models"):
        assert f"== {step} ended" in printed
    found = rows.read_rows(folder / "rows.csv")
    assert all(row["dry_run"] for row in found)
    assert {row["status"] for row in found} == {"ok"}
    measured = {(row["tier"], row["case"], row["direction"]) for row in found}
    assert measured == {
        *(("headline", case, direction) for case in LAYERS for direction in ("forward", "train")),
        *(("models", "unet_572", direction) for direction in ("forward", "train")),
    }
    assert printed.rstrip().endswith("no GPU figure was taken.")
    # Two models are chosen for: in a forward pass and in a training step.
    assert printed.count("begin tune unet_572/float32/") == 2
    log = (folder / "gpu.log").read_text()
    assert "Traceback" not in log
    assert "WRONG" not in log


def test_choices_land_where_the_product_looks_for_them(dry_run, monkeypatch):
    from segfast.ops._choice_files import path, read

    monkeypatch.setenv("SEGFAST_CACHE", str(dry_run[0]))
    assert path().is_file()
    assert "conv2d" in {call.operation for call in read()}


def test_dry_run_cannot_be_filed(dry_run):
    with pytest.raises(record.Refused, match="dry run"):
        record.record(dry_run[0], ROOT / "out" / "nowhere")


def test_the_long_checks_pass(tmp_path):
    done = _run_gpu(
        tmp_path, "--step", "full", "--budget", str(ENOUGH_S), SEGFAST_DRY_RUN="1", TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "35 of 35 checks passed" in done.stdout


def test_every_step_is_of_a_part():
    assert set(STEPS) == {step for part in PARTS.values() for step in part}
    assert set(gpu.DEFAULT) <= set(PARTS)
    assert set(gpu.INTERPRETED) <= set(STEPS)
    assert {find(name + ending)["n"] for name in MODELS for ending in ("", "_n1")} == {1, 8}
    # Six minutes, with what is killed and written at the end.
    assert gpu.SECONDS + gpu.GRACE_S <= 355


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A worker of a dry run in this process."""
    monkeypatch.setenv("SEGFAST_DRY_RUN", "1")
    threads = torch.get_num_threads()
    yield lambda step, *names, **options: Session(step, tmp_path, ENOUGH_S, None, names, **options)
    torch.set_num_threads(threads)


def _cells(folder, *names):
    with (folder / "rows.csv").open() as file:
        return {tuple(row[name] for name in names) for row in csv.DictReader(file)}


def test_layers_are_measured_in_every_direction(session, tmp_path):
    STEPS["layers"](session("layers", "unet_up3", "unet_up3_concat"))
    assert _cells(tmp_path, "case", "direction", "candidate") == {
        (case, direction, candidate)
        for case in ("unet_up3", "unet_up3_concat")
        for direction in ("forward", "backward", "train")
        for candidate in ("aten_nchw", "aten_nhwc", "segfast")
    }


def test_layers_of_both_columns_of_a_depthwise_row(session, tmp_path):
    names = ("xception_middle_dw", "xception_middle_dw_layer", "mobilenetv2_dw96_s2_n1", "decoder_sep_256")
    STEPS["layers"](session("layers", *names))
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


@pytest.mark.parametrize("dtype", ["tf32", "float32", "float16", "bfloat16"])
def test_layers_in_another_dtype(session, tmp_path, dtype):
    before = torch.backends.cudnn.conv.fp32_precision
    STEPS["layers"](session("layers", "xception_middle_dw", dtype=dtype))
    assert _cells(tmp_path, "dtype", "direction", "status") == {
        (dtype, direction, "ok") for direction in ("forward", "backward", "train")
    }
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_the_precision_of_fp32_is_the_cases(session, monkeypatch):
    from benchmarks import session as module

    seen = []
    conv = torch.backends.cudnn.conv
    monkeypatch.setattr(module, "measure_trial", lambda *a, **k: seen.append(conv.fp32_precision) or [])
    for dtype in ("tf32", "float32"):
        session("layers").run_cases([find("unet_up3").tiny().replace(dtype=dtype)])
    assert seen == ["tf32", "ieee"]


def test_models_have_both_layouts_and_ours_optimized(dry_run):
    found = rows.read_rows(dry_run[0] / "rows.csv")
    whole = [row for row in found if row["tier"] == "models"]
    assert {row["candidate"] for row in whole} == {"eager_nhwc", "eager_nchw", "segfast"}
    notes = [row["note"] for row in whole if row["ours"]]
    assert len(notes) == 2 and all("on this CPU" in note for note in notes)


def test_compiled_models_are_set_beside_eager_and_ours(session):
    from benchmarks.model_trial import ModelTrial
    from benchmarks.steps import COMPILE_MODES, _compiled

    trial = ModelTrial(find("unet_572").tiny(), torch.device("cpu"))
    session("models")
    found = {mode: [peer.name for peer in _compiled(mode)(trial)] for mode in COMPILE_MODES}
    assert list(found.values()) == [
        ["eager_nhwc", "compile", "segfast"],
        ["eager_nhwc", "compile_max_autotune", "segfast"],
    ]


def test_a_worker_that_takes_over_skips_what_was_begun(session, tmp_path):
    begun = frozenset(
        {f"layers {find('unet_up3').tiny().replace(direction=d).key}" for d in ("forward", "train")}
    )
    STEPS["layers"](session("layers", "unet_up3", "unet_up4", begun=begun))
    found = _cells(tmp_path, "case", "direction")
    assert found == {("unet_up3", "backward")} | {("unet_up4", d) for d in ("forward", "backward", "train")}


def test_a_second_pass_is_not_the_first(session, tmp_path, capsys):
    case = find("unet_up3").tiny()
    begun = session("headline", begun=frozenset({f"headline {case.key}"}))
    begun.run_cases([case])
    assert not (tmp_path / "rows.csv").exists()
    begun.run_cases([case], label="compiled")
    assert f"begin headline {case.key} compiled" in capsys.readouterr().out
    assert _cells(tmp_path, "status") == {("ok",)}


def test_a_failing_case_does_not_stop_the_step(session, tmp_path, monkeypatch):
    from benchmarks import suite

    make = suite.make_trial

    def failing(case, device):
        if case.name == "unet_up3":
            raise RuntimeError("planted")
        return make(case, device)

    monkeypatch.setattr("benchmarks.session.make_trial", failing)
    STEPS["layers"](session("layers", "unet_up3", "unet_up4"))
    found = rows.read_rows(tmp_path / "rows.csv")
    assert {(row["status"], row["note"]) for row in found if row["case"] == "unet_up3"} == {
        ("failed", "RuntimeError: planted")
    }
    assert {row["status"] for row in found if row["case"] == "unet_up4"} == {"ok"}


def test_a_model_that_fails_does_not_stop_the_choices(session, monkeypatch, capsys):
    from benchmarks import steps

    def failing(case, device):
        raise RuntimeError("planted")

    monkeypatch.setattr(steps, "make_trial", failing)
    STEPS["tune"](session("tune", "unet_572", "fcn8s_vgg16_500"))
    assert capsys.readouterr().out.count("RuntimeError: planted") == 4


def test_time_that_is_up(session, tmp_path, capsys):
    late = session("layers", "unet_up3")
    late.deadline = 0.0
    STEPS["layers"](late)
    STEPS["tune"](late)
    STEPS["prove"](late)
    assert "time is up: 3 of 3 cases not run" in capsys.readouterr().out
    assert not (tmp_path / "rows.csv").exists()


def _fake_worker(folder, monkeypatch, code):
    """Have the run start this program for each worker; `begun` is what an earlier one has begun."""
    script = folder / "worker.py"
    script.write_text(
        "import sys, os, subprocess, time\n"
        "begun = sys.argv[sys.argv.index('--begun') + 1 :] if '--begun' in sys.argv else []\n" + code
    )
    interpreter = folder / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(interpreter))
    monkeypatch.setenv("SEGFAST_DRY_RUN", "1")


def test_a_dead_worker_costs_one_case(tmp_path, monkeypatch):
    """A process that dies in a case leaves a row that says so; the next one takes up after it."""
    code = (
        "for name in ('layers a/bfloat16/forward/full compiled', 'layers b/bfloat16/forward/full'):\n"
        "    if name in begun: continue\n"
        "    print('begin ' + name, flush=True)\n"
        "    if '/a/' in name.replace(' ', '/'): os.kill(os.getpid(), 11)\n"
    )
    _fake_worker(tmp_path, monkeypatch, code)
    assert gpu.main(["layers", "--out", str(tmp_path / "out")]) == 0
    found = rows.read_rows(tmp_path / "out" / "rows.csv")
    assert [(row["case"], row["size"], row["status"]) for row in found] == [("a", "full", "failed")]
    assert "-11" in found[0]["note"]
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert log.count("begin layers a") == log.count("begin layers b") == 1


def test_what_a_worker_has_started_ends_with_it(tmp_path, monkeypatch):
    """A process of its own that proves kernels would go on using the GPU."""
    os.mkfifo(tmp_path / "pipe")
    code = (
        f"pipe = open({str(tmp_path / 'pipe')!r}, 'w')\n"
        "child = subprocess.Popen(['sleep', 'infinity'], stdout=pipe, stderr=subprocess.DEVNULL)\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    _fake_worker(tmp_path, monkeypatch, code)
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert gpu.main(["layers", "--out", str(tmp_path / "out")]) == 1
        # It can be read to its end once nobody holds it; a child that lives on is told of after a minute.
        assert select.select([pipe], [], [], 60)[0] and os.read(pipe, 1) == b""
    finally:
        os.close(pipe)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((tmp_path / "child").read_text()), 9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is no GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = _run_gpu(tmp_path / "out", "first")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_names_those_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        gpu.main(["third", "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    assert "unknown part 'third': expected first, second, layers, full" in capsys.readouterr().err
