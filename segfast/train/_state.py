"""The file from which an interrupted training goes on: all that changes, and the options it had."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from segfast._errors import UserError, describe
from segfast._files import atomic_write

# The first entry, within the file's first kilobyte (see `segfast.commands._output`).
WRITER = "segfast train"


def write_state(path: Path, settings: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Write a training's state whole or not at all; what was there stays until then, also if power fails.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"written by": WRITER, "settings": dict(settings), "state": dict(state)}, file)
        except RuntimeError as error:  # so torch tells of a write that failed
            raise OSError(describe(error)) from error
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path, settings: Mapping[str, str]) -> dict[str, Any]:
    """The state that `write_state` wrote of a training with these settings.

    Raises:
        UserError: not such a file, damaged, or of other settings: the first of them is named.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, state = content["settings"], content["state"]
    except Exception as error:  # torch raises many kinds: RuntimeError, UnpicklingError, EOFError, ...
        raise UserError(f"{path}: not a readable checkpoint of segfast train ({describe(error)})") from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise UserError(
                f"{path}: this training began with {name} {found.get(name)}, not {value}; --resume goes on "
                "with the same options, without it a new training begins"
            )
    return state


def remove_leftovers(path: Path) -> None:
    """Remove what a process left of `path` that was killed while it wrote it."""
    for leftover in path.parent.glob(f".{path.stem[:32]}.????????{path.suffix}"):
        leftover.unlink(missing_ok=True)
