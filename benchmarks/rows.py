"""Rows of measurements: one candidate of one case each, appended to a CSV file as they come."""

import csv
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.timing import Measurement

NAMES = ("tier", "case", "family", "op", "layer", "dtype", "direction", "size", "candidate", "ours", "status")
TIMES = ("gpu_us", "gpu_p20", "gpu_p80", "wall_us", "wall_p20", "wall_p80")
NUMBERS = (
    "error",
    *TIMES,
    "graph_us",
    "cold_ms",
    "peak_mb",
    "runs",
    "gflop",
    "min_mb",
    "floor_us",
    "fraction",
)
VERSIONS = (
    "gpu", "arch", "torch", "triton", "cudnn", "cuda", "driver", "python", "commit", "date", "cpu", "isa",
    "threads",
)  # fmt: skip
FIELDS = [*NAMES, *NUMBERS, "floor_by", "note", "dry_run", *VERSIONS]
MEASURED = "measured.csv"  # rows of every run so far, each appended as it was measured
KEY = ("tier", "case", "dtype", "direction", "size", "candidate")


def floor(case: Case, ceilings: Mapping[str, float]) -> tuple[float, str]:
    """Microseconds no implementation runs much under, and which ceiling sets them; NaN without ceilings.

    The largest of useful FLOPs over the matrix rate, bytes over the copy rate, an implicit GEMM's L2 reads
    over the L2 rate, and exponentials over the exp2 rate.
    """
    rate = ceilings.get({"tf32": "tf32_tflops", "float32": "fp32_tflops"}.get(case.dtype, "bf16_tflops"))
    terms = {
        "flops": (case.useful_flops, rate and rate * 1e12),
        "bytes": (case.min_bytes, ceilings.get("copy_gbs", 0) * 1e9),
        "l2": (case.l2_bytes, ceilings.get("l2_gbs", 0) * 1e9),
        "exp2": (case.exponentials, ceilings.get("exp2_gops", 0) * 1e9),
    }
    times = {name: 1e6 * amount / rate for name, (amount, rate) in terms.items() if rate and amount}
    if not times:
        return math.nan, ""
    by = max(times, key=lambda name: times[name])
    return times[by], by


def make_row(
    tier: str,
    case: Case,
    measured: Measurement,
    ceilings: Mapping[str, float],
    environment: Mapping[str, str],
    dry_run: bool,
) -> dict[str, Any]:
    """The row of one candidate."""
    floor_us, floor_by = floor(case, ceilings)
    timing = measured.timing
    row: dict[str, Any] = {
        "tier": tier,
        "case": case.name,
        "family": case.family,
        "op": case.op,
        "layer": case.layer,
        "dtype": measured.dtype or case.dtype,
        "direction": case.direction,
        "size": case.size,
        "candidate": measured.candidate,
        "ours": int(measured.ours),
        "status": measured.status,
        "error": measured.error,
        "graph_us": measured.graph_us,
        "cold_ms": measured.cold_ms,
        "peak_mb": measured.peak_mb,
        "gflop": case.flops / 1e9,
        "min_mb": case.min_bytes / 1e6,
        "floor_us": floor_us,
        "floor_by": floor_by,
        "note": measured.note,
        "dry_run": int(dry_run),
        **environment,
    }
    if timing is not None:
        row.update({name: getattr(timing, name) for name in (*TIMES, "runs")})
        row["fraction"] = floor_us / timing.us
    return row


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("\n", " ")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append, the header first in a new file, and have it on disk before returning.

    Raises ValueError for a file with other columns.
    """
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            _check_columns(path, csv.DictReader(file))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="raise", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({name: _cell(row.get(name)) for name in FIELDS} for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _check_columns(path: Path, reader: csv.DictReader) -> None:
    if reader.fieldnames != FIELDS:
        raise ValueError(f"{path}: expected the columns {' '.join(FIELDS)}, got {reader.fieldnames}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows with numbers as floats (NaN where empty), and `ours` and `dry_run` as bool.

    Raises ValueError for a file with other columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        _check_columns(path, reader)
        rows: list[dict[str, Any]] = list(reader)
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path}: a row of {row['case']} has a wrong number of columns")
        row.update({name: float(row[name] or "nan") for name in NUMBERS})
        row.update({name: row[name] == "1" for name in ("ours", "dry_run")})
    return rows


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of the positive values; NaN if there is none."""
    known = [value for value in values if value > 0]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else math.nan


def time_us(row: Mapping[str, Any]) -> float:
    """The figure rows are compared by: device time where there is one, else host time."""
    return row["wall_us"] if math.isnan(row["gpu_us"]) else row["gpu_us"]
