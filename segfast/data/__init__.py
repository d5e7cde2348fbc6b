"""The small real data sets, and images and masks read from files."""

from importlib import resources

import numpy as np
import torch
from torch import Tensor

from ._classes import ClassList, read_classes
from ._folder import Sample, image_and_mask_paths, read_folder, split_columns
from ._images import IGNORE_INDEX, normalize, read_colors, read_image, read_mask, read_values, write_mask
from ._photo import read_photo, write_image

__all__ = [
    "IGNORE_INDEX",
    "NUCLEI_TRAIN_COLUMNS",
    "ClassList",
    "Sample",
    "astronaut",
    "image_and_mask_paths",
    "normalize",
    "nuclei",
    "read_classes",
    "read_colors",
    "read_folder",
    "read_image",
    "read_mask",
    "read_photo",
    "read_values",
    "split_columns",
    "write_image",
    "write_mask",
]

NUCLEI_TRAIN_COLUMNS = 384


def nuclei() -> tuple[Tensor, Tensor]:
    """A fluorescence image of 125 hand-segmented nuclei (README.md in this folder: source and terms).

    Columns 0 to 383 are for training, 384 to 511 are held out; foreground is `labels > 0`.

    Returns:
        image: float32 `[1, 512, 512]` in [0, 1].
        labels: int64 `[512, 512]`, 0 background, else the number of the nucleus.

    Source: BBBC038v1, Caicedo et al., Nature Methods 16, 1247-1253, 2019.

    >>> image, labels = nuclei()
    >>> tuple(image.shape), len(labels.unique()) - 1
    ((1, 512, 512), 125)
    """
    with resources.files(__package__).joinpath("nuclei.npz").open("rb") as file, np.load(file) as archive:
        return normalize(archive["image"][None]), torch.from_numpy(archive["labels"].astype(np.int64))


def astronaut() -> Tensor:
    """A portrait of the astronaut Eileen Collins (README.md in this folder: source and terms).

    Returns:
        uint8 `[3, 512, 512]`, RGB.

    Source: NASA, 1992, by way of scikit-image.

    >>> astronaut().shape
    torch.Size([3, 512, 512])
    """
    with resources.as_file(resources.files(__package__).joinpath("astronaut.jpg")) as path:
        return read_photo(path)
