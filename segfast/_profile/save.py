"""The files of a profile: table, trace, page and picture, each written whole."""

import csv
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .._errors import UserError
from .._files import atomic_write
from ..commands._output import claim
from ..train._figures import new_figure, save_figure
from .figure import roofline_figure
from .page import html_page
from .quantities import shape
from .rows import Profile, Row
from .trace import trace

FILES = ("profile.csv", "trace.json", "profile.html", "roofline.png")
_FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def claim_files(folder: str | os.PathLike, *, force: bool = False) -> list[Path]:
    """The paths that `save` writes, after a check, before any work is done for them, that it may.

    The picture is left out where the package matplotlib is missing.

    Raises:
        UserError: a file exists that segfast did not write, and `force` is not set; or it cannot be written.
    """
    names = [name for name in FILES if draws() or not name.endswith(".png")]
    return [claim(Path(folder) / name, force=force) for name in names]


def draws() -> bool:
    """True if matplotlib is there to draw with."""
    try:
        new_figure()
    except UserError:
        return False
    return True


def save(profile: Profile, folder: str | os.PathLike, *, force: bool = False) -> list[Path]:
    """Write a profile into `folder`, which is made if it does not exist.

    `profile.csv` has all rows with all that is known of them, `trace.json` opens in Perfetto, `profile.html`
    is one page that loads nothing, `roofline.png` (which needs matplotlib) is for reports.

    Returns:
        The paths of the files.

    Raises:
        UserError: as `claim_files`.
    """
    paths = claim_files(folder, force=force)
    for path in paths:
        if path.suffix == ".png":
            save_figure(roofline_figure(profile), path)
            continue
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                csv.writer(file).writerows(csv_rows(profile))
            elif path.suffix == ".json":
                json.dump(trace(profile), file)
            else:
                file.write(html_page(profile))
    return paths


def csv_rows(profile: Profile) -> Iterator[list[object]]:
    """A header and a line for each row: of the model as it was given, then of the optimized one."""
    yield ["model", *_FIELDS, "intensity"]
    for model, each in (("given", profile), ("optimized", profile.optimized)):
        for row in each.rows if each is not None else ():
            candidates = "; ".join(f"{name} {us:.6g}" for name, us in row.candidates)
            told = {**dataclasses.asdict(row), "output": shape(row), "candidates": candidates}
            yield [model, *(told[name] for name in _FIELDS), row.intensity]
