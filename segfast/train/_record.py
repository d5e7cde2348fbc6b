"""The course of a training: a row a step in a CSV, and TensorBoard's events if that is installed."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segfast._errors import UserError
from segfast._files import atomic_write

# As every such file begins (see `segfast.commands._output`).
COLUMNS = ("step", "epoch", "learning_rate", "loss")


class Record:
    """The rows of `metrics.csv`, written as they come; those up to `step` stay when a training goes on.

    Raises:
        UserError: a file cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int, board: Path) -> None:
        self.path, self.columns = path, (*COLUMNS, *columns)
        kept = read_record(path, self.columns) if step and path.exists() else []
        self.rows = [row for row in kept if int(row["step"]) <= step]
        with atomic_write(path) as temporary:
            temporary.write_text(self._line(self.columns) + "".join(map(self._values, self.rows)))
        try:
            self._file = path.open("ab", buffering=0)
            self._board = _board(board, step)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from error

    def add(self, row: Mapping[str, float]) -> None:
        """Add the row of a step; what it lacks stays empty. Numbers are read again as they were."""
        texts = {name: repr(row[name]) if name in row else "" for name in self.columns}
        self.rows.append(texts)
        try:
            self._file.write(self._values(texts).encode())
            if self._board is not None:
                for name, value in row.items():
                    if name != "step":
                        self._board.add_scalar(name, value, int(row["step"]))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _values(self, row: Mapping[str, str]) -> str:
        return self._line([row[name] for name in self.columns])

    def _line(self, values: Sequence[str]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue()


def read_record(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The whole rows of such a file; none of a file with other columns."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    reader = csv.DictReader([line for line in lines if line.endswith("\n")])
    if tuple(reader.fieldnames or ()) != tuple(columns):
        return []
    return [row for row in reader if None not in row and None not in row.values() and row["step"].isdecimal()]


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which forgets what came after `step`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
