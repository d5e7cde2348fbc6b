"""The roof of a device: its rates of matrix products and copies, and what a call costs, as measured on it."""

import contextlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .._files import temporary_beside
from ..ops import _measure
from ..ops._choice_files import cache_folder, machine, warn_unwritable
from .facts import dtype_name
from .rows import Roof

# On a GPU, and on a CPU: sides of matrices, the best of which counts, and bytes that no cache holds.
_SIDES = {"cuda": (8192,), "cpu": (512, 1024, 2048)}
_COPIED = {"cuda": 2 << 30, "cpu": 256 << 20}
_CALLS = 200
_LONG_S = 0.3
# Of several times the one that counts.
Of = Callable[[list[float]], float]


def roof_of(device: torch.device, dtypes: Iterable[torch.dtype]) -> Roof:
    """The rates of `device` in `dtypes`: those remembered of it, and the others measured now.

    Remembered in the user's cache, by the device's name, torch's version and, on a CPU, the threads; on a CPU
    that was busy meanwhile nothing is. The caller's random state stays as it was.
    """
    file = cache_folder() / "roofs.json"
    here = _here(device)
    key = json.dumps(here, sort_keys=True)
    kept = _read(file)
    rates: dict[str, float] = dict(kept.get(key, {}))
    wanted = {_name(dtype, device): dtype for dtype in dtypes if dtype.is_floating_point}
    missing = {name: dtype for name, dtype in wanted.items() if name not in rates}
    if missing or "bytes_per_s" not in rates:
        was_quiet = _measure.quiet_check()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            for name, dtype in missing.items():
                with _as_convolutions(device):
                    rates[name] = max(matmul_rate(device, side, dtype, min) for side in _SIDES[device.type])
            if "bytes_per_s" not in rates:
                rates["bytes_per_s"] = copy_rate(device, _COPIED[device.type], min)
                rates["call_us"] = _call_us(device)
        if device.type == "cuda" or was_quiet():
            _write(file, {**_read(file), key: rates})
    return Roof(
        device=here["device"],
        threads=here.get("threads"),
        flops_per_s={dtype_name(dtype): rates[name] for name, dtype in wanted.items()},
        bytes_per_s=rates["bytes_per_s"],
        call_us=rates["call_us"],
    )


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> list[float]:
    """Seconds of calls, after three to warm up; of fewer where calls are long."""
    begun = time.perf_counter()
    times: list[float] = []
    for turn in range(-3, repeats):
        if turn < 0 and time.perf_counter() - begun > _LONG_S:
            continue
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            took = 1e-3 * begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            run()
            took = time.perf_counter() - start
        if turn >= 0:
            times.append(took)
            if sum(times) > _LONG_S:
                break
    return times


def copy_rate(device: torch.device, size: int, of: Of = statistics.median) -> float:
    """Bytes a second of a copy of `size` bytes, counting those read and those written."""
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / of(seconds(lambda: target.copy_(source), device))


def matmul_rate(device: torch.device, n: int, dtype: torch.dtype, of: Of = statistics.median) -> float:
    """FLOP/s of a square product of random matrices (zeros run faster)."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / of(seconds(lambda: torch.mm(a, b, out=out), device))


def _call_us(device: torch.device) -> float:
    """Microseconds of a call that computes next to nothing, one of many in a row."""
    x = torch.zeros(1, device=device)

    def calls() -> None:
        for _ in range(_CALLS):
            x.add_(1)

    return 1e6 * min(seconds(calls, device)) / _CALLS


def _here(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    known = machine()
    return {
        "device": known["cpu"],
        "isa": known["isa"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _name(dtype: torch.dtype, device: torch.device) -> str:
    """The name that a rate is remembered by: products of float32 are made in one of several precisions."""
    name = dtype_name(dtype)
    tf32 = dtype == torch.float32 and device.type == "cuda" and _precision() == "tf32"
    return "float32 (tf32)" if tf32 else name


def _precision() -> str:
    """The precision of products of float32 in convolutions."""
    from ..kernels._device import dot_precision  # which imports triton

    return "tf32" if dot_precision(torch.float32) == "tf32" else "ieee"


@contextlib.contextmanager
def _as_convolutions(device: torch.device) -> Iterator[None]:
    """Matrix products of float32 in the precision that convolutions are computed in."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if device.type == "cuda":
            matmul.fp32_precision = _precision()
        yield
    finally:
        matmul.fp32_precision = before


def _read(file: Path) -> dict[str, dict[str, float]]:
    """The rates by device; a file that is broken is a warning."""
    try:
        found = json.loads(file.read_text())
        return {key: {name: float(rate) for name, rate in rates.items()} for key, rates in found.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"segfast: {file} cannot be read ({error}); it is ignored", stacklevel=2)
        return {}


def _write(file: Path, rates: dict[str, dict[str, float]]) -> None:
    """Remember the rates; a cache that cannot be written is a warning, once."""
    try:
        with temporary_beside(file) as temporary:
            temporary.write_text(json.dumps(rates, indent=1))
    except OSError as error:
        warn_unwritable(error)
