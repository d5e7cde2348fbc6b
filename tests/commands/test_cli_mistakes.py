"""Every command with bad values of every option: one line, exit code 2, no traceback, and no file changed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segfast import cli
from segfast.commands import demo
from segfast.commands._crf_parameters import TEXTBOOK, write_parameters
from segfast.data import write_mask
from segfast.models import UNet
from segfast.train import save_checkpoint

# Nothing can be created there, not even by root.
UNWRITABLE = "/proc/segfast"
LONG = "x" * 300

COMMON = {
    "train": ["train", "--data", "data", "--steps", "1", "--width", "1", "--depth", "1", "--size", "8"],
    "predict": ["predict", "photo.png", "--checkpoint", "good.safetensors"],
    "segment": ["segment", "photo.png"],
    "crf-fit": ["crf-fit", "--data", "data", "--probabilities", "arrays", "--trials", "2"],
    "check": ["check", "models.py:net", "--size", "8x8", "--seconds", "0.01"],
    "profile": ["profile", "models.py:net", "--size", "8x8", "--seconds", "0.01", "--budget", "0"],
    "export": ["export", "models.py:net", "--size", "8x8", "-o", "net.onnx"],
    "compile-report": ["compile-report"],
    "tune": ["tune"],
    "demo": ["demo"],
}

MISTAKES = [
    *[
        ("train", [f"--{name}", value], f"--{name} must be at least 1, got {value}")
        for name in (
            *("channels", "width", "depth", "steps", "batch", "size", "accumulate", "checkpoint-every"),
            "evaluate-every",
        )
        for value in ("0", "-1")
    ],
    *[
        ("train", [f"--{name}", value], f"--{name} must be between 0 and 1000")
        for name in ("lr", "momentum", "weight-decay")
        for value in ("-1", "nan", "inf")
    ],
    *[
        ("train", [f"--{name}", "-1"], f"--{name} must be at least 0, got -1")
        for name in ("workers", "ignore")
    ],
    *[
        ("train", [f"--{name}", value], f"--{name} must be at least 0 and below 1, got {float(value)}")
        for name in ("ema", "warmup")
        for value in ("-1", "1", "nan")
    ],
    ("train", ["--accumulate", "3"], "--batch 4: expected a multiple of 3, 1 processes times --accumulate 3"),
    ("train", ["--fsdp"], "--fsdp shards over processes: torchrun"),
    ("train", ["--augment", "flip,mirror"], "--augment must be all, none, or some of flip, "),
    *[
        (
            "train",
            ["--class-weights", value],
            f"--class-weights {value}: expected balanced, or 2 numbers from 0",
        )
        for value in ("1", "1,2,3", "1,x", "1,-1", "0,0", "nan,1")
    ],
    ("train", ["--class-weights", "1,2", "--loss", "dice"], "--class-weights 1,2: --loss dice has none"),
    ("train", ["--class-list", "absent.json"], "absent.json: not a readable JSON"),
    ("train", ["--class-list", "text.json"], "text.json: not a readable JSON"),
    ("train", ["--class-list", "list.json"], "list.json: expected 2 to 255 classes, got 0"),
    ("train fcn8s --width 1", ["--option", "width=1"], "--width is for unet; of fcn8s use --option"),
    ("train", ["--option", "width"], "--option must be NAME=VALUE, as in width_mult=0.5; got 'width'"),
    ("train", ["--negative-slope", "nan"], "--negative-slope must be finite, got nan"),
    *[("train", ["--holdout", value], "--holdout") for value in ("0", "1", "-1", "nan", "0.999")],
    *[("train", ["--seed", value], "--seed must be from 0 to 2**63 - 1") for value in ("-1", str(2**63))],
    *[("train", ["--classes", value], "--classes must be from 2 to 255") for value in ("0", "-1", "256")],
    (
        "train",
        ["--data", "seven", "--classes", "5"],
        "--classes 5: the masks have class 7, expected 0 to 4 (seven/masks/a.png)",
    ),
    ("train", ["--data", "seven"], "the masks have class 7 and none of 1, 2, 3, 4, 5, ...: --classes 8 if"),
    ("train", ["--data", "unscored"], "no pixel of the training part is scored"),
    (
        "train",
        ["--batch", "1", "--depth", "3", "--size", "8"],
        "--batch 1 --size 8: at --depth 3 the deepest",
    ),
    (
        "train",
        ["--batch", "1", "--depth", "1", "--size", "16", "--unpadded"],
        "--size 16: input is 16x16; an unpadded UNet of depth 1 needs at least 18x18",
    ),
    *[
        (command, ["--device", value], f"--device must be cpu, cuda or auto, got '{value}'")
        for command in ("train", "predict", "segment", "crf-fit", "check", "profile", "demo")
        for value in ("tpu", "meta")
    ],
    ("train --steps 1", ["--channels", "3"], "--channels 3: the nuclei image has 1"),
    ("train --steps 1", ["--loss", "l2"], "--loss l2 is of real values, for --data that has them"),
    ("train", ["--holdout-images"], "--holdout 0.25: of 1 images none would be left on one side"),
    ("train", ["--data", "absent"], "absent/images: no such folder"),
    ("train", ["--data", "photo.png"], "photo.png/images: no such folder"),
    ("train", ["--data", "empty"], "empty/images: no file ending in"),
    ("train", ["--data", "corrupt"], "corrupt/images/a.png: not a readable image"),
    ("train", ["--output", "data"], "--output data: expected a name ending in .safetensors"),
    ("train", ["--output", "folder.safetensors"], "folder.safetensors: is a folder"),
    ("train", ["--output", "text.safetensors"], "exists and is not a file that segfast wrote; --force"),
    ("train", ["--output", f"{UNWRITABLE}/a.safetensors"], f"{UNWRITABLE}/a.safetensors: "),
    ("train", ["--output", f"{LONG}.safetensors"], "cannot be written (File name too long)"),
    *[("predict", ["--tile", value], f"--tile must be at least 1, got {value}") for value in ("0", "-8")],
    ("predict", ["--checkpoint", "absent.safetensors"], "absent.safetensors: no such checkpoint"),
    ("predict", ["--checkpoint", "data"], "data: no such checkpoint"),
    ("predict", ["--checkpoint", "text.safetensors"], "text.safetensors: not a readable safetensors file"),
    ("predict", ["--checkpoint", "torch.pt"], "torch.pt: not a readable safetensors file (SafetensorError"),
    ("predict", ["--checkpoint", "foreign.safetensors"], "no segfast model in the file's header, but weight"),
    ("predict", ["--output", f"{UNWRITABLE}/a.png"], f"{UNWRITABLE}/a.png: "),
    ("predict", ["--output", "data/a.tif"], "--output data/a.tif: expected a name ending in .png"),
    ("predict", ["--output", f"{LONG}.png"], "cannot be written (File name too long)"),
    ("predict", ["--output", "text.png/a.png"], "text.png is not a folder"),
    ("predict", ["--device", "cuda:99"], "--device cuda:99: there are"),
    ("predict absent.png", ["--checkpoint", "good.safetensors"], "absent.png: no such file"),
    ("predict photo.png", [], "out/unet.safetensors: no such checkpoint"),
    ("predict photo.png text.png", ["--output", "a.png"], "--output names one file, there are 2 images"),
    ("predict photo.png ./photo.png", [], "would both be written to out/photo.mask.png"),
    ("predict data", ["--checkpoint", "good.safetensors"], "data: no file ending in one of .png"),
    ("predict", ["--overlap", "513"], "--overlap must be from 0 to half of tile=1024, 512; got 513"),
    ("predict", ["--scales", "1,x"], "--scales must be numbers with commas between, as in 0.75,1,1.25; got"),
    *[
        ("predict", [f"--{name}", "some"], f"argument --{name}: invalid choice: 'some'")
        for name in ("method", "flips", "average")
    ],
    ("segment", ["absent.png"], "absent.png: no such file"),
    ("segment", ["data"], "data: not a file"),
    *[
        ("segment", ["--threshold", value], "--threshold must be between 0 and 1")
        for value in ("0", "1", "-1", "nan")
    ],
    ("segment", ["-o", f"{UNWRITABLE}/a.png"], f"{UNWRITABLE}/a.png: "),
    ("segment", ["-o", UNWRITABLE], f"{UNWRITABLE}/photo.mask.png: "),
    ("segment", ["-o", f"{LONG}.png"], "cannot be written (File name too long)"),
    ("segment", ["-o", "text.png"], "text.png: exists and is not a file that segfast wrote"),
    ("segment", ["--crf", "text.json"], "text.json: not a readable JSON"),
    ("segment", ["--crf", "list.json"], 'list.json: expected "parameters" with'),
    ("segment", ["--crf", "folder.json"], "folder.json: not a readable JSON"),
    ("segment", ["--crf", "gray.json"], "gray.json: fitted to images with channels=1, these have 3"),
    *[("crf-fit", ["--trials", value], "--trials must be at least 2") for value in ("1", "0", "-1")],
    *[("crf-fit", ["--seconds", value], "--seconds must be above 0") for value in ("0", "-1", "nan")],
    *[("crf-fit", ["--holdout", value], "--holdout") for value in ("0", "1", "-1", "nan")],
    *[("crf-fit", ["--unseen", value], "--unseen") for value in ("0", "-1", "2", "nan")],
    ("crf-fit", ["--seed", "-1"], "--seed must be from 0"),
    ("crf-fit", ["--data", "absent"], "absent/images: no such folder"),
    ("crf-fit", ["--probabilities", "absent"], "absent: no such folder"),
    ("crf-fit", ["--probabilities", "corrupt"], "no probabilities named a.npy or .npz in corrupt"),
    ("crf-fit", ["--probabilities", "bad_arrays"], "a.npy: not a readable array"),
    (
        "crf-fit --data data",
        ["--checkpoint", "text.safetensors"],
        "text.safetensors: not a readable safetensors file",
    ),
    ("crf-fit", ["-o", f"{UNWRITABLE}/a.json"], f"{UNWRITABLE}/a.json: "),
    ("crf-fit", ["-o", "out/crf.txt"], "--output out/crf.txt: expected a name ending in .json"),
    ("crf-fit", ["-o", "text.json"], "text.json: exists and is not a file that segfast wrote"),
    *[
        ("check", ["--seconds", value], f"--seconds must be positive and finite, got {float(value)}")
        for value in ("-1", "0", "nan", "inf")
    ],
    *[
        (command, [f"--{name}", value], f"--{name} must be at least 1, got {value}")
        for command in ("check", "export")
        for name in ("batch", "channels")
        for value in ("0", "-1")
    ],
    *[
        (command, ["--size", value], "--size must be HxW")
        for command in ("check", "export")
        for value in ("0x8", "nan", "8")
    ],
    ("check", ["--dtype", "bf17"], "--dtype must be one of float32, float16, bfloat16, float64; got 'bf17'"),
    ("check", ["--compute", "float16"], "--compute must be bfloat16; got 'float16'"),
    ("check", ["--compute", "bf16", "--train"], "--compute is for inference; leave out --train"),
    (
        "check",
        ["--compute", "bf16", "--dtype", "fp16"],
        "--compute is for a model in float32, got --dtype fp16",
    ),
    *[
        (f"check models.py:{name}", ["--channels", "3", "--size", "8x8"], "the model is scripted or traced")
        for name in ("scripted", "traced")
    ],
    ("check absent.py:net", ["--size", "8x8"], "no file absent.py"),
    (
        "check no.such.module:net",
        ["--size", "8x8"],
        "no.such.module could not be imported: ModuleNotFoundError",
    ),
    ("check json:net", ["--size", "8x8"], "json has no 'net'; it has "),
    ("check corrupt.py:net", ["--size", "8x8"], "corrupt.py could not be imported: SyntaxError"),
    *[
        (command, [f"--{name}", value], message)
        for command, name, values, message in (
            ("profile", "seconds", ("-1", "0", "nan"), "--seconds must be positive and finite, got"),
            ("profile", "budget", ("-1", "nan", "inf"), "--budget must be a number of seconds, 0 or more"),
            ("profile", "batch", ("0", "-1"), "--batch must be at least 1, got"),
            ("profile", "channels", ("0", "-1"), "--channels must be at least 1, got"),
            ("profile", "size", ("0x8", "nan", "8"), "--size must be HxW"),
        )
        for value in values
    ],
    ("profile", ["--dtype", "bf17"], "--dtype must be one of float32, float16, bfloat16, float64; got"),
    ("profile", ["--channels", "4"], "models.py:net does not run on images [1, 4, 8, 8]: RuntimeError"),
    ("profile", ["--optimize"], "optimize needs a budget of more than 0 seconds"),
    ("profile", ["--device", "cpu", "--nvtx"], "nvtx: ranges are for a GPU, and the model is on cpu"),
    ("profile", ["-o", "photo.png"], "photo.png is not a folder"),
    ("profile", ["-o", UNWRITABLE], f"{UNWRITABLE}/profile.csv: "),
    ("profile models.py:scripted", ["--size", "8x8", "--channels", "3"], "model is scripted or traced"),
    ("profile absent.py:net", ["--size", "8x8"], "no file absent.py"),
    (
        "profile models.py:two_inputs",
        ["--size", "8x8"],
        "models.py:two_inputs does not run on images [1, 3, 8, 8]: TypeError",
    ),
    ("profile text.safetensors", ["--size", "8x8"], "text.safetensors: not a readable safetensors file"),
    ("check absent.safetensors", ["--size", "8x8"], "absent.safetensors: no such checkpoint"),
    ("compile-report", ["--dtype", "bf17"], "--dtype must be one of bf16, fp16, fp32, tf32; got 'bf17'"),
    ("compile-report", ["--arch", "sm_1"], "--arch must be among"),
    ("compile-report", ["--family", "none"], "--family must be among"),
    ("compile-report", ["--specimen", "none"], "--specimen: no case's name starts with 'none'"),
    *[("compile-report", ["--processes", value], "--processes must be positive") for value in ("0", "-1")],
    ("compile-report", ["--out", "data"], "data: is a folder"),
    ("compile-report", ["--out", f"{UNWRITABLE}/a.txt"], f"{UNWRITABLE}/a.txt: "),
    ("prove", ["--device", "nothing"], "--device must be cpu, cuda or auto, got 'nothing'"),
    ("prove", ["--device", "cpu"], "the kernels are proven on a GPU"),
    ("prove", ["--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32; got 'int8'"),
    ("prove", ["--dtype", "float64"], "--dtype must be one of bfloat16, float16, float32; got 'float64'"),
    (
        "tune models.py:net",
        ["--dtype", "int8"],
        "--dtype must be one of float32, bfloat16, float16; got 'int8'",
    ),
    *[
        ("tune models.py:net", [option, value], f"{option} must be positive and finite, got")
        for option, value in (
            ("--budget", "0"),
            ("--budget", "-1"),
            ("--budget", "nan"),
            ("--budget", "inf"),
            ("--batch", "0"),
            ("--channels", "-1"),
        )
    ],
    ("tune models.py:net", ["--size", "8"], "--size must be"),
    ("tune models.py:net", ["--device", "nothing"], "--device must be cpu, cuda or auto, got 'nothing'"),
    ("tune models.py:net", ["--channels", "7"], "models.py:net does not run on images [1, 7, 512, 512]: "),
    ("tune absent.py:net", [], "no file absent.py"),
    (
        "tune models.py:two_inputs",
        [],
        "models.py:two_inputs does not run on images [1, 3, 512, 512]: TypeError",
    ),
    (
        "check models.py:two_inputs",
        ["--size", "8x8"],
        "the model does not accept an input of shape [1, 3, 8, 8]",
    ),
    (
        "check models.py:net",
        ["--size", "8x8", "--channels", "4"],
        "the model does not accept an input of shape",
    ),
    *[
        (
            f"{command} models.py:half_on_meta",
            ["--size", "8x8"],
            "half_on_meta has parameters or buffers on the",
        )
        for command in ("check", "tune")
    ],
    ("export", ["-o", "net.pt"], "--output net.pt: expected a name ending in .onnx"),
    ("export", ["-o", "folder.onnx"], "folder.onnx: is a folder"),
    ("export", ["-o", "text.onnx"], "text.onnx: exists and is not a file that segfast wrote; --force"),
    ("export", ["-o", f"{UNWRITABLE}/a.onnx"], f"{UNWRITABLE}/a.onnx: "),
    ("export", ["--channels", "4"], "the model does not accept an input of shape [1, 4, 8, 8], float32"),
    ("export absent.py:net -o a.onnx", ["--size", "8x8"], "no file absent.py"),
    ("demo", ["--steps", "0"], "--steps must be at least 1, got 0"),
    ("demo", ["--seed", "-1"], "--seed must be from 0"),
    ("demo", ["--out", "photo.png"], "photo.png is not a folder"),
    ("demo", ["--out", UNWRITABLE], f"{UNWRITABLE}/demo.png: "),
    ("demo", ["--out", "theirs"], "theirs/demo.png: exists and is not a file that segfast wrote; --force"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Files, good ones and what is wrong with others."""
    root = tmp_path_factory.mktemp("files")
    image = Image.fromarray(np.arange(16 * 20, dtype=np.uint8).reshape(16, 20))
    labels = (torch.arange(20) > 9).long().expand(16, 20)
    # 255 beside another class, or the mask is taken for one of 0 and 255.
    unscored = 255 * torch.ones_like(labels)
    unscored[0, -1] = 1
    folders = {"data": labels, "seven": 7 * labels, "unscored": unscored}
    for name, mask in folders.items():
        (root / name / "images").mkdir(parents=True)
        (root / name / "masks").mkdir()
        image.save(root / name / "images" / "a.png")
        write_mask(root / name / "masks" / "a.png", mask)
    for name in ("empty", "corrupt"):
        (root / name / "images").mkdir(parents=True)
        (root / name / "masks").mkdir()
    (root / "corrupt" / "images" / "a.png").write_text("no image")
    write_mask(root / "corrupt" / "masks" / "a.png", labels)
    for name in ("text.png", "text.json", "text.safetensors", "text.onnx", "corrupt.py"):
        (root / name).write_text("this is no JSON, image or program")
    for name in ("folder.json", "folder.safetensors", "folder.onnx", "theirs", "arrays", "bad_arrays"):
        (root / name).mkdir()
    (root / "theirs" / "demo.png").write_text("theirs")
    (root / "list.json").write_text("[]")
    write_parameters(root / "gray.json", TEXTBOOK, "auto", channels=1)
    image.convert("RGB").save(root / "photo.png")
    probabilities = np.full((2, 16, 20), 0.5, np.float32)
    np.save(root / "arrays" / "a.npy", probabilities)
    (root / "bad_arrays" / "a.npy").write_text("no array")
    save_checkpoint(UNet(3, 2, width=1, depth=1), root / "good.safetensors")
    torch.save({"a": torch.zeros(1)}, root / "torch.pt")
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, root / "foreign.safetensors")
    (root / "models.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Conv2d(3, 2, 1)\n"
        "def two_inputs():\n"
        "    class Two(nn.Module):\n"
        "        def forward(self, first, second):\n"
        "            return first + second\n"
        "    net = Two()\n"
        "    net.conv = nn.Conv2d(3, 2, 1)\n"
        "    return net\n"
        "def half_on_meta():\n"
        "    return nn.Sequential(net(), nn.Conv2d(2, 2, 1, device='meta'))\n"
        "def scripted():\n"
        "    return torch.jit.script(net())\n"
        "def traced():\n"
        "    return torch.jit.trace(net(), torch.zeros(1, 3, 8, 8))\n"
    )
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def the_one_line(err: str) -> str:
    """The line on stderr beside argparse's usage and a progress bar."""
    assert "Traceback" not in err
    [line] = [line for line in re.split(r"[\r\n]", err) if line.startswith("segfast")]
    return line


