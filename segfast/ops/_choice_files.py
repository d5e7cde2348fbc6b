"""Choices on disk: a JSON file a machine and set of versions, in the user's cache or brought by the package.

A file is a list of {"machine": {...}, "choices": [{"operation": ..., "choice": name, "us": {name:
microseconds}}]}; those in the cache have one. It is written whole and renamed; processes that write at once
take turns.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._files import temporary_beside
from . import _gpu
from ._call import CANDIDATES, AnyCall, Call
from ._choice import Choice, choices
from ._gpu_call import GPU_OPERATIONS, GpuCall
from ._operands import load_kernels

Table = Mapping[AnyCall, Choice]
_PAIRS = ("stride", "padding", "output_padding", "dilation")
_BROUGHT = Path(__file__).parent.parent / "measured"
_OF_CHOICE = ("choice", "us", "tiles", "unproven")  # in a row; the rest is the call's


def cache_folder() -> Path:
    """Where this user's measurements are kept: `SEGFAST_CACHE`, else `$XDG_CACHE_HOME/segfast`."""
    if "SEGFAST_CACHE" in os.environ:
        return Path(os.environ["SEGFAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "segfast"


def measured_folders() -> tuple[Path, Path]:
    """Where choices and proofs are looked up: what the package brings, then the user's, which prevails."""
    return _BROUGHT, cache_folder() / "choices"


@functools.cache
def machine() -> dict[str, str]:
    """The machine that a choice holds for: the kind of CPU, the instruction set torch uses, the versions."""
    onednn = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return {
        "cpu": _cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "torch": torch.__version__,
        "onednn": onednn[1] if onednn else "",
        "source": _digest("*.py"),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _digest(*patterns: str) -> str:
    """A digest of the files of this package that match: what was measured holds for the code behind it."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def gpu_machine(gpu: str) -> dict[str, str]:
    """The same for a GPU of this name that is at hand."""
    import triton

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    device = next(device for device in devices if load_kernels().gpu_slug(device) == gpu)
    return {
        "gpu": gpu,
        "architecture": load_kernels().architecture(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "source": gpu_source(),
    }


def gpu_source() -> str:
    """A digest of the candidates' own code on a GPU."""
    return f"{load_kernels().whole_digest()}-{_digest('_cudnn*.py', '_gpu*.py')}"


def file_name(here: Mapping[str, str]) -> str:
    """The name of a machine's file."""
    name = here.get("gpu") or here["cpu"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]
    digest = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]
    return f"{slug}-{digest}.json"


def path(here: Mapping[str, str] | None = None) -> Path:
    """A machine's file in the user's cache; this CPU's by default."""
    return measured_folders()[-1] / file_name(machine() if here is None else here)


def read(here: Mapping[str, str] | None = None) -> dict[AnyCall, Choice]:
    """The choices of a machine, by default of this CPU; a file that is broken is a warning."""
    here = machine() if here is None else here
    found: dict[AnyCall, Choice] = {}
    for folder in measured_folders():
        found |= _read(folder / file_name(here), here)
    return found


def read_gpu(gpu: str) -> dict[GpuCall, Choice]:
    """The choices of GPUs of this name."""
    return {call: choice for call, choice in read(gpu_machine(gpu)).items() if isinstance(call, GpuCall)}


def _read(file: Path, here: Mapping[str, str]) -> dict[AnyCall, Choice]:
    try:
        return {
            call: choice
            for part in _parts(file)
            if part["machine"] == here
            for call, choice in (parsed(row, here) for row in part["choices"])
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"segfast: {file} cannot be read ({error}); it is ignored", stacklevel=2)
        return {}


def _parts(file: Path) -> list:
    parts = json.loads(file.read_text())
    if not isinstance(parts, list):
        raise ValueError("it is no list")
    return parts


def write(found: Table) -> None:
    """Add `found` to its machines' files. A cache that cannot be written is a warning, once."""
    for here, part in by_machine(found):
        file = path(here)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with in_turn(file):
                replace(file, [(here, {**_read(file, here), **part})])
        except OSError as error:
            warn_unwritable(error)


def by_machine(found: Table) -> list[tuple[dict[str, str], Table]]:
    """`found` apart by what it holds for: this CPU, and each GPU."""
    parts: dict[str, dict[AnyCall, Choice]] = {}
    for call, choice in found.items():
        parts.setdefault(call.gpu if isinstance(call, GpuCall) else "", {})[call] = choice
    return [(gpu_machine(gpu) if gpu else machine(), part) for gpu, part in parts.items()]


def warn_unwritable(error: OSError) -> None:
    """Say that nothing will be remembered, once."""
    folder, why = measured_folders()[-1], error.strerror or error
    _warn_once(
        f"segfast: {folder} cannot be written ({why}); what is measured and proven is forgotten at exit"
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@contextlib.contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """While this runs no other process writes `file`."""
    try:
        import fcntl
    except ImportError:  # on Windows, where the package can be imported: there the last one wins
        yield
        return
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def replace(file: Path, parts: Sequence[tuple[Mapping[str, str], Table]]) -> None:
    """Write `file` whole to another name and rename it."""
    content = [choices_row(here, found) for here, found in parts]
    with temporary_beside(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=plain))


def choices_row(here: Mapping[str, str], found: Table) -> dict[str, Any]:
    """A machine's choices as JSON has them."""
    rows = [{**call_row(call), **choice_row(choice)} for call, choice in found.items()]
    return {"machine": dict(here), "choices": rows}


def save_choices(file: str | os.PathLike) -> int:
    """Write all choices of this machine, its CPU's and its GPUs', to `file`, to be shipped with a model.

    Returns how many.

    Raises:
        OSError: `file` cannot be written.
    """
    _read_gpus()
    found = choices().measured
    replace(Path(file).absolute(), by_machine(found))
    return len(found)


def load_choices(file: str | os.PathLike) -> int:
    """Take over the choices in a file of `save_choices`; returns how many were taken.

    None of another kind of machine or other versions are: they would have to be measured here.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one of `save_choices`.
    """
    file = Path(file)
    here = _machines()
    taken: dict[AnyCall, Choice] = {}
    try:
        parts = [(dict(part["machine"]), part["choices"]) for part in _parts(file)]
        for of, rows in parts:
            if of in here:
                taken |= dict(parsed(row, of) for row in rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a file of segfast.save_choices ({error})") from error
    machines = [of for of, _ in parts]
    if machines and not any(of in here for of in machines):
        warnings.warn(f"segfast: nothing of {file} is taken: {_why_none(machines, here)}", stacklevel=2)
    for call, choice in taken.items():
        remember(call, choice)
    write(taken)
    return len(taken)


def _why_none(machines: Sequence[dict[str, str]], here: Sequence[dict[str, str]]) -> str:
    """The differences between this machine and that of `machines` which is most like it."""
    differing: list[list[str]] = [
        [f"{key} is {ours[key]} here, {theirs[key]} there" for key in ours if ours[key] != theirs[key]]
        for theirs in machines
        for ours in here
        if ours.keys() == theirs.keys()
    ]
    if differing:
        fewest = min(differing, key=len)
        return "; ".join(fewest)
    theirs, ours = (
        " and ".join(sorted({each.get("gpu") or each.get("cpu", "another machine") for each in several}))
        for several in (machines, here)
    )
    return f"it is of {theirs}, here is {ours}"


def remember(call: AnyCall, choice: Choice) -> None:
    """Have `call` run what was chosen, in this process."""
    if isinstance(call, GpuCall):
        _gpu.keep(call, choice)
    else:
        choices().add(call, choice)


def _machines() -> list[dict[str, str]]:
    """This CPU, and each kind of GPU there is."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = dict.fromkeys(_gpu.gpu_name(index) for index in range(count))
    return [machine(), *map(gpu_machine, gpus)]


def _read_gpus() -> None:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        _gpu.can_choose(index)


def call_row(call: Any) -> dict[str, Any]:
    """A call as JSON has it; a GPU's name is left to the machine."""
    row = {**call._asdict(), "dtype": str(call.dtype).removeprefix("torch.")}
    row.pop("gpu", None)
    return row


def choice_row(choice: Choice) -> dict[str, Any]:
    """A choice as JSON has it."""
    row = {"choice": choice.name, "us": {name: round(us, 2) for name, us in choice.us.items()}}
    more = {"tiles": choice.tiles, "unproven": choice.unproven}
    return row | {name: value for name, value in more.items() if value}


def parsed_call(row: Mapping[str, Any], gpu: str | None) -> AnyCall:
    """The call of `call_row`, on a GPU of this name or on a CPU. ValueError or the like if it is none."""
    dtype = getattr(torch, row["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype: {row['dtype']}")
    if gpu is None:
        shapes = {name: tuple(map(int, row[name])) for name in ("input", "weight", *_PAIRS)}
        return Call(**{**row, **shapes, "dtype": dtype})
    if row["operation"] not in GPU_OPERATIONS:
        raise ValueError(f"unknown operation: {row['operation']}")
    return GpuCall(**{**_tuples(row), "dtype": dtype, "gpu": gpu})


def parsed_choice(row: Mapping[str, Any]) -> Choice:
    """The choice of `choice_row`."""
    name, us = str(row["choice"]), {str(name): float(us) for name, us in row["us"].items()}
    if us and name not in us:
        raise ValueError(f"the choice {name} is not among what was timed: {', '.join(us)}")
    tiles = _tuples(row.get("tiles", ()))
    for operation, bucket, fields in tiles:
        load_kernels().Tile(*fields), int(bucket.rpartition("-p")[2]), str(operation)
    return Choice(name, us, tiles, _tuples(row.get("unproven", ())))


def plain(value: Any) -> int:
    """A number of another package as JSON has it."""
    return int(value)


def parsed(row: Mapping[str, Any], here: Mapping[str, str]) -> tuple[AnyCall, Choice]:
    """A call and its choice on such a machine. ValueError or the like if `row` is none of `choices_row`."""
    choice = parsed_choice(row)
    about = {name: value for name, value in row.items() if name not in _OF_CHOICE}
    call = parsed_call(about, here.get("gpu"))
    if isinstance(call, Call) and choice.name not in CANDIDATES[call.operation]:
        raise ValueError(f"unknown choice: {choice.name}")
    return call, choice


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
