"""File what a run brought back: `python -m benchmarks.record FOLDER` (`make record FROM=FOLDER`).

configs.json goes into kernels/configs/<gpu>.json, proven.json into kernels/configs/proven.json, the rows into
benchmarks/results/<gpu or cpu>/<family>.csv, each merged with what is there. Nothing is written before all
is checked.
"""

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.rows import FIELDS, KEY, MEASURED, read_rows
from segfast._files import atomic_write


class Refused(Exception):
    """The folder holds nothing that may be filed, or something that may not."""


def record(source: Path, root: Path = ROOT) -> list[Path]:
    """Check and file the contents of `source`; returns what was written. Raises Refused."""
    if not source.is_dir():
        raise Refused(f"{source} is not a folder")
    written: dict[Path, str] = {}
    rows = [path for path in (source / MEASURED, source / "rows.csv") if path.exists()]
    if rows:
        written |= _rows(rows, root / "benchmarks" / "results")
    if (source / "ceilings.json").exists():
        content = _json(source / "ceilings.json")
        if content.get("dry_run", True):
            raise Refused("ceilings.json comes from a dry run")
        path = root / "benchmarks" / "results" / _gpu(content.get("gpu"), "ceilings.json") / "ceilings.json"
        written[path] = _dump(content)
    if (source / "configs.json").exists():
        written |= _configs(source / "configs.json", root / "kernels" / "configs")
    if (source / "proven.json").exists():
        written |= _proven(source / "proven.json", root / "kernels" / "configs" / "proven.json")
    if not written:
        raise Refused(
            f"{source} holds none of rows.csv, measured.csv, ceilings.json, configs.json, proven.json"
        )
    for path, text in written.items():
        with atomic_write(path) as temporary:
            temporary.write_text(text)
    return list(written)


def _rows(paths: Sequence[Path], results: Path) -> dict[Path, str]:
    raw = [row for path in paths for row in _fileable(path)]
    written = {}
    for gpu, family in dict.fromkeys((row["gpu"], row["family"]) for row in raw):
        target = results / gpu / f"{family}.csv"
        new = [row for row in raw if (row["gpu"], row["family"]) == (gpu, family)]
        merged = {tuple(row[name] for name in (*KEY, "date")): row for row in [*_read(target), *new]}
        written[target] = _csv(list(merged.values()))
    return written


def _fileable(path: Path) -> list[dict[str, str]]:
    """The rows of a file that are kept, all checked: a GPU's, and a named CPU's of cases in full size.

    A row of a case in which the process died has no device: the log is where it is kept.
    """
    try:
        checked = read_rows(path)
    except ValueError as error:
        raise Refused(str(error)) from None
    if any(row["dry_run"] for row in checked):
        raise Refused(f"{path} has rows of a dry run")
    kept = []
    for row, raw in zip(checked, _read(path), strict=True):
        if row["gpu"] == "cpu" and row["cpu"]:
            kept += [raw] if row["size"] == "full" else []
        elif row["gpu"]:
            _gpu(row["gpu"], str(path))
            if row["status"] == "ok" and not (row["gpu_us"] > 0 or row["graph_us"] > 0):
                raise Refused(f"{path}: {row['case']} {row['candidate']} is ok, but has no device time")
            kept.append(raw)
    return kept


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _csv(rows: Sequence[dict[str, str]]) -> str:
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _configs(path: Path, folder: Path) -> dict[Path, str]:
    from segfast.kernels import Config

    new = _json(path)
    gpu = _gpu(new.get("gpu"), str(path))
    names = {field.name for field in dataclasses.fields(Config)}
    for operation, buckets in new.get("operations", {}).items():
        for bucket, row in buckets.items():
            times = [row.get("us", 0), row.get("aten_us", 0)]
            times += [value for name, value in row.items() if name.endswith("_us")]
            if not names >= set(row.get("config", {})) or min(times) <= 0:
                raise Refused(f"{path}: {operation} {bucket} is not a measured configuration: {row}")
    if not new.get("operations"):
        raise Refused(f"{path} holds no operation")
    target = folder / f"{gpu}.json"
    table = _json(target) if target.exists() else {}
    operations = table.get("operations", {})
    for operation, buckets in new["operations"].items():
        own = operations.setdefault(operation, {})
        for bucket, row in buckets.items():
            # A row timed as part of another operation does not replace the kernel's own.
            if "timed_as" not in row or "timed_as" in own.get(bucket, row):
                own[bucket] = row
    return {target: _dump({**table, **new, "operations": operations})}


def _proven(path: Path, target: Path) -> dict[Path, str]:
    new = _json(path)
    merged = _json(target) if target.exists() else {}
    for arch, proofs in new.items():
        if not arch.startswith(("sm_", "gfx")):
            raise Refused(f"{path}: {arch!r} is no GPU's architecture")
        for name, proof in proofs.items():
            if not all(proof.get(what) for what in ("source", "gpu", "triton")):
                raise Refused(
                    f"{path}: the proof of {name} does not name its source, its GPU and Triton's version"
                )
        merged.setdefault(arch, {}).update(proofs)
    return {target: _dump(merged)}


def _gpu(name: Any, path: str) -> str:
    if not name or name == "cpu":
        raise Refused(f"{path}: measured on {name or 'an unnamed device'}, not on a GPU")
    return name


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Refused(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _dump(content: dict) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    try:
        written = record(parser.parse_args(argv).folder)
    except Refused as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
