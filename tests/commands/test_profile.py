"""`segfast profile`: a table in the terminal, files in a folder, a model in every form."""

import csv
import sys

import pytest
import torch
from torch import nn

from segfast import cli
from segfast._profile import profile
from segfast._profile.rows import Roof
from segfast.models import UNet
from segfast.train import save_checkpoint

QUICK = ["--size", "32x32", "--seconds", "0.01", "--budget", "0"]
MODEL = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with a model; the roof is known."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODEL)
    roof = Roof("a device", 1, {"float32": 1e11, "bfloat16": 1e11}, 1e10, 1.0)
    monkeypatch.setattr(profile, "roof_of", lambda device, dtypes: roof)
    return tmp_path


def profiled(capsys, *arguments: str) -> str:
    assert cli.main(["profile", *arguments, *QUICK]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("model", ["models.py:net", "models:net"])
def test_a_table(capsys, folder, model):
    out = profiled(capsys, model)
    assert out.startswith(f"segfast profile {model}: Sequential, forward, input [1, 3, 32, 32] float32")
    assert "conv2d" in out and "batch_norm" in out and "(between layers)" in out
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["models.py"]


def test_a_checkpoint(capsys, folder):
    save_checkpoint(UNet(3, 2, width=1, depth=1), folder / "net.safetensors")
    assert "UNet, forward, input [1, 3, 32, 32]" in profiled(capsys, "net.safetensors")
    assert cli.main(["profile", "absent.safetensors", *QUICK]) == 2
    assert "absent.safetensors: no such checkpoint" in capsys.readouterr().err


def test_options(capsys):
    out = profiled(
        *(capsys, "models.py:net", "--train", "--batch", "2", "--dtype", "bf16", "--kernels"),
        *("--channels", "3", "--device", "cpu"),
    )
    assert "forward and backward, input [2, 3, 32, 32] bfloat16" in out
    assert "backward" in out and "aten::" in out


def test_a_closed_stdout_is_no_error(monkeypatch, folder):
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&-`
    assert cli.main(["profile", "models.py:net", "-o", "out", *QUICK]) == 0
    assert (folder / "out" / "profile.csv").exists()


def test_files(capsys, folder):
    out = profiled(capsys, "models.py:net", "-o", "out/net")
    names = sorted(path.name for path in (folder / "out" / "net").iterdir())
    assert names == ["profile.csv", "profile.html", "roofline.png", "trace.json"]
    assert all(f"wrote out/net/{name}" in out for name in names)
    with open("out/net/profile.csv") as file:
        [conv] = [row for row in csv.DictReader(file) if row["kind"] == "conv2d"]
    assert conv["flops"] == str(2 * 900 * 8 * 27)
    # Ours are replaced, others only if told to.
    profiled(capsys, "models.py:net", "-o", "out/net")
    (folder / "out" / "net" / "profile.html").write_text("theirs")
    assert cli.main(["profile", "models.py:net", "-o", "out/net", *QUICK]) == 2
    assert "profile.html: exists and is not a file that segfast wrote" in capsys.readouterr().err
    profiled(capsys, "models.py:net", "-o", "out/net", "--force")


def test_the_random_inputs_are_the_same_each_time(monkeypatch, capsys):
    given = []

    def noted(model: nn.Module, images: torch.Tensor, *args, **kwargs):
        given.append(images)
        return profile.profile(model, images, *args, **kwargs)

    monkeypatch.setattr("segfast.commands.profile.profile", noted)
    for _ in range(2):
        profiled(capsys, "models.py:net")
    assert torch.equal(*given)
