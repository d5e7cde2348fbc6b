"""A folder of images and masks to train on, and the arguments of a small training."""

import contextlib
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@contextlib.contextmanager
def files_up_to(size):
    """No file may grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leave_a_mark(figure, path):
    """Write a file that segfast may replace, in place of a picture."""
    Path(path).write_bytes(b"tEXtSoftware\0segfast")


# What takes the place of `segfast.commands.train`'s pictures where nobody looks at them: drawing takes longer
# than a small training.
UNDRAWN = {
    "save_figure": leave_a_mark,
    "curves_figure": lambda *_: None,
    "predictions_figure": lambda *_: None,
}


@pytest.fixture
def undrawn(monkeypatch):
    for name, nothing in UNDRAWN.items():
        monkeypatch.setattr(f"segfast.commands.train.{name}", nothing)


SMALL = ["train", "--data", "data", "--width", "2", "--depth", "1", "--size", "16", "--batch", "2"]


def write_pair(folder, name, labels, ending="", noise=20):
    """An image, brighter where the class is higher, and its mask."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    labels = np.asarray(labels, np.uint8)
    generator = np.random.default_rng(sum(name.encode()))
    image = 60.0 * np.minimum(labels, 3) + generator.uniform(0, noise, labels.shape)
    Image.fromarray(image.astype(np.uint8)).save(folder / "images" / f"{name}.png")
    Image.fromarray(labels).save(folder / "masks" / f"{name}{ending}.png")


def discs(size=32, seed=0, classes=2):
    """Class indices of discs at random."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.uint8)
    for k in range(1, classes):
        for _ in range(3):
            row, column = generator.integers(0, size, 2)
            labels[(y - row) ** 2 + (x - column) ** 2 < (size / 6) ** 2] = k
    return labels


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Run in a folder whose data/ has five images of two classes."""
    monkeypatch.chdir(tmp_path)
    for index in range(5):
        write_pair(tmp_path / "data", f"cell{index}", discs(seed=index))
    return tmp_path
