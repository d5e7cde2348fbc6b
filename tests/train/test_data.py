"""Folders that a training takes: names, class lists, color masks, what is held out; and what it leaves."""

import csv
import itertools
import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segfast import cli
from segfast._errors import UserError
from segfast.data import Sample, image_and_mask_paths, read_classes, read_mask, read_values
from segfast.train import load_checkpoint, scores
from segfast.train._figures import predictions_figure
from segfast.train._metrics import near_boundary

from .conftest import SMALL, discs, write_pair


def stems(folder):
    return [(image.stem, mask.stem) for image, mask in image_and_mask_paths(folder)]


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (["a", "b_1"], ["a", "b_1"]),
        (["a", "b_1"], ["a_mask", "b_1_mask"]),
        (["a_img", "b_1_img"], ["a_seg", "b_1_seg"]),
        (["a_img", "b_1_img"], ["a", "b_1"]),
        (["a.0", "b.0"], ["a.0-labels", "b.0-labels"]),
        (["cell_01"], ["cell_01_mask"]),
        # Masks of images that are not there are left alone.
        (["a", "b"], ["a_mask", "b_mask", "c_mask"]),
    ],
)
def test_masks_are_found_by_a_common_ending(tmp_path, images, masks):
    for kind, names in (("images", images), ("masks", masks)):
        (tmp_path / kind).mkdir()
        for name in names:
            (tmp_path / kind / f"{name}.png").touch()
    assert stems(tmp_path) == list(zip(images, masks, strict=False))


