"""The sampler, the metrics, the loop, whole-image prediction, checkpoints, and the two commands."""

import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segfast._errors import UserError
from segfast.cli import main
from segfast.data import IGNORE_INDEX, Sample, read_mask
from segfast.models import UNet, create, model_name
from segfast.train import (
    Options,
    PatchSampler,
    class_loss,
    confusion_matrix,
    evaluate,
    fit,
    load_checkpoint,
    predict,
    predict_scores,
    save_checkpoint,
    scores,
)
from segfast.train._augment import center_crop

from ..train.conftest import files_up_to


def blobs(height=60, width=80) -> Sample:
    """An image that equals its classes: two discs."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    discs = ((y - 20) ** 2 + (x - 25) ** 2 < 144) | ((y - 38) ** 2 + (x - 58) ** 2 < 100)
    return Sample(discs[None].float(), discs.long())


def small_unet(seed=0, **options) -> UNet:
    torch.manual_seed(seed)
    return UNet(width=4, depth=2, **options)


def test_sampler_is_seeded():
    draw = [PatchSampler([blobs()], 32, 3, seed)() for seed in (1, 1, 2)]
    assert torch.equal(draw[0][0], draw[1][0]) and torch.equal(draw[0][1], draw[1][1])
    assert not torch.equal(draw[0][0], draw[2][0])
    assert draw[0][0].shape == (3, 1, 32, 32) and draw[0][1].shape == (3, 32, 32)
    assert draw[0][1].dtype is torch.int64


def test_plain_crops_are_crops():
    generator = torch.Generator().manual_seed(0)
    sample = Sample(torch.rand(2, 40, 50, generator=generator), torch.arange(2000).reshape(40, 50))
    images, targets = PatchSampler([sample], 16, 4, augment=False)()
    for image, target in zip(images, targets, strict=True):
        top, left = divmod(int(target[0, 0]), 50)
        assert torch.equal(target, sample.target[top : top + 16, left : left + 16])
        torch.testing.assert_close(
            image, sample.image[:, top : top + 16, left : left + 16], rtol=1e-3, atol=1e-4
        )


def test_augmentation_moves_image_and_classes_together_and_differs():
    images, targets = PatchSampler([blobs()], 48, 40)()
    middle = (images.amin((1, 2, 3)) + images.amax((1, 2, 3)))[:, None, None] / 2
    both = torch.tensor([0 < target.double().mean() < 1 for target in targets])
    agree = ((images[:, 0] > middle).long() == targets)[both].double().mean()
    assert both.sum() > 20 and agree > 0.97
    assert targets.double().mean((1, 2)).std() > 0.02
    assert images.flatten(1).amax(1).std() > 0.02


def test_patch_larger_than_the_image():
    images, targets = PatchSampler([blobs(20, 24)], 64, 2)()
    assert (
        images.isfinite().all() and targets.shape == (2, 64, 64) and set(targets.unique().tolist()) <= {0, 1}
    )


def test_center_crop():
    target = torch.arange(30).reshape(1, 5, 6)
    assert center_crop(target, (3, 2)).tolist() == [[[8, 9], [14, 15], [20, 21]]]


def test_metrics_by_hand():
    prediction = torch.tensor([0, 0, 1, 1, 2, 0])
    target = torch.tensor([0, 1, 1, 1, 0, IGNORE_INDEX])
    confusion = confusion_matrix(prediction, target, 4)
    assert confusion.tolist() == [[1, 0, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    result = scores(confusion)
    torch.testing.assert_close(
        result.iou, torch.tensor([1 / 3, 2 / 3, 0, torch.nan], dtype=torch.float64), equal_nan=True
    )
    assert result.miou == pytest.approx(1 / 3)


def train_once(seed=0, optimizer="adamw", lr=0.01, steps=12):
    sampler = PatchSampler([blobs()], 24, 2, seed)
    return fit(small_unet(seed, norm="batch"), sampler, Options(steps=steps, optimizer=optimizer, lr=lr))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_equal_seeds_give_equal_losses_and_training_lowers_them(optimizer):
    lr = 0.01 if optimizer == "adamw" else 0.1
    first, again, other = (train_once(seed, optimizer, lr) for seed in (0, 0, 1))
    assert first == again and first != other
    assert sum(first[-4:]) < 0.8 * sum(first[:4])


def test_ignored_pixels_do_not_train():
    model = small_unet()
    images, targets = PatchSampler([blobs()], 24, 2)()
    loss = nn.functional.cross_entropy(model(images)[:, :, 12:], targets[:, 12:])
    targets[:, :12] = IGNORE_INDEX
    assert fit(model, lambda: (images, targets), Options(steps=1))[0] == pytest.approx(loss.item(), rel=1e-5)


def test_unpadded_network_trains_on_the_middle():
    model = small_unet(padded=False)
    losses = fit(model, PatchSampler([blobs()], 48, 2), Options(steps=10, lr=0.01))
    assert losses[-1] < losses[0]


def test_an_auxiliary_head_counts_half():
    scores, targets = torch.randn(2, 3, 5, 5), torch.randint(3, (2, 5, 5))
    alone = class_loss(scores, targets)
    torch.testing.assert_close(alone, nn.functional.cross_entropy(scores, targets))
    assert class_loss({"out": scores}, targets) == alone
    both = class_loss({"out": scores, "aux": scores[:, :, 1:4, 1:4]}, targets)
    aux = nn.functional.cross_entropy(scores[:, :, 1:4, 1:4], targets[:, 1:4, 1:4])
    torch.testing.assert_close(both, alone + 0.5 * aux)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fcn8s", {"width": 4, "padded": False, "dropout": 0.0}),
        ("deeplabv3_resnet50", {"width_mult": 0.125, "output_stride": 16, "aux_loss": True}),
    ],
)
def test_train_save_and_predict_other_networks(folder, capsys, name, options):
    """Those that return scores, and those that return a dictionary of them."""
    torch.manual_seed(0)
    model = create(name, in_channels=1, num_classes=2, **options)
    losses = fit(model, PatchSampler([blobs()], 64, 2, augment=False), Options(steps=15, lr=0.01))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    result = evaluate(model, [blobs()], 2)
    save_checkpoint(model, "out.safetensors")
    assert main(["predict", "cells.png", "--checkpoint", "out.safetensors", "--output", "mask.png"]) == 0
    assert "37x53" in capsys.readouterr().out and 0 <= result.miou <= 1
    expected = predict(load_checkpoint("out.safetensors"), blobs(37, 53).image)
    assert (read_mask("mask.png") != expected).double().mean() < 0.01


def test_a_loss_that_is_not_finite_stops():
    images, targets = PatchSampler([blobs()], 24, 2)()
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        fit(small_unet(), lambda: (images * torch.nan, targets), Options(steps=2))


def test_unknown_optimizer():
    with pytest.raises(ValueError, match=r"optimizer must be one of .*'lbfgs'"):
        fit(small_unet(), PatchSampler([blobs()]), Options(optimizer="lbfgs"))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("padded", "up"), [(True, "transposed"), (True, "upsample"), (False, "transposed")])
def test_tiles_give_what_the_whole_image_gives(padded, up, depth):
    torch.manual_seed(0)
    model = UNet(2, 3, width=2, depth=depth, padded=padded, norm="batch", up=up).eval()
    image = torch.randn(2, 101, 150)
    whole, tiled = (predict_scores(model, image, tile) for tile in (1000, 32))
    assert whole.shape == (3, 101, 150)
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-5)
    if padded:
        torch.testing.assert_close(whole, model(image[None])[0], rtol=1e-4, atol=1e-5)


def test_unpadded_prediction_mirrors_the_border():
    model = small_unet(padded=False).eval()
    image = torch.randn(1, 24, 36)  # 4 more than a multiple of the divisor: nothing but the margin is added
    mirrored = np.pad(image.numpy(), ((0, 0), (20, 20), (20, 20)), mode="symmetric")
    expected = model(torch.from_numpy(mirrored)[None])[0]
    torch.testing.assert_close(predict_scores(model, image), expected, rtol=1e-4, atol=1e-5)


def test_predict_and_evaluate_leave_the_mode():
    model = small_unet(norm="batch").train()
    sample = blobs()
    labels = predict(model, sample.image)
    assert labels.shape == sample.target.shape and labels.dtype is torch.int64 and model.training
    result = evaluate(model, [sample, sample], 2)
    assert torch.equal(result.iou, scores(confusion_matrix(labels, sample.target, 2)).iou)


def save_header(path, header):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def save_changed(path, key, value):
    """A good checkpoint whose header says something else."""
    save_checkpoint(small_unet(), path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["segfast"])
    header["__metadata__"]["segfast"] = json.dumps({**ours, key: value})
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


BAD_CHECKPOINTS = {
    "empty": (lambda p: p.touch(), "not a readable safetensors file"),
    "foreign": (lambda p: save_header(p, {}), "no segfast model in the file's header"),
    "model": (lambda p: save_changed(p, "model", "vnet"), "do not fit.*no model 'vnet'"),
    "config": (lambda p: save_changed(p, "config", {"color": 1}), "do not fit.*color"),
    "json": (lambda p: save_header(p, {"__metadata__": {"segfast": "{"}}), "do not fit"),
    "width": (lambda p: save_changed(p, "config", {"width": 8, "depth": 2}), "do not fit"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint(tmp_path, name):
    make, message = BAD_CHECKPOINTS[name]
    path = tmp_path / f"{name}.safetensors"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_truncated_checkpoint_and_failed_save(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_checkpoint(small_unet(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=r"Linear is none of .*unet"):
        save_checkpoint(nn.Linear(1, 1), path)
    good = tmp_path / "b.safetensors"
    save_checkpoint(small_unet(1), good)
    data = good.read_bytes()

    def interrupted(state, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(small_unet(2), good)
    assert good.read_bytes() == data and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
    ]


def test_a_network_that_finds_no_space(tmp_path):
    path = tmp_path / "a.safetensors"
    with files_up_to(1000), pytest.raises(UserError, match=r"a.safetensors: cannot be written \("):
        save_checkpoint(small_unet(), path)
    assert list(tmp_path.iterdir()) == []


# The commands.

SMALL = ["--width", "2", "--depth", "2", "--size", "32", "--batch", "2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Run in an empty folder that holds one image."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray((255 * blobs(37, 53).image[0].numpy()).astype(np.uint8)).save("cells.png")
    return tmp_path


def fails(capsys, *arguments, code=2) -> str:
    """The one line that a command that cannot go on prints."""
    assert main([str(a) for a in arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_train_then_predict(folder, capsys):
    assert main(["train", "--steps", "3", *SMALL]) == 0
    output = capsys.readouterr()
    assert "mean" in output.out and "class 1" in output.out and "3/3" in output.err
    assert main(["predict", "cells.png"]) == 0
    assert "37x53" in capsys.readouterr().out
    mask = read_mask("out/cells.mask.png")
    # The image is 0 and 1 already: normalizing changes nothing.
    expected = predict(load_checkpoint("out/unet.safetensors"), blobs(37, 53).image)
    assert (mask != expected).double().mean() < 0.01
    first = Path("out/unet.safetensors").read_bytes()
    # A second run may replace what the first one wrote, and gives the same weights.
    assert main(["train", "--steps", "3", *SMALL]) == 0
    assert main(["predict", "cells.png", "--tile", "16"]) == 0
    assert Path("out/unet.safetensors").read_bytes() == first
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "cells.mask.png",
        "unet.checkpoint",
        "unet.metrics.csv",
        "unet.png",
        "unet.predictions.png",
        "unet.safetensors",
    ]


def test_train_on_a_folder_of_color_images(folder, capsys):
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        Path("data", kind).mkdir(parents=True)
    for name, size in (("a", (40, 50)), ("b", (36, 44))):
        classes = generator.integers(0, 3, size).astype(np.uint8)
        Image.fromarray(np.stack([80 * classes] * 3, -1)).save(f"data/images/{name}.jpg")
        classes[:4] = IGNORE_INDEX
        Image.fromarray(classes).save(f"data/masks/{name}.png")
    options = ["--data", "data", "--channels", "3", "--output", "model.safetensors", "--optimizer", "sgd"]
    assert main(["train", "--steps", "2", *SMALL, *options, "--norm", "none"]) == 0
    assert "class 2" in capsys.readouterr().out
    model = load_checkpoint("model.safetensors")
    assert (model.in_channels, model.num_classes, model.config["norm"]) == (3, 3, None)
    assert (
        main(["predict", "data/images/a.jpg", "--checkpoint", "model.safetensors", "--output", "m.png"]) == 0
    )
    assert read_mask("m.png").shape == (40, 50)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fcn32s", ["--option", "width=2", "--option", "padded=False"]),
        ("deeplabv3_resnet50", ["--option", "width_mult=0.125", "--option", "aux_loss=True"]),
        ("unet", ["--width", "2", "--option", "depth=2"]),
    ],
)
def test_train_a_model_by_name(folder, name, options):
    command = ["train", name, *options, "--steps", "2", "--size", "32", "--batch", "2"]
    assert main([*command, "--output", "model.safetensors"]) == 0
    model = load_checkpoint("model.safetensors")
    assert model_name(model) == name and model.in_channels == 1
    expected = {text.partition("=")[0]: text.partition("=")[2] for text in options if "=" in text}
    assert {key: str(model.config[key]) for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vnet"], "MODEL vnet: segfast has no model 'vnet'; the nearest are unet, "),
        (["fcn8s", "--depth", "3"], "--depth is for unet; of fcn8s use --option"),
        (["fcn8s", "--option", "stride=8"], "MODEL fcn8s: .*unexpected keyword argument"),
        (["fcn8s", "--option", "width=0"], "MODEL fcn8s: width must be at least 1, got 0"),
        (["--option", "width"], "--option must be NAME=VALUE, as in width_mult=0.5; got 'width'"),
        (
            ["deeplabv3plus_mobilenet_v2", "--batch", "1", "--size", "16"],
            "--batch 1 --size 16: Expected more than 1 value per channel",
        ),
    ],
)
def test_models_that_cannot_be_trained(folder, capsys, arguments, message):
    assert re.search(message, fails(capsys, "train", *arguments))
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_files_of_the_user_are_never_replaced(folder, capsys):
    Path("out").mkdir()
    Path("out/cells.mask.png").write_text("mine")
    Path("unet.png").write_text("mine")
    save_header(Path("foreign.safetensors"), {"__metadata__": {"about": "segfast"}})
    save_checkpoint(small_unet(), "unet.safetensors")
    for target in ("foreign.safetensors", "unet.safetensors", "out/../unet.safetensors"):
        arguments = ["train", "--steps", "1", *SMALL, "--output", target]
        name = target.replace("unet.safetensors", "unet.png")  # the checkpoint is ours, the picture is not
        message = f"segfast: {name}: exists and is not a file that segfast wrote; --force"
        assert fails(capsys, *arguments).startswith(message)
    arguments = ["predict", "cells.png", "--checkpoint", "unet.safetensors"]
    assert fails(capsys, *arguments).startswith("segfast: out/cells.mask.png: exists")
    assert Path("out/cells.mask.png").read_text() == Path("unet.png").read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert read_mask("out/cells.mask.png").shape == (37, 53)


@pytest.mark.parametrize("package", ["tqdm", "safetensors", "PIL", "matplotlib"])
def test_missing_package_is_named(folder, capsys, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["predict", "cells.png"] if package == "PIL" else ["train", "--steps", "1", *SMALL]
    if package == "PIL":
        save_checkpoint(small_unet(), "out/unet.safetensors")
    assert main(arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("segfast: ") and "(the extra 'demo' has it)" in last
    assert {"PIL": "pillow"}.get(package, package) in last
