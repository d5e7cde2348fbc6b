"""`segfast export`: what it writes and says, and what it leaves alone."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from segfast import cli
from segfast.commands import export as export_module
from segfast.commands._output import claim

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (the extra 'test')")

MODELS = """
import torch
from torch import nn

class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        scores = self.conv(x)
        return {"out": scores, "labels": scores.argmax(1)}

class Labels(Scores):
    def forward(self, x):
        return super().forward(x)["labels"]

class Even(Scores):
    def forward(self, x):
        if x.shape[2] != 16:
            x = x[:, :, :16]
        return self.conv(x)

class Nothing(Scores):
    def forward(self, x):
        return None
"""


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """Run the command on one of `MODELS`; returns its exit code and what it printed, stderr too."""
    monkeypatch.chdir(tmp_path)
    Path("models.py").write_text(MODELS)

    def run(name, *options):
        code = cli.main(["export", f"models.py:{name}", "--size", "16x12", "-o", "net.onnx", *options])
        return code, "".join(capsys.readouterr())

    return run


def run(images):
    session = onnxruntime.InferenceSession("net.onnx")
    return session.run(None, {"images": images})


def test_a_dynamic_file_takes_any_size(export):
    code, out = export("Scores", "--dynamic", "--batch", "2")
    assert code == 0
    assert "wrote net.onnx, input [2, 3, height, width]\n" in out
    assert "\n16x12: largest error of the output in onnxruntime: " in out
    assert "\n32x36: largest error" in out and "Not compared" not in out
    for size in ((16, 12), (7, 21)):
        scores, labels = run(np.ones((2, 3, *size), np.float32))
        assert (scores.argmax(1) == labels).all() and labels.shape == (2, *size)


def test_without_dynamic_it_takes_the_one_size(export):
    code, out = export("Scores")
    assert code == 0 and "input [1, 3, 16, 12]\n" in out and "32x36" not in out
    run(np.ones((1, 3, 16, 12), np.float32))
    with pytest.raises(Exception, match="invalid dimensions"):
        run(np.ones((1, 3, 16, 13), np.float32))


def test_a_wrong_file_is_told(export, monkeypatch):
    right = export_module.worst
    monkeypatch.setattr(
        export_module, "worst", lambda a, b: right(a, {path: tensor + 0.1 for path, tensor in b.items()})
    )
    code, out = export("Scores")
    assert code == 1 and out.endswith("DIFFERENT: the file does not compute what the model does.\n")


def test_labels_are_not_compared(export):
    code, out = export("Labels")
    assert code == 0 and out.endswith("Not compared with the model: it returns labels.\n")


def test_a_file_of_ours_is_replaced_and_nothing_else_left_behind(export):
    assert export("Scores")[0] == 0
    first = Path("net.onnx").read_bytes()
    claim("net.onnx")
    assert export("Labels")[0] == 0
    assert Path("net.onnx").read_bytes() != first
    assert {path.name for path in Path().iterdir()} == {"models.py", "net.onnx"}


def test_a_model_that_is_not_of_any_size(export):
    code, out = export("Even", "--dynamic")
    assert code == 2 and not Path("net.onnx").exists()
    assert out.startswith("segfast: torch cannot export the model for images of any size: ")
    assert out.count("\n") == 1


def test_a_model_without_tensors(export):
    assert export("Nothing") == (2, "segfast: the model returned NoneType without a tensor in it\n")


def without(monkeypatch, *names):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest)
    )


def test_what_is_not_installed_is_named(export, monkeypatch):
    without(monkeypatch, "onnx", "onnxscript")
    expected = "segfast: exporting needs what is not installed: pip install onnx onnxscript\n"
    assert export("Scores") == (2, expected)


def test_without_onnxruntime_nothing_is_compared(export, monkeypatch):
    without(monkeypatch, "onnxruntime")
    code, out = export("Scores")
    assert code == 0 and out.endswith("Not compared with the model: onnxruntime is not installed.\n")
