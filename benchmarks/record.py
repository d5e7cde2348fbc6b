"""File what a run brought back: `python -m benchmarks.record FOLDER` (`make record FROM=FOLDER`).

The choices and proofs in its choices/ go into segfast/measured/, where the product finds them, the rows into
benchmarks/results/<gpu or cpu>/<family>.csv, each merged with what is there. Nothing is written before all
is checked. Choices and proofs of kernels in another source than this checkout's, which nothing here would
ever read, are left out, and deleted where they were filed before; those of other GPUs and versions stay.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.rows import FIELDS, KEY, MEASURED, read_rows
from segfast._files import atomic_write
from segfast.kernels import operations, source_digest
from segfast.ops._call import AnyCall
from segfast.ops._choice import ATEN, Choice
from segfast.ops._choice_files import choices_row, file_name, gpu_source, parsed

PROVEN = "proven.json"
SIMULATED = "fake-"  # what the simulated device's name begins with


class Refused(Exception):
    """The folder holds nothing that may be filed, or something that may not."""


def record(source: Path, root: Path = ROOT, say: Callable[[str], object] = print) -> list[Path]:
    """Check and file the contents of `source`; returns what was written. Raises Refused.

    `say` is told of everything that is left out or deleted.
    """
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
    measured, left_out = root / "segfast" / "measured", list[str]()
    for path in sorted((source / "choices").glob("[!.]*.json")):
        if path.name == PROVEN:
            written |= _proven(path, measured, left_out)
        elif _is_of_today(path):
            written |= _choices(path, measured)
        else:
            left_out.append(f"{path}: the choices are of kernels in another source than this checkout's")
    if not written:
        why = "; ".join(left_out) or "it holds none of rows.csv, measured.csv, ceilings.json, choices/*.json"
        raise Refused(f"{source} has nothing to file: {why}")
    outdated = [path for path in sorted(measured.glob("*.json")) if path.name != PROVEN]
    outdated = [path for path in outdated if not _is_of_today(path)]
    if measured / PROVEN not in written and (measured / PROVEN).exists():
        written |= _proven(None, measured, left_out)
    for line in left_out:
        say(f"left out: {line}")
    for path, text in written.items():
        with atomic_write(path) as temporary:
            temporary.write_text(text)
    for path in outdated:
        say(f"deleted: {path}: its choices are of kernels in another source than this checkout's")
        path.unlink()
    return list(written)


def _is_of_today(path: Path) -> bool:
    """True if this checkout would read any choice of a file, on some GPU and versions."""
    machines = [part.get("machine") for part in _json(path, list) if isinstance(part, dict)]
    sources = [here.get("source") for here in machines if isinstance(here, dict) and "gpu" in here]
    return not sources or gpu_source() in sources


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
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _choices(path: Path, folder: Path) -> dict[Path, str]:
    """A file of choices merged with the product's of the same GPU and versions."""
    parts = _checked(path)
    target = folder / path.name
    merged: dict[str, dict[AnyCall, Choice]] = {}
    for here, found in [*(_checked(target) if target.exists() else []), *parts]:
        merged.setdefault(json.dumps(here, sort_keys=True), {}).update(found)
    text = json.dumps([choices_row(json.loads(here), found) for here, found in merged.items()], indent=1)
    return {target: text + "\n"}


def _checked(path: Path) -> list[tuple[dict[str, str], dict[AnyCall, Choice]]]:
    """The machines of a file and their choices: GPUs', of operations there are, measured."""
    content = _json(path, list)
    parts = []
    for part in content:
        try:
            here = part["machine"]
            gpu = _gpu(here.get("gpu"), str(path))
            if path.name != file_name(here):
                raise Refused(f"{path}: it would be looked up as {file_name(here)}")
            found = dict(parsed(row, here) for row in part["choices"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{path} is not a file of choices: {type(error).__name__}: {error}") from None
        for call, choice in found.items():
            unknown = [name for name, *_ in choice.tiles if name not in operations()]
            if unknown:
                raise Refused(f"{path}: {gpu} has tiles of {', '.join(unknown)}, which no kernel is")
            timed = choice.us or {ATEN: 1.0}  # nothing else could run it
            if choice.name not in timed or not min(timed.values()) > 0:
                raise Refused(f"{path}: {choice.name} was not measured for {call}")
        parts.append((here, found))
    return parts


def _proven(path: Path | None, folder: Path, left_out: list[str]) -> dict[Path, str]:
    """Those that are filed and those of `path`, but for proofs of kernels in another source."""
    target = folder / PROVEN
    new = {} if path is None else _json(path)
    merged = _json(target) if target.exists() else {}
    before = json.dumps(merged)
    for gpu, proofs in new.items():
        _gpu(gpu, str(path))
        for name, proof in proofs.items():
            if not all(proof.get(what) for what in ("source", "triton", "cases")):
                raise Refused(
                    f"{path}: the proof of {name} does not name its source, Triton's version and cases"
                )
            if name.rpartition(".")[0] not in operations():
                raise Refused(f"{path}: {name} is no kernel's")
        merged.setdefault(gpu, {}).update(proofs)
    for gpu, proofs in merged.items():
        others = [name for name, proof in proofs.items() if not _counts(name, proof)]
        for name in others:
            del proofs[name]
        if others:
            left_out.append(f"{gpu}: proofs of kernels in another source: {', '.join(sorted(others))}")
    merged = {gpu: proofs for gpu, proofs in merged.items() if proofs}
    return {} if path is None and json.dumps(merged) == before else {target: _dump(merged)}


def _counts(name: str, proof: dict[str, Any]) -> bool:
    """True if this checkout would take a proof, on its GPU and with some Triton."""
    operation = name.rpartition(".")[0]
    return operation in operations() and proof.get("source") == source_digest(operation)


def _gpu(name: Any, path: str) -> str:
    if not name or name == "cpu" or name.startswith(SIMULATED):
        raise Refused(f"{path}: measured on {name or 'an unnamed device'}, not on a GPU")
    return name


def _json(path: Path, kind: type = dict) -> Any:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise Refused(f"{path} is not JSON: {error}") from None
    if not isinstance(content, kind):
        raise Refused(f"{path}: expected a {kind.__name__} in JSON, got a {type(content).__name__}")
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
