"""Files that a command may write: new ones, those that segfast wrote, others only when told to."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .._errors import UserError

# How the files that commands write begin, by suffix: what a PNG's text, a network's header, a JSON, the first
# line of a profile or of a training's metrics, a training's checkpoint and an ONNX model say.
MARKS = {
    ".png": (b"tEXtSoftware\0segfast",),
    ".safetensors": (b'"__metadata__":{"segfast":',),
    ".html": (b"<title>segfast",),
    ".json": (b'"written by": "segfast ',),
    ".csv": (b"model,name,kind,direction,start_us,", b"step,epoch,learning_rate,loss"),
    ".checkpoint": (b"segfast train",),
    ".onnx": (b"\x12\x07segfast",),  # its second field: the producer
}
# No more of a file is looked at: matplotlib writes its text before the pixels, too.
HEAD = 1024


def claim(path: str | os.PathLike, *, force: bool = False) -> Path:
    """Check, before any work is done for it, that `path` may be written.

    A file that exists is replaced only if a command of segfast wrote it, or with `force`.

    Raises:
        UserError: it may not, or cannot.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder")
        parent = next(p for p in path.absolute().parents if p.exists())
        if not parent.is_dir():
            raise UserError(f"{path}: {parent} is not a folder")
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise UserError(f"{path}: the folder {parent} cannot be written to ({error.strerror})") from error
        if path.exists() and not force and not _own(path):
            raise UserError(f"{path}: exists and is not a file that segfast wrote; --force replaces it")
    except OSError as error:  # a name that is too long, a file that cannot be read
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
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


def _own(path: Path) -> bool:
    marks = MARKS.get(path.suffix.lower(), ())
    if not marks or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(HEAD)
    return any(mark in head for mark in marks)
