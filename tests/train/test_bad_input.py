"""Data and checkpoints that cannot be trained on: one line, exit code 2, no file of the user's touched."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segfast import cli

from .conftest import SMALL, discs, write_pair

pytestmark = pytest.mark.usefixtures("undrawn")


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, *arguments):
    capsys.readouterr()
    before = contents(Path.cwd())
    assert cli.main([*SMALL, "--steps", "2", *arguments]) == 2
    assert contents(Path.cwd()) == before
    captured = capsys.readouterr()
    lines = [line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("segfast")]
    assert "Traceback" not in captured.err and len(lines) == 1, captured.err
    return lines[0]


def damage(work, name):
    """Cut a file off in its pixels: its header is good."""
    path = work / name
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])


def too_high(work):
    labels = discs(seed=1)
    labels[3, 4] = 4
    write_pair(work / "data", "cell1", labels)


def other_size(work):
    Image.fromarray(discs(31)).save(work / "data/masks/cell2.png")


def one_class(work):
    for path in (work / "data/masks").iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)


def no_images(work):
    for path in (work / "data/images").iterdir():
        path.unlink()


def no_validation(work):
    shutil.copytree(work / "data", work / "data/train")


def bad_mask(work):
    damage(work, "data/masks/cell3.png")


def no_image(work):
    (work / "data/images/cell4.png").write_text("no image")


def colors(work):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(work / "data/masks/cell0.png")


CASES = [
    (
        too_high,
        ["--classes", "2"],
        "--classes 2: the masks have class 4, expected 0 to 1 (data/masks/cell1.png)",
    ),
    (too_high, [], "the masks have class 4 and none of 2, 3: --classes 5 if those are classes"),
    (other_size, [], "data/masks/cell2.png: the mask is 31x31, its image data/images/cell2.png is 32x32"),
    (one_class, [], "data: the masks' training part has one class only, class 0 ("),
    (no_images, [], "data/images: no file ending in one of .png"),
    (no_validation, [], "data/val: no such folder; beside train/ it has what is held out"),
    (bad_mask, [], "data/masks/cell3.png: not a readable image"),
    (no_image, [], "data/images/cell4.png: not a readable image"),
    (colors, [], "data/masks/cell0.png: expected a mask [H, W] of class indices, got shape [3, 32, 32]"),
    (
        lambda work: None,
        ["--holdout-images", "--holdout", "0.01"],
        "--holdout 0.01: of 5 images none would be",
    ),
    (lambda work: None, ["--loss", "l1", "--class-weights", "1"], "--class-weights 1: --loss l1 has none"),
]


@pytest.mark.parametrize(("break_it", "arguments", "message"), CASES)
def test_data_that_cannot_be_trained_on(work, capsys, break_it, arguments, message):
    break_it(work)
    assert fails(capsys, *arguments).startswith(f"segfast: {message}")
    assert not Path("out").exists()


def test_a_loss_that_is_not_finite_is_one_line(work, capsys):
    options = ["--lr", "1000", "--optimizer", "sgd", "--norm", "none", "--steps", "60", "--warmup", "0"]
    assert cli.main([*SMALL, *options, "--class-weights", "1000,1000", "--momentum", "10"]) == 2
    [line] = [x for x in capsys.readouterr().err.replace("\r", "\n").splitlines() if x.startswith("segfast")]
    assert "the loss is" in line and "a smaller learning rate may help" in line
    assert not Path("out/unet.safetensors").exists()


def test_a_bad_image_in_the_middle_is_an_error_or_is_skipped_by_name(work, capsys):
    for name in ("data/images/cell1.png", "data/masks/cell3.png"):
        damage(work, name)
    (work / "data/masks/cell3.png").write_bytes(b"")
    command = [*SMALL, "--steps", "6", "--checkpoint-every", "1"]
    assert cli.main([*command, "--skip-bad", "--holdout-images", "--holdout", "0.2"]) == 0
    lines = [x for x in capsys.readouterr().err.replace("\r", "\n").splitlines() if x.startswith("segfast")]
    assert sorted(line[: line.index(": not")] for line in lines) == [
        "segfast: skipped: data/images/cell1.png",
        "segfast: skipped: data/masks/cell3.png",
    ]
    shutil.rmtree("out")
    write_pair(work / "data", "cell3", discs(seed=3))
    damage(work, "data/images/cell1.png")
    assert cli.main(command) == 2
    lines = [x for x in capsys.readouterr().err.replace("\r", "\n").splitlines() if x.startswith("segfast")]
    assert len(lines) == 1 and lines[0].startswith("segfast: data/images/cell1.png: not a readable image")
    # What was trained until then is not lost.
    shutil.copy(work / "data/images/cell0.png", work / "data/images/cell1.png")
    assert cli.main([*command, "--resume"]) == 0


def test_all_bad(work, capsys):
    for path in Path("data/masks").iterdir():
        path.write_text("no mask")
    assert cli.main([*SMALL, "--steps", "1", "--skip-bad"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and lines[-1] == "segfast: data: no training image is left"


OTHERS = [
    (["--lr", "0.5"], "--lr 0.003, not 0.5; --resume goes on with the same options"),
    (["--steps", "9"], "--steps 2, not 9"),
    (["--ema", "0.5"], "--ema 0.0, not 0.5"),
    (["--width", "3"], "the model's options "),
    (["--augment", "none"], "--augment all, not none"),
    (["--class-weights", "1,2"], "--class-weights None, not (1.0, 2.0)"),
    (["--holdout", "0.5"], "--holdout 0.25, not 0.5"),
    (["--batch", "4"], "--batch 2, not 4"),
]


def test_other_options_than_the_checkpoint_s(work, capsys):
    assert cli.main([*SMALL, "--steps", "2"]) == 0
    for arguments, message in OTHERS:
        line = fails(capsys, "--resume", *arguments)
        assert line.startswith(f"segfast: out/unet.checkpoint: this training began with {message}")


def test_checkpoints_of_others(work, capsys):
    """Of another model or other images, damaged, and a file that is none."""
    assert cli.main([*SMALL, "--steps", "2"]) == 0
    shutil.copy("out/unet.checkpoint", "out/fcn32s.checkpoint")
    command = ["train", "fcn32s", "--data", "data", "--steps", "2", "--size", "16", "--resume"]
    before = contents(work)
    assert cli.main([*command, "--option", "width=2"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("segfast: out/fcn32s.checkpoint: this training began with MODEL unet, not fcn32s")
    assert contents(work) == before
    write_pair(work / "data", "cell9", discs(seed=9))
    assert "this training began with --data 5 and 5 images (" in fails(capsys, "--resume")
    damage(work, "out/unet.checkpoint")
    assert "out/unet.checkpoint: not a readable checkpoint of segfast train" in fails(capsys, "--resume")
    Path("out/unet.checkpoint").write_text("mine")
    message = "segfast: out/unet.checkpoint: exists and is not a file that segfast wrote; --force replaces it"
    assert fails(capsys, "--resume") == fails(capsys) == message
    for name in ("unet.metrics.csv", "unet.predictions.png"):
        shutil.rmtree("out")
        Path("out").mkdir()
        Path("out", name).write_text("mine")
        assert fails(capsys).startswith(f"segfast: out/{name}: exists and is not a file that segfast wrote")
