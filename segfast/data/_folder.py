"""Folders of images and masks: which belong together, and samples that are read when they are needed."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from segfast._errors import UserError

from ._images import SUFFIXES, read_image, read_mask

# Samples that were read stay in memory up to so many bytes, a process.
MOST_KEPT = 2 * 2**30
# Before what ends a name and says what the file is, as in cell_mask.png.
SEPARATORS = "_-."


class Sample(NamedTuple):
    """An image, float32 `[C, H, W]`, and its class indices, int64 `[H, W]`."""

    image: Tensor
    target: Tensor


def image_and_mask_paths(folder: str | os.PathLike) -> list[tuple[Path, Path]]:
    """`folder/images/NAME.*` with `folder/masks/NAME.*`, in order of name.

    All images, all masks, or both may have names with one ending more, as in `NAME_image.*`, `NAME_mask.*`.

    Raises:
        UserError: a folder is missing or empty, or an image has no mask.
    """
    images, masks = _by_stem(Path(folder) / "images"), _by_stem(Path(folder) / "masks")
    for image_ending in ("", *_common_endings(images)):
        for mask_ending in ("", *_common_endings(masks)):
            pairs = _pairs(images, masks, image_ending, mask_ending)
            if len(pairs) == len(images):
                return [pair for _, pair in sorted(pairs.items())]
    missing = min(images.keys() - _pairs(images, masks, "", "").keys())
    raise UserError(
        f"{images[missing]}: no mask named {missing}.* in {Path(folder) / 'masks'}, nor with one ending for "
        f"all, as in {missing}_mask.*"
    )


def read_folder(folder: str | os.PathLike, channels: int = 1, foreground: bool = False) -> list[Sample]:
    """Read the images and masks of `image_and_mask_paths`.

    Raises:
        UserError: as there, and if the sizes of a pair differ, or a file is bad (see `read_image`,
            `read_mask`).
    """
    return [
        read_pair(*pair, lambda path: read_image(path, channels), lambda path: read_mask(path, foreground))
        for pair in image_and_mask_paths(folder)
    ]


def read_pair(
    path: Path, mask_path: Path, image: Callable[[Path], Tensor], mask: Callable[[Path], Tensor]
) -> Sample:
    """Read an image and its mask with these functions.

    Raises:
        UserError: theirs, or the sizes differ.
    """
    sample = Sample(image(path), mask(mask_path))
    check_sizes(path, sample.image.shape[1:], mask_path, sample.target.shape[-2:])
    return sample


def check_sizes(path: Path, size: Sequence[int], mask_path: Path, mask_size: Sequence[int]) -> None:
    """Raise UserError if an image and its mask differ in height and width."""
    if tuple(size) != tuple(mask_size):
        raise UserError(
            f"{mask_path}: the mask is {mask_size[0]}x{mask_size[1]}, its image {path} is {size[0]}x{size[1]}"
        )


class FolderSamples(Sequence[Sample]):
    """Samples that are read when they are asked for, and kept while there is room for them."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]], read: Callable[[Path, Path], Sample]) -> None:
        self.pairs, self.read = pairs, read
        self._kept: dict[int, Sample] = {}
        self._room = MOST_KEPT

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        if index in self._kept:
            return self._kept[index]
        sample = self.read(*self.pairs[index])
        self._room -= sum(tensor.nbytes for tensor in sample)
        if self._room >= 0:
            self._kept[index] = sample
        return sample


class ColumnsOf(Sequence[Sample]):
    """Of each of the samples the columns that are for training, or those held out, the rightmost."""

    def __init__(self, samples: Sequence[Sample], holdout: float, held_out: bool) -> None:
        self.samples, self.holdout, self.held_out = samples, holdout, held_out

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        image, target = self.samples[index]
        return Sample(self.columns(image), self.columns(target))

    def columns(self, tensor: Tensor) -> Tensor:
        """The part of an image or a mask, `[..., W]`."""
        column = round(tensor.shape[-1] * (1 - self.holdout))
        if not 0 < column < tensor.shape[-1]:
            raise UserError(
                f"--holdout {self.holdout}: an image {tensor.shape[-1]} columns wide cannot be split so"
            )
        return tensor[..., column:] if self.held_out else tensor[..., :column]


def split_columns(samples: Sequence[Sample], holdout: float = 0.25) -> tuple[list[Sample], list[Sample]]:
    """Hold out the rightmost `holdout` of every image's columns.

    Raises:
        UserError: `holdout` is not between 0 and 1, or leaves an image without columns on one side.
    """
    check_holdout(holdout)
    return [*ColumnsOf(samples, holdout, False)], [*ColumnsOf(samples, holdout, True)]


def check_holdout(holdout: float) -> None:
    """Raise UserError unless this is a share between 0 and 1."""
    if not 0 < holdout < 1:
        raise UserError(f"--holdout {holdout}: expected a fraction between 0 and 1")


def _pairs(
    images: dict[str, Path], masks: dict[str, Path], image_ending: str, mask_ending: str
) -> dict[str, tuple[Path, Path]]:
    """By stem those images that have a mask, if all images' stems and all masks' have these endings more."""
    found = {}
    for stem, path in images.items():
        mask = masks.get(stem.removesuffix(image_ending) + mask_ending)
        if mask is not None:
            found[stem] = (path, mask)
    return found


def _common_endings(stems: Iterable[str]) -> Iterator[str]:
    """Endings that all stems have, from a separator on, the longest first."""
    stems = list(stems)
    first = stems[0]
    for place, letter in enumerate(first):
        ending = first[place:]
        if place and letter in SEPARATORS and all(stem.endswith(ending) for stem in stems):
            yield ending


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
