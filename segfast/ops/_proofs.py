"""Proofs of kernels by GPU: what `_prove` found, remembered on disk.

The files are {gpu: {"operation.dtype": {"passed": bool, "source": digest, "triton": version, "torch":
version, "date": day, "cases": how many}}}: one the package brings, one in the user's cache, which prevails. A
proof made with other device code, or by a Triton of another minor version, does not count.
"""

import datetime
import functools
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._files import temporary_beside
from ._choice_files import in_turn, measured_folders, warn_unwritable
from ._gpu import gpu_name
from ._operands import load_kernels
from ._prove import DTYPES, ProofRow, prove
from ._prove_apart import NOTHING_RUN, prove_apart

_FILE = "proven.json"


def proven(operation: str, dtype: torch.dtype, device: torch.device) -> bool:
    """True if `operation` in `dtype` was proven right on a GPU like `device`."""
    return _judged(_gpu(device)).get(_key(operation, dtype), False)


def disproven(operation: str, dtype: torch.dtype, device: torch.device) -> bool:
    """True if `operation` in `dtype` was seen to be wrong on a GPU like `device`."""
    return _judged(_gpu(device)).get(_key(operation, dtype)) is False


def unjudged(operations: Iterable[str], dtype: torch.dtype, device: torch.device) -> list[str]:
    """Those of `operations` that nothing is known of on a GPU like `device`."""
    known = _judged(_gpu(device))
    return [operation for operation in operations if _key(operation, dtype) not in known]


def prove_family(
    family: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype] = DTYPES,
    on_row: Callable[[ProofRow], None] = lambda row: None,
    apart: bool = True,
) -> list[ProofRow]:
    """Prove a family's kernels and remember what came of it; `apart` in processes of their own.

    `on_row` is told of each case as it is done.
    """
    rows = []
    for row in (prove_apart if apart else prove)(device, tuple(dtypes), families=(family,)):
        on_row(row)
        rows.append(row)
    # A process that could not begin, or was stopped, has disproven nothing.
    write([row for row in rows if row.case != NOTHING_RUN], device)
    return rows


def write(rows: Sequence[ProofRow], device: torch.device) -> None:
    """Add what `rows` prove or disprove to the user's file. One that cannot be written is a warning."""
    import triton

    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    found: dict[str, Any] = {}
    for row in rows:
        entry = found.setdefault(
            f"{row.operation}.{row.dtype}",
            {
                "passed": True,
                "source": load_kernels().source_digest(row.operation),
                "triton": triton.__version__,
                "torch": torch.__version__,
                "date": today,
                "cases": 0,
            },
        )
        entry["passed"] &= row.passed
        entry["cases"] += 1
    gpu, path = _gpu(device), file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_turn(path):
            content = _content(path)
            content.setdefault(gpu, {}).update(found)
            with temporary_beside(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        warn_unwritable(error)
    _judged(gpu).update({name: entry["passed"] for name, entry in found.items()})


def is_remembered(rows: Sequence[ProofRow], device: torch.device) -> bool:
    """True if the next process will know what `rows` prove or disprove."""
    forget()
    known = _judged(_gpu(device))
    return all(f"{row.operation}.{row.dtype}" in known for row in rows if row.case != NOTHING_RUN)


def file() -> Path:
    """The user's own."""
    return measured_folders()[-1] / _FILE


def judged(device: torch.device) -> dict[str, bool]:
    """ "operation.dtype" of all that was run on GPUs like `device`, and whether it was right."""
    return dict(_judged(_gpu(device)))


def forget() -> None:
    """Read the files anew at their next use."""
    _judged.cache_clear()


@functools.cache
def _judged(gpu: str) -> dict[str, bool]:
    """ "operation.dtype" and whether it was right, of all that counts here."""
    import triton

    found = {}
    for folder in measured_folders():
        for key, proof in _content(folder / _FILE).get(gpu, {}).items():
            operation = key.rpartition(".")[0]
            if (
                operation in load_kernels().operations()
                and proof.get("source") == load_kernels().source_digest(operation)
                and _minor(str(proof.get("triton"))) == _minor(triton.__version__)
            ):
                found[key] = bool(proof.get("passed"))
    return found


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        for part in (content, *content.values()):
            if not isinstance(part, dict) or not all(isinstance(each, dict) for each in part.values()):
                raise ValueError("it holds no proofs")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(f"segfast: {path} cannot be read ({error}); it is ignored", stacklevel=2)
        return {}


def _minor(version: str) -> list[str]:
    """The first two numbers of "3.7.1": compilers that differ in them make different machine code."""
    return version.split(".")[:2]


def _gpu(device: torch.device) -> str:
    return gpu_name(-1 if device.index is None else device.index)


def _key(operation: str, dtype: torch.dtype) -> str:
    return f"{operation}.{str(dtype).removeprefix('torch.')}"
