"""Commands that run a model use the GPU where there is one, or the device they are told, for all of it.

A stand-in that holds numbers and mixes with no CPU tensor is the GPU.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segfast import cli
from segfast._errors import UserError
from segfast.commands import _load_model, demo
from segfast.data import astronaut, write_mask
from segfast.models import UNet
from segfast.train import save_checkpoint

from ..elsewhere import DEVICE, elsewhere

CONVOLUTION, TRAINING = {"aten::convolution"}, {"aten::convolution", "aten::convolution_backward"}
PORTRAIT = {"aten::conv2d"}  # under inference_mode
CRF = {"segfast::mean_field"}
COMMANDS = {
    "train": ("--steps 2 --width 4 --depth 2 --size 16 --batch 2 --output a.safetensors", TRAINING),
    "predict": ("photo.png --checkpoint net.safetensors", CONVOLUTION),
    "segment": ("photo.png --crf", PORTRAIT | CRF),
    "crf-fit": ("--data data --checkpoint net.safetensors --trials 2", CONVOLUTION | CRF),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A photo, a folder of one image and mask, and a network, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(astronaut().movedim(0, -1).numpy()).resize((24, 32)).save("photo.png")
    for name in ("images", "masks"):
        Path("data", name).mkdir(parents=True)
    Image.open("photo.png").save("data/images/a.png")
    write_mask("data/masks/a.png", (torch.arange(24) > 11).long().expand(32, 24))
    torch.manual_seed(0)
    save_checkpoint(UNet(3, 2, width=2, depth=2), "net.safetensors")


@pytest.fixture
def a_gpu(monkeypatch):
    """The stand-in is the device that "auto" takes; the operations that ran on it."""
    monkeypatch.setattr(_load_model, "default_device", lambda: DEVICE)
    with elsewhere() as operations:
        yield operations


@pytest.mark.parametrize("device", [[], ["--device", "auto"]], ids=["by default", "auto"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_gpu_where_there_is_one(files, a_gpu, capsys, command, device):
    options, expected = COMMANDS[command]
    assert cli.main([command, *options.split(), *device]) == 0, capsys.readouterr().err
    assert expected <= a_gpu


@pytest.mark.parametrize("command", COMMANDS)
def test_the_cpu_where_it_is_asked_for(files, a_gpu, command):
    assert cli.main([command, *COMMANDS[command][0].split(), "--device", "cpu"]) == 0
    assert a_gpu == set()


def test_the_mask_is_the_same(files, a_gpu):
    masks = []
    for device in ("cpu", "auto"):
        assert cli.main(["segment", "photo.png", "--crf", "--device", device]) == 0
        with Image.open("out/photo.mask.png") as image:
            masks.append(np.array(image).astype(int))
    assert len(np.unique(masks[0])) > 10 and abs(masks[0] - masks[1]).max() <= 1


def test_check(files, a_gpu, capsys):
    """It measures on CPUs and CUDA GPUs alone, and says so of any other image."""
    Path("model.py").write_text("from torch import nn\ndef net():\n    return nn.Conv2d(3, 2, 1)\n")
    command = ["check", "model.py:net", "--size", "8x8", "--seconds", "0.01"]
    assert cli.main(command) == 2
    assert f"example must be on a CPU or a CUDA GPU, got {DEVICE}" in capsys.readouterr().err
    assert cli.main([*command, "--device", "cpu"]) == 0


@pytest.mark.parametrize(("device", "used"), [("auto", DEVICE), ("cpu", torch.device("cpu"))])
def test_demo(files, a_gpu, capsys, monkeypatch, device, used):
    """Training, prediction, the portrait, both CRFs, the check and the report."""
    went = []
    ran = {}

    def noting(name):
        function = getattr(demo, name)

        def noted(*args, **kwargs):
            before = set(a_gpu)
            a_gpu.clear()
            result = function(*args, **kwargs)
            ran[name] = set(a_gpu)
            a_gpu.update(before)
            return result

        monkeypatch.setattr(demo, name, noted)

    for name in ("trained_model", "predict", "segment_portrait", "labeled", "search", "refined_mask"):
        noting(name)
    monkeypatch.setattr(demo, "CRF_TRIALS", 2)
    monkeypatch.setattr(demo, "WIDTH", 4)
    monkeypatch.setattr(
        demo,
        "check_model",
        lambda model, image, **options: went.extend([next(model.parameters()).device, image.device]),
    )
    monkeypatch.setattr(demo, "write_quick_report", lambda out, device: went.append(device))
    assert cli.main(["demo", "--steps", "1", "--device", device]) == 1
    assert "FAILED: foreground IoU" in capsys.readouterr().err
    assert went == [used] * 3
    expected = {
        "trained_model": TRAINING,
        "predict": CONVOLUTION,
        "segment_portrait": PORTRAIT,
        "labeled": CONVOLUTION,
        "search": CRF,
        "refined_mask": CRF,
    }
    for name, operations in expected.items():
        assert operations <= ran[name] if used == DEVICE else ran[name] == set(), name


@pytest.mark.parametrize("text", [None, "auto"])
def test_auto_is_the_default_device(monkeypatch, text):
    for found, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert _load_model.parse_device(text) == torch.device(device)


@pytest.mark.parametrize("text", ["gpu", "meta", "", "cuda:-1", "Auto"])
def test_no_device(text):
    with pytest.raises(UserError, match=f"--device must be cpu, cuda or auto, got '{text}'"):
        _load_model.parse_device(text)