@pytest.mark.parametrize(("command", "wrong", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_one_line_and_exit_2(files, monkeypatch, capsys, command, wrong, message):
    monkeypatch.chdir(files)
    before = contents(files)
    # Of an option given twice the last counts.
    assert cli.main([*COMMON.get(command, command.split()), *wrong]) == 2
    assert message in the_one_line(capsys.readouterr().err)
    assert contents(files) == before


def options(command: str) -> set[str]:
    """Those that take a value."""
    import argparse
    import importlib

    parser = argparse.ArgumentParser()
    importlib.import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    return {
        next(name for name in action.option_strings if name.startswith("--"))
        for action in parser._actions
        if action.option_strings and action.nargs != 0 and action.choices is None
    }


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_option_has_its_mistake(command):
    """But `doctor --device`, which is asked only where there is a GPU."""
    spelled = {"-o": "--output"}
    tried = {
        spelled.get(word, word)
        for name, wrong, _ in MISTAKES
        if name.split()[0] == command
        for word in wrong
        if word.startswith("-") and not re.fullmatch(r"-\d+", word)
    }
    assert options(command) - tried <= ({"--device"} if command == "doctor" else set())


class TestSeveralFiles:
    @pytest.fixture
    def photos(self, files, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("one.png", "two.png"):
            Path(name).write_bytes((files / "photo.png").read_bytes())
        Path("bad.png").write_text("no image")

    @pytest.fixture(params=["segment", "predict"])
    def command(self, request, files, photos):
        """Its name and options, for photos to follow."""
        options = ["--checkpoint", str(files / "good.safetensors")] if request.param == "predict" else []
        return [request.param, *options]

    def test_one_bad_file_costs_itself(self, capsys, command):
        assert cli.main([*command, "one.png", "bad.png", "two.png"]) == 2
        captured = capsys.readouterr()
        assert the_one_line(captured.err).startswith("segfast: bad.png: not a readable image")
        assert "one.png" in captured.out and "two.png" in captured.out and "bad" not in captured.out
        assert Path("out/one.mask.png").exists() and Path("out/two.mask.png").exists()
        assert "16x20" in captured.out and "height x width" in captured.out

    def test_names_are_checked_before_the_first_is_computed(self, capsys, command):
        assert cli.main([*command, "one.png", "absent.png"]) == 2
        assert the_one_line(capsys.readouterr().err) == "segfast: absent.png: no such file"
        assert not Path("out").exists()


def test_a_checkpoint_of_ours_may_be_trained_again(files, tmp_path, capsys):
    output = tmp_path / "again.safetensors"
    command = [*COMMON["train"], "--data", str(files / "data"), "--output", str(output)]
    assert cli.main(command) == 0
    first = output.read_bytes()
    assert cli.main([*command, "--seed", "1"]) == 0
    assert output.read_bytes() != first
    # A picture beside it that is not ours stays.
    (tmp_path / "again.png").write_text("segfast was here")
    assert cli.main(command) == 2
    assert "again.png: exists and is not a file that segfast wrote; --force" in capsys.readouterr().err


def test_a_class_that_the_held_out_region_lacks_is_named(files, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*COMMON["train"], "--data", str(files / "seven"), "--classes", "9", "--steps", "60"]
    assert cli.main([*command, "--lr", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "nan" not in out and re.search(r"class 8 +absent", out)
    assert re.search(r"The mean leaves out classes .*8: neither in the held-out region's masks nor", out)


def test_classes_in_another_order_are_noticed(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arrays").mkdir()
    right = (np.arange(20) > 9).astype(np.float32)[None].repeat(16, 0) * 0.8 + 0.1
    command = [*COMMON["crf-fit"], "--data", str(files / "data")]
    for probabilities, said in ((right, False), (1 - right, True)):
        np.save("arrays/a.npy", probabilities)
        assert cli.main(command) == 0
        err = capsys.readouterr().err
        assert ("seem to be in another order than the masks'" in err) is said
        assert not said or "0.0 % of the pixels are right, with class 0 as 1, 1 as 0 it were 100.0 %" in err


@pytest.mark.parametrize("source", ["models.py:net", "models:net", "package.inner:net"])
def test_check_takes_a_file_and_a_module(files, tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    text = (files / "models.py").read_text()
    Path("models.py").write_text(text)
    Path("package").mkdir()
    Path("package/__init__.py").touch()
    Path("package/inner.py").write_text(text)
    assert cli.main(["check", source, "--size", "8x8", "--seconds", "0.01"]) == 0
    assert "input [1, 3, 8, 8]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bfloat16", "bf16"])
def test_both_spellings_of_a_dtype(files, monkeypatch, capsys, name):
    monkeypatch.chdir(files)
    assert cli.main([*COMMON["check"], "--dtype", name]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert cli.main(["compile-report", "--dtype", name, "--specimen", "none"]) == 2
    assert "--specimen" in the_one_line(capsys.readouterr().err)
    assert cli.main(["tune", "models.py:net", "--dtype", name, "--channels", "7", "--size", "8x8"]) == 2
    assert "does not run on images [1, 7, 8, 8]" in the_one_line(capsys.readouterr().err)


def test_the_demo_may_run_twice(tmp_path, monkeypatch):
    """Every file it writes is known again as segfast's."""
    monkeypatch.chdir(tmp_path)
    from segfast.commands._output import claim
    from segfast.train._figures import new_figure, save_figure

    save_checkpoint(UNet(width=1, depth=1), "a.safetensors")
    save_figure(new_figure(), "a.png")
    write_mask("mask.png", torch.zeros(2, 2))
    write_parameters("a.json", TEXTBOOK, "auto", channels=3)
    from benchmarks.report import html_page

    Path("a.html").write_text(html_page([]))
    assert demo.REPORT.suffix == ".html"
    for name in ("a.safetensors", "a.png", "mask.png", "a.json", "a.html"):
        claim(name)
    Path("notes.json").write_text(json.dumps({"about": "segfast"}))
    with pytest.raises(Exception, match="not a file that segfast wrote"):
        claim("notes.json")
