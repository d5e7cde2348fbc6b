"""Choices on disk: a JSON file a machine and set of versions, in the user's cache.

A file is {"machine": {...}, "choices": [{"operation": ..., "input": [...], ..., "choice": name, "us":
{name: microseconds}}]}. It is written whole and renamed; processes that write at once take turns.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .._files import temporary_beside
from ._choice import CANDIDATES, Call, Choice, choices

Table = Mapping[Call, Choice]
_PAIRS = ("stride", "padding", "output_padding", "dilation")


def cache_folder() -> Path:
    """Where this user's measurements are kept: `SEGFAST_CACHE`, else `$XDG_CACHE_HOME/segfast`."""
    if "SEGFAST_CACHE" in os.environ:
        return Path(os.environ["SEGFAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "segfast"


@functools.cache
def machine() -> dict[str, str]:
    """What a choice holds for: this kind of CPU, its instruction set as torch uses it, and the versions."""
    onednn = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return {
        "cpu": _cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "torch": torch.__version__,
        "onednn": onednn[1] if onednn else "",
        "source": _source_digest(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _source_digest() -> str:
    """Of the candidates' own code."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in (
        "_conv2d_aten.py",
        "_cpu.py",
        "_dilated_taps.py",
        "_matmul.py",
        "_onednn.py",
        "_winograd.py",
        "_winograd_scratch.py",
    ):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def path() -> Path:
    """This machine's file."""
    here = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", here["cpu"].lower()).strip("-")[:40]
    digest = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "choices" / f"{slug}-{digest}.json"


def read(file: Path | None = None) -> dict[Call, Choice]:
    """The choices in `file`, by default this machine's; none where it is missing; a warning if broken."""
    file = file or path()
    try:
        found = json.loads(file.read_text())
        return dict(_parsed(row) for row in found["choices"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"segfast: {file} cannot be read ({error}); it is ignored", stacklevel=2)
        return {}


def write(found: Table) -> None:
    """Add `found` to this machine's file. A cache that cannot be written is a warning, once."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _turn(file):
            replace(file, {**read(file), **found})
    except OSError as error:
        _warn_once(f"segfast: {file} cannot be written ({error}); what was measured is forgotten at exit")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@contextlib.contextmanager
def _turn(file: Path) -> Iterator[None]:
    """While this runs no other process writes `file`."""
    try:
        import fcntl
    except ImportError:  # on Windows, where the package can be imported: there the last one wins
        yield
        return
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def replace(file: Path, found: Table) -> None:
    """Write `file` whole to another name and rename it."""
    rows = [_row(call, choice) for call, choice in found.items()]
    text = json.dumps({"machine": machine(), "choices": rows}, indent=1)
    with temporary_beside(file) as temporary:
        temporary.write_text(text)


def save_choices(file: str | os.PathLike) -> int:
    """Write all choices of this machine to `file`, to be shipped with a model; returns how many.

    Raises:
        OSError: `file` cannot be written.
    """
    found = choices().measured
    file = Path(file)
    replace(file.absolute(), found)
    return len(found)


def load_choices(file: str | os.PathLike) -> int:
    """Take over the choices in a file of `save_choices`; returns how many were taken.

    None of another kind of machine or other versions are: they would have to be measured here.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one of `save_choices`.
    """
    file = Path(file)
    try:
        content = json.loads(file.read_text())
        of = content["machine"]
        rows = dict(_parsed(row) for row in content["choices"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a file of segfast.save_choices ({error})") from error
    if of != machine():
        differing = [key for key, value in machine().items() if of.get(key) != value]
        warnings.warn(f"segfast: {file} is of another machine ({', '.join(differing)} differ)", stacklevel=2)
        return 0
    for call, choice in rows.items():
        choices().add(call, choice)
    write(rows)
    return len(rows)


def _row(call: Call, choice: Choice) -> dict[str, Any]:
    row = {**call._asdict(), "dtype": str(call.dtype).removeprefix("torch.")}
    return {**row, "choice": choice.name, "us": {name: round(us, 2) for name, us in choice.us.items()}}


def _parsed(row: dict[str, Any]) -> tuple[Call, Choice]:
    row = dict(row)
    choice = Choice(str(row.pop("choice")), {str(k): float(v) for k, v in row.pop("us").items()})
    for name in ("input", "weight", *_PAIRS):
        row[name] = tuple(map(int, row[name]))
    dtype = getattr(torch, row["dtype"])
    if not isinstance(dtype, torch.dtype) or choice.name not in CANDIDATES[row["operation"]]:
        raise ValueError(f"unknown dtype or choice: {row['dtype']}, {choice.name}")
    return Call(**{**row, "dtype": dtype}), choice
