"""A folder of images and masks, and the split into a training and a held-out region."""

import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from segfast._errors import UserError

from ._images import SUFFIXES, read_image, read_mask


class Sample(NamedTuple):
    """An image, float32 `[C, H, W]`, and its class indices, int64 `[H, W]`."""

    image: Tensor
    target: Tensor


def image_and_mask_paths(folder: str | os.PathLike) -> list[tuple[Path, Path]]:
    """`folder/images/NAME.*` with `folder/masks/NAME.*`, in order of name.

    Raises:
        UserError: a folder is missing or empty, or an image has no mask.
    """
    images, masks = _by_stem(Path(folder) / "images"), _by_stem(Path(folder) / "masks")
    for stem, path in sorted(images.items()):
        if stem not in masks:
            raise UserError(f"{path}: no mask named {stem}.* in {Path(folder) / 'masks'}")
    return [(path, masks[stem]) for stem, path in sorted(images.items())]


def read_folder(folder: str | os.PathLike, channels: int = 1, foreground: bool = False) -> list[Sample]:
    """Read the images and masks of `image_and_mask_paths`.

    Raises:
        UserError: as there, and if the sizes of a pair differ, or a file is bad (see `read_image`,
            `read_mask`).
    """
    samples = []
    for path, mask_path in image_and_mask_paths(folder):
        sample = Sample(read_image(path, channels), read_mask(mask_path, foreground))
        if sample.image.shape[1:] != sample.target.shape:
            size, mask_size = (
                f"{shape[0]}x{shape[1]}" for shape in (sample.image.shape[1:], sample.target.shape)
            )
            raise UserError(f"{mask_path}: the mask is {mask_size}, its image {path} is {size}")
        samples.append(sample)
    return samples


def split_columns(samples: list[Sample], holdout: float = 0.25) -> tuple[list[Sample], list[Sample]]:
    """Hold out the rightmost `holdout` of every image's columns.

    Raises:
        UserError: `holdout` is not between 0 and 1, or leaves an image without columns on one side.
    """
    if not 0 < holdout < 1:
        raise UserError(f"--holdout {holdout}: expected a fraction between 0 and 1")
    train, test = [], []
    for image, target in samples:
        column = round(target.shape[1] * (1 - holdout))
        if not 0 < column < target.shape[1]:
            raise UserError(
                f"--holdout {holdout}: an image {target.shape[1]} columns wide cannot be split so"
            )
        train.append(Sample(image[..., :column], target[..., :column]))
        test.append(Sample(image[..., column:], target[..., column:]))
    return train, test


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected FOLDER/images and FOLDER/masks with files of equal names"
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise UserError(f"{path}: {found[path.stem].name} has the same name; one file for each name")
            found[path.stem] = path
    if not found:
        raise UserError(f"{folder}: no file ending in one of {', '.join(SUFFIXES)}")
    return found