def test_an_image_without_a_mask_is_named(tmp_path):
    for name in ("images/a.png", "images/b.png", "masks/a_mask.png", "masks/c_mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"a.png: no mask named a\.\* in .*, nor with one ending for all"):
        image_and_mask_paths(tmp_path)


CLASSES = {"classes": [{"name": "sky", "color": "#0000ff"}, {"name": "road", "color": [128, 64, 128]}]}


def test_color_masks_are_read_by_their_class_list(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({**CLASSES, "ignore": "#000000"}))
    classes = read_classes(path)
    assert classes.names == ("sky", "road") and classes.in_masks
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[:2], pixels[2:, :3] = (0, 0, 255), (128, 64, 128)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    labels = read_mask(tmp_path / "mask.png", from_colors=classes.labels)
    assert labels.tolist() == [[0] * 5, [0] * 5, [1, 1, 1, 255, 255], [1, 1, 1, 255, 255]]
    pixels[3, 4] = (1, 2, 3)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(
        UserError, match=r"the color #010203 \(row 3, column 4\) is that of no class; those are "
    ):
        read_mask(tmp_path / "mask.png", from_colors=classes.labels)
    # Names alone: colors of our own, and masks of indices.
    path.write_text('["sky", "road"]')
    assert read_classes(path).names == ("sky", "road") and not read_classes(path).in_masks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"names": []}', "expected a list of classes"),
        ('["sky"]', "expected 2 to 255 classes, got 1"),
        ('["sky", "sky"]', "every class must have a name of its own, got 'sky'"),
        ('["sky", 3]', "every class must have a name of its own, got 3"),
        ('[{"name": "a", "color": "red"}, "b"]', "a color must be .*, got 'red'"),
        ('[{"name": "a", "color": [1, 2, 256]}, "b"]', r"a color must be .*, got \[1, 2, 256\]"),
        (
            '{"classes": [{"name": "a", "color": "#000001"}, {"name": "b", "color": "#000001"}]}',
            "two classes have one color",
        ),
        ("{", "not a readable JSON"),
    ],
)
def test_bad_class_lists(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_classes(tmp_path / "classes.json")


def test_real_values(tmp_path):
    values = np.array([[0.5, np.nan], [-2, 3]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.savez(tmp_path / "b.npz", values=np.stack([values, values]))
    torch.testing.assert_close(read_values(tmp_path / "a.tif"), torch.from_numpy(values), equal_nan=True)
    assert read_values(tmp_path / "b.npz").shape == (2, 2, 2)
    for array, message in ((values * np.inf, "expected finite"), (values[0], r"got shape \[2\]")):
        np.savez(tmp_path / "b.npz", values=array)
        with pytest.raises(UserError, match=message):
            read_values(tmp_path / "b.npz")


def table(output):
    cells = [re.split(r" {2,}", line) for line in output.splitlines() if line[:1].isdigit()]
    return {number: row for number, *row in cells}


def test_classes_by_name_and_color_and_folders_of_both_parts(work, capsys):
    """train/ and val/, color masks, a class list: the table has every class's pixels."""
    colors = np.array([[0, 0, 255], [128, 64, 128], [255, 255, 0]], np.uint8)
    for part, count in (("train", 2), ("val", 1)):
        for index in range(count):
            labels = discs(seed=10 * count + index, classes=3)
            write_pair(work / "data" / part, f"x{index}", labels, ending="_gt")
            Image.fromarray(colors[labels]).save(work / "data" / part / "masks" / f"x{index}_gt.png")
    names = ["sky", "road", "sign"]
    listed = [{"name": n, "color": c.tolist()} for n, c in zip(names, colors, strict=True)]
    Path("data/classes.json").write_text(json.dumps(listed))
    assert cli.main([*SMALL, "--steps", "2", "--loss", "dice", "--optimizer", "sgd"]) == 0
    output = capsys.readouterr().out
    rows = table(output)
    expected = np.bincount(np.concatenate([discs(seed=20 + i, classes=3).ravel() for i in (0, 1)]))
    held_out = np.bincount(discs(seed=10, classes=3).ravel())
    for k, name in enumerate(names):
        assert rows[str(k)][:2] == [name, "#" + bytes(colors[k].tolist()).hex()]
        assert [int(rows[str(k)][2]), int(rows[str(k)][4])] == [expected[k], held_out[k]]
    assert "class 2 sign" in output and load_checkpoint("out/unet.safetensors").num_classes == 3


def test_the_palette_of_the_masks_is_that_of_the_pictures(work, monkeypatch):
    from segfast.commands import train

    palette = [10, 20, 30, 200, 100, 0]
    for path in Path("data/masks").iterdir():
        mask = Image.open(path)
        mask.putpalette(palette + [0] * (768 - len(palette)))
        mask.save(path)
    seen = []
    monkeypatch.setattr(
        train, "predictions_figure", lambda *args: seen.append(args[2]) or predictions_figure(*args)
    )
    assert cli.main([*SMALL, "--steps", "1", "--holdout-images", "--holdout", "0.4"]) == 0
    assert seen == [((10, 20, 30), (200, 100, 0))]


def test_whole_images_held_out(work, capsys):
    assert cli.main([*SMALL, "--steps", "1", "--holdout-images", "--holdout", "0.4"]) == 0
    rows = table(capsys.readouterr().out)
    assert sum(int(row[2]) for row in rows.values()) == 3 * 32 * 32
    assert sum(int(row[4]) for row in rows.values()) == 2 * 32 * 32


def test_ignored_values_and_balanced_weights(work, capsys, monkeypatch):
    from segfast.commands import train

    labels = discs(seed=3)
    labels[:8] = 9
    write_pair(work / "data", "cell0", labels)
    seen = []
    trainer = train.Trainer
    monkeypatch.setattr(
        train,
        "Trainer",
        lambda model, options, **more: seen.append(options) or trainer(model, options, **more),
    )
    assert cli.main([*SMALL, "--steps", "1", "--ignore", "9", "--class-weights", "balanced"]) == 0
    rows = table(capsys.readouterr().out)
    counts = [int(rows[k][2]) for k in "01"]
    assert int(rows["255"][1]) == 8 * 24 and len(rows) == 3
    assert seen[0].class_weights == pytest.approx([sum(counts) / 2 / count for count in counts])


def test_regression_from_files(work, capsys):
    for path in Path("data/masks").iterdir():
        values = np.asarray(Image.open(path)) * 2.5 - 1
        path.unlink()
        Image.fromarray(values.astype(np.float32)).save(path.with_suffix(".tif"))
    assert cli.main([*SMALL, "--steps", "4", "--loss", "huber", "--norm", "none"]) == 0
    output = capsys.readouterr().out
    assert "RMSE" in output and "R2" in output and "1.5" in output.split("held out")[0]
    assert load_checkpoint("out/unet.safetensors").num_classes == 1
    with open("out/unet.metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert math.isfinite(float(last["rmse"])) and "miou" not in last


def test_near_a_boundary():
    target = torch.zeros(7, 9, dtype=torch.int64)
    target[:, 5:] = 1
    target[0, 0] = 255
    near = near_boundary(target, 2)
    assert near[3].tolist() == [False, False, False, True, True, True, True, False, False]
    assert not near[0, 0] and not near[:, :3].any()
    confusion = torch.tensor([[3, 1], [0, 4]])
    found = scores(confusion, torch.tensor([[1, 1], [0, 0]]))
    assert (found.pixel_accuracy, found.boundary_accuracy) == (7 / 8, 1 / 2)
    assert math.isnan(scores(confusion).boundary_accuracy)


def test_pictures_have_every_sample_and_panel(work):
    """Image, truth, prediction, wrong pixels; the classes in their colors, errors where there are some."""
    target = torch.zeros(6, 8, dtype=torch.int64)
    target[2:4, 2:4], target[5] = 1, 255
    prediction = target.clone().clamp(max=1)
    prediction[0, 0] = 1
    colors = [(0, 0, 0), (250, 10, 20)]
    figure = predictions_figure([Sample(torch.rand(1, 6, 8), target)] * 2, [prediction] * 2, colors)
    axes = figure.get_axes()
    assert [a.get_title() for a in axes[:4]] == ["image", "truth", "prediction", "wrong pixels"]
    assert len(axes) == 8
    truth, found, wrong = (a.images[0].get_array() for a in axes[1:4])
    assert truth[2, 2].tolist() == [250, 10, 20] and truth[5, 0].tolist() == [128, 128, 128]
    assert found[0, 0].tolist() == [250, 10, 20]
    colored = [(row, column) for row, column in np.argwhere(np.ptp(np.asarray(wrong), axis=2) > 0.1)]
    assert colored == [(0, 0)]


def test_titles_of_narrow_pictures_do_not_meet():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    target = torch.zeros(80, 20, dtype=torch.int64)
    figure = predictions_figure([Sample(torch.rand(1, 80, 20), target)], [target], [(0, 0, 0), (1, 1, 1)])
    FigureCanvasAgg(figure).draw()
    boxes = [axes.title.get_window_extent() for axes in figure.get_axes()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert boxes[0].x0 >= 0 and boxes[-1].x1 <= figure.bbox.x1


def test_tensorboard_where_it_is_installed(work, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert cli.main([*SMALL, "--steps", "2"]) == 0
    assert written[0] == ("out/unet.tensorboard", None) and written[-1] == "closed"
    assert {("loss", 1), ("loss", 2), ("miou", 2), ("iou_1", 2), ("learning_rate", 1)} <= set(written[1:])
    written.clear()
    assert cli.main([*SMALL, "--steps", "2", "--resume"]) == 0
    assert written[0] == ("out/unet.tensorboard", 3)
