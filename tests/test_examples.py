"""Each file of examples/ runs as its docstring says, at sizes that are small."""

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segfast.commands._load_model import import_torchvision
from segfast.data import write_image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
# Those that tests/dense_crf/test_pydensecrf.py and tests/train/test_sequences.py run.
ELSEWHERE = {"crf_accuracy.py", "crf_refine.py", "train_sequence.py"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(name, *arguments)` in an empty folder: what the example has defined, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with torch.random.fork_rng():
            found = runpy.run_path(str(FOLDER / name), run_name="__main__")
        return found, capsys.readouterr().out

    return run_example


def test_speed_up_torchvision(run):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision (the extra 'test')")
    import_torchvision()  # also where it was built for another torch
    found, printed = run("speed_up_torchvision.py", "lraspp_mobilenet_v3_large", "64")
    assert "fused with" in printed and found["scores"].shape == (1, 21, 64, 64)
    assert re.search(r"largest difference: \d\.\de-0[4-9] of the largest score", printed)


def test_speed_up_your_model(run):
    found, printed = run("speed_up_your_model.py", "32")
    assert "3 of 6 layers replaced. 4 fused with others." in printed
    assert "after restore the head is a torch.nn.modules.conv.ConvTranspose2d again" in printed
    assert torch.load(found["file"]).keys() == found["model"].state_dict().keys()


def test_train_nuclei_and_predict_image(run, tmp_path):
    losses = run("train_nuclei.py", "2")[1]
    assert re.fullmatch(r"held-out foreground IoU 0\.\d{3}\n", losses)
    write_image(tmp_path / "cells.png", torch.randint(256, (37, 50), dtype=torch.uint8))
    found, printed = run("predict_image.py", "cells.png")
    assert found["labels"].shape == (37, 50) and Path("out/cells.mask.png").exists()
    assert printed.endswith("of cells.png is foreground: out/cells.mask.png\n")


def test_train_ddp():
    command = [sys.executable, FOLDER / "train_ddp.py", "2"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert re.match(r"loss \d\.\d{3} -> \d\.\d{3}; same weights: True\nheld-out foreground IoU ", printed)


def test_crf_as_rnn(run):
    found, printed = run("crf_as_rnn.py", "1", "16")
    assert "step 1: loss " in printed and "\n  theta_gamma [" in printed
    assert found["crf"].theta_alpha.tolist() != [20, 20] and found["network"].training


def test_profile_model(run):
    found, printed = run("profile_model.py", "32", "0.01")
    assert len(found["found"].rows) > 10
    assert printed.count("bound by ") >= 5 and "of the time is backward" in printed


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_onnx(run):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"needs {package} (the extra 'test')")
    found, printed = run("export_onnx.py", "4", "32")
    assert "onnxruntime at 48x24: " in printed and Path("out/unet.pt2").exists()
    assert found["error"] < 1e-4
    torch.testing.assert_close(found["same"], found["fast"](found["image"]), atol=1e-5, rtol=1e-5)


def test_each_example_is_run_short_and_on_the_page():
    tests = Path(__file__).read_text()
    page = (ROOT / "docs" / "examples.md").read_text()
    files = sorted(FOLDER.glob("*.py"))
    assert len(files) >= 10
    for file in files:
        assert f'"{file.name}"' in tests
        assert f"](../examples/{file.name})" in page
        assert f"\npython examples/{file.name}" in file.read_text()
        if file.name not in ELSEWHERE:
            assert len(file.read_text().splitlines()) <= 60
