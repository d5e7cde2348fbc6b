"""The GPU run on the simulated device, at tiny sizes and by a stand-in clock: both of its parts."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import model_trial, rows, session, steps, timing, trial
from benchmarks.cases import find
from benchmarks.session import Session
from benchmarks.steps import STEPS
from segfast import models
from segfast._optimize import gain as gains
from segfast._optimize import measure
from segfast.ops import _choice, _gpu, _gpu_measure, _gpu_tune, _measure_apart, _proofs, _prove_apart
from segfast.ops._choice_files import gpu_machine, path
from segfast.ops._gpu_call import GpuCall

from . import clock
from .conftest import SIMULATED

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not SIMULATED, reason="with a GPU at hand, `make gpu` itself"),
]
CASE = "unet_up4"


@pytest.fixture(autouse=True)
def stand_ins(tmp_path, monkeypatch):
    """The run's folder as the cache, as `benchmarks.gpu` has it, and a stand-in for what torch asks CUDA."""
    monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path))
    script = Path(__file__).with_name("apart.py")
    for module in (_prove_apart, _measure_apart):
        command = (sys.executable, "-m", "ttsem.sanitize", str(script), module.__name__)
        monkeypatch.setattr(module, "COMMAND", command)
    monkeypatch.setattr(_gpu_tune, "APART", False)
    monkeypatch.setattr(_gpu_measure, "interleave", clock.ours_first)
    monkeypatch.setattr(timing, "interleave", lambda runs, device, **o: clock.timings(runs, "segfast"))
    monkeypatch.setattr(gains, "interleave", lambda runs, *a, **o: clock.timings(runs, "after"))
    monkeypatch.setattr(measure, "MEASURES", True)
    monkeypatch.setattr(timing, "_peak_mb", lambda run, device: float("nan"))
    generator = torch.Generator
    monkeypatch.setattr(trial.torch, "Generator", lambda device="cpu": generator("cpu"))
    searching = torch.backends.cudnn.benchmark
    begin_anew()
    yield
    begin_anew()
    torch.backends.cudnn.benchmark = searching


def begin_anew():
    _choice.forget_choices()
    _gpu.forget()
    _proofs.forget()


def run(step, folder, *names):
    """A step as its worker runs it; the rows so far."""
    kept = {"gpu": session.environment(torch.device("cuda", 0))["gpu"], "ceilings": {}}
    (folder / "ceilings.json").write_text(json.dumps(kept))
    STEPS[step](Session(step, folder, 1e6, "conv_transpose2d" if names else None, names, tiny=True))
    return rows.read_rows(folder / "rows.csv") if (folder / "rows.csv").exists() else []


def test_the_first_part_proves_chooses_and_measures(tmp_path, device, monkeypatch, capsys):
    monkeypatch.setattr(steps, "FIRST_DTYPES", (torch.bfloat16,))
    run("prove", tmp_path, CASE)
    assert _proofs.proven("conv_transpose2d_forward", torch.bfloat16, device)
    assert (tmp_path / "choices" / "proven.json").is_file()
    run("choose", tmp_path, CASE)
    calls = [call for call in _choice.choices().measured if isinstance(call, GpuCall)]
    assert re.search(r"  (\d+) of \1 calls measured", capsys.readouterr().out)
    assert {("conv_transpose2d", gradients) for gradients in (False, True)} <= {
        (call.operation, call.gradients) for call in calls
    }
    found = run("headline", tmp_path, CASE)
    ours = {(row["candidate"], row["direction"], row["status"]) for row in found if row["ours"]}
    assert ours == {
        (name, direction, "ok") for name in ("segfast", "segfast_auto") for direction in ("forward", "train")
    }
    assert {row["candidate"] for row in found if not row["ours"] and row["status"] == "ok"} == {
        "aten_nchw", "aten_nhwc"
    }  # fmt: skip
    content = json.loads(path(gpu_machine(_gpu.gpu_name(-1))).read_text())
    choices = {row["operation"]: row["choice"] for part in content for row in part["choices"]}
    assert choices["conv_transpose2d"] == "triton"


def test_the_second_part_chooses_for_a_model_and_measures_it(tmp_path, device, monkeypatch, capsys):
    monkeypatch.setattr(steps, "_models", lambda session: cases)
    plain = models.UNet(1, 2, width=8, depth=1)
    monkeypatch.setattr(model_trial, "plain_model", lambda *a, **o: (plain, 1))
    monkeypatch.setattr(model_trial, "_segfast_model", lambda case, plain: copy.deepcopy(plain))
    case = find("unet_572").tiny()
    # In fp32: the simulated device's autocast does nothing.
    case = case.replace(params={**case.params, "h": 10, "w": 8})
    cases = [case.replace(direction=direction) for direction in ("forward", "train")]
    run("tune", tmp_path)
    assert capsys.readouterr().out.count("times as fast on fake-") == 2
    begin_anew()
    monkeypatch.setattr(_gpu_measure, "interleave", None)  # what is on disk is not timed again
    found = run("models", tmp_path)
    ours = [row for row in found if row["ours"]]
    assert [(row["candidate"], row["direction"], row["status"]) for row in ours] == [
        ("segfast", "forward", "ok"),
        ("segfast", "train", "ok"),
    ]
    assert all("times as fast" in row["note"] for row in ours)
    assert ["a training step" in row["note"] for row in ours] == [False, True]
    eager = {
        (row["candidate"], row["direction"]) for row in found if row["status"] == "ok" and not row["ours"]
    }
    assert eager == {
        (name, direction) for name in ("eager_nhwc", "eager_nchw") for direction in ("forward", "train")
    }
