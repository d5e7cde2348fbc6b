"""Which files a command may write: new ones, its own under the output folder, others only when told to."""

import os
from collections.abc import Sequence
from pathlib import Path

from ._errors import UserError

# Every file the commands write carries this in its first kilobyte (PNG text, safetensors header).
MARK = b"segfast"


def claim(path: str | os.PathLike, *, force: bool = False, folder: str | os.PathLike = "out") -> Path:
    """Check, before any work is done for it, that `path` may be written.

    A file that exists is replaced only if it lies in `folder` and a command of segfast wrote it, or
    with `force`.

    Raises:
        UserError: it may not, or cannot.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"{path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{path}: the folder {parent} cannot be written to")
    if path.exists() and not force and not _own(path, Path(folder)):
        raise UserError(
            f"{path}: exists and is not a file that segfast wrote under {folder}; --force replaces it"
        )
    return path


def claim_each(outputs: Sequence[Path], inputs: Sequence[Path], *, force: bool = False) -> None:
    """`claim` the output of every input.

    Raises:
        UserError: two inputs have the same output, or as `claim`.
    """
    for index, path in enumerate(outputs):
        if path in outputs[:index]:
            first = inputs[outputs.index(path)]
            raise UserError(f"{inputs[index]} and {first} would both be written to {path}")
        claim(path, force=force)


def _own(path: Path, folder: Path) -> bool:
    if not path.resolve().is_relative_to(folder.resolve()):
        return False
    with path.open("rb") as file:
        return MARK in file.read(1024)
