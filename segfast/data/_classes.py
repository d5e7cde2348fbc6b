"""The classes of a data set: their names, and the colors that stand for them in masks and in pictures."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from segfast._errors import UserError

from ._images import IGNORE_INDEX, PALETTE

Color = tuple[int, int, int]


class ClassList(NamedTuple):
    """Names and colors (red, green, blue, 0..255) of class 0, 1, ..., and a color that is not scored.

    `in_masks` says whether all colors were given, so that masks may be color images.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    in_masks: bool = False
    ignore: Color | None = None

    def labels(self, pixels: np.ndarray, path: str | os.PathLike) -> Tensor:
        """The class indices int64 `[H, W]` of a color mask, uint8 `[3, H, W]`.

        Raises:
            UserError: a pixel has the color of no class.
        """
        colors = [*self.colors, *([self.ignore] if self.ignore is not None else [])]
        values = [*range(len(self.colors)), IGNORE_INDEX]
        keys = pixels.astype(np.int64)[0] * 65536 + pixels.astype(np.int64)[1] * 256 + pixels[2]
        labels = np.full(keys.shape, -1, np.int64)
        for color, value in zip(colors, values, strict=False):
            labels[keys == color[0] * 65536 + color[1] * 256 + color[2]] = value
        if (labels < 0).any():
            row, column = (int(i[0]) for i in np.nonzero(labels < 0))
            found = "#" + bytes(pixels[:, row, column].tolist()).hex()
            raise UserError(
                f"{path}: the color {found} (row {row}, column {column}) is that of no class; those are "
                + ", ".join("#" + bytes(color).hex() for color in colors)
            )
        return torch.from_numpy(labels)


def default_classes(count: int) -> ClassList:
    """Classes without names, in the colors of `segfast.data.write_mask`."""
    colors = [_palette_color(k) for k in range(count)]
    return ClassList(tuple(f"class {k}" for k in range(count)), tuple(colors))


def read_classes(path: str | os.PathLike) -> ClassList:
    """Read a class list from a JSON.

    It is a list with an item for each class, or an object with that under "classes" and, under "ignore", the
    color of pixels that are not scored. An item is a name, or an object with "name" and "color": "#rrggbb" or
    a list of red, green and blue. If every class has a color, masks may be color images.

    Raises:
        UserError: no such file, no JSON, another form, a name or color given twice, fewer than 2 classes.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON ({str(error).splitlines()[0]})") from error
    ignore = content.get("ignore") if isinstance(content, dict) else None
    items = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise UserError(f'{path}: expected a list of classes, or an object with one under "classes"')
    if not 2 <= len(items) <= IGNORE_INDEX:
        raise UserError(f"{path}: expected 2 to {IGNORE_INDEX} classes, got {len(items)}")
    names: list[Any] = [item.get("name") if isinstance(item, dict) else item for item in items]
    for name in names:
        if not isinstance(name, str) or not name.strip() or names.count(name) > 1:
            raise UserError(f"{path}: every class must have a name of its own, got {name!r}")
    given = [item.get("color") if isinstance(item, dict) else None for item in items]
    colors = [_palette_color(k) if color is None else _color(color, path) for k, color in enumerate(given)]
    unscored = None if ignore is None else _color(ignore, path)
    in_masks = None not in given
    if in_masks and len({*colors, unscored}) <= len(colors):
        raise UserError(f"{path}: two classes have one color")
    return ClassList(tuple(names), tuple(colors), in_masks, unscored)


def _palette_color(index: int) -> Color:
    start = 3 * index % len(PALETTE)
    return tuple(PALETTE[start : start + 3])  # type: ignore[return-value]


def _color(value: Any, path: Path) -> Color:
    try:
        numbers: Sequence[int] = (
            [*bytes.fromhex(value.removeprefix("#"))] if isinstance(value, str) else value
        )
        red, green, blue = (int(n) for n in numbers)
        if all(0 <= n <= 255 for n in (red, green, blue)):
            return red, green, blue
    except (TypeError, ValueError):
        pass
    raise UserError(f'{path}: a color must be "#rrggbb" or three numbers from 0 to 255, got {value!r}')
