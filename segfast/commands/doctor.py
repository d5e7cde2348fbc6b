"""`segfast doctor`: versions, folders, what is measured on this CPU, and proven and measured on the GPU."""

import argparse
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch
import triton

from .. import __version__
from .._table import format_table
from ..kernels import architecture, dot_precision, gpu_slug, operations
from ..ops._backend import _KERNEL_DTYPES, get_backend
from ..ops._choice import choices
from ..ops._choice_files import cache_folder, gpu_machine, machine, measured_folders, path, read_gpu
from ..ops._proofs import judged
from ._check_advice import cpu_has_bfloat16
from ._load_model import parse_device

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_ON_A_CPU = "On a CPU `segfast.optimize` measures what runs a model's calls; a call not measured takes ATen."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast doctor`."""
    parser.add_argument("--device", help="which GPU, e.g. cuda:1 (the first)")


def run(args: argparse.Namespace) -> int:
    """Run `segfast doctor`: 0 on a GPU, 2 without one."""
    sections = {"Versions": _versions(), "Settings": _settings(), "Folders": _folders(), "CPU": _cpu()}
    for title, lines in sections.items():
        print(f"{title}\n{_indented(lines)}\n")
    if not torch.cuda.is_available():
        print(_no_gpu())
        return 2
    device = parse_device(args.device)
    if device.type != "cuda":
        print(f"The kernels run on CUDA GPUs. {_ON_A_CPU}")
        return 2
    print(_gpu(device))
    return 0


def _versions() -> list[tuple[str, str]]:
    cudnn = torch.backends.cudnn.version()
    return [
        ("segfast", __version__),
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
        ("triton", triton.__version__),
        ("numpy", importlib.metadata.version("numpy")),
        (
            "CUDA",
            torch.version.cuda
            or (f"ROCm {torch.version.hip}" if torch.version.hip else "none in this torch"),
        ),
        ("cuDNN", str(cudnn) if cudnn else "none in this torch"),
        ("driver", _driver()),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
    ]


def _driver() -> str:
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", _DRIVER_FILE.read_text())
    except OSError:
        return "none found"
    return found.group() if found else "unknown"


def _settings() -> list[tuple[str, str]]:
    lines = [("backend", get_backend())]
    for name in ("SEGFAST_BACKEND", "SEGFAST_AUTOTUNE", "TRITON_INTERPRET"):
        lines.append((name, os.environ.get(name, "not set")))
    return lines


def _folders() -> list[tuple[str, str]]:
    mine = cache_folder()
    held = sorted(each.name for each in measured_folders()[-1].glob("*.json"))
    return [
        ("segfast's own", f"{mine} ({', '.join(held) or 'empty'})"),
        ("Triton's compiled kernels", triton.knobs.cache.dir),
    ]


def _cpu() -> list[tuple[str, str]]:
    here = machine()
    return [
        ("model", here["cpu"]),
        ("instructions", here["isa"]),
        ("bfloat16", "yes" if cpu_has_bfloat16() else "slow: neither AMX nor AVX512-BF16"),
        ("calls measured", f"{len(choices().measured)} ({path()})"),
    ]


def _no_gpu() -> str:
    why = "torch sees none" if torch.version.cuda or torch.version.hip else "this torch is a CPU build"
    return f"No GPU: {why}. The kernels do not run here. {_ON_A_CPU}"


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    arch, slug = architecture(device), gpu_slug(device)
    lines = [
        ("name", properties.name),
        ("architecture", f"{arch} (compute capability {properties.major}.{properties.minor})"),
        ("memory", f"{properties.total_memory / 2**30:.1f} GiB"),
        ("name in files", slug),
        ("fp32 convolutions", dot_precision(torch.float32)),
    ]
    if torch.version.hip is None and properties.major < 8:
        lines.append(("kernels", "none: they need compute capability 8.0; every call takes ATen"))
        return f"GPU\n{_indented(lines)}"
    lines.append(("calls measured", f"{len(read_gpu(slug))} ({path(gpu_machine(slug))})"))
    return f"GPU\n{_indented(lines)}\n\n{_proofs(device)}"


def _proofs(device: torch.device) -> str:
    known = judged(device)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in _KERNEL_DTYPES]
    words = {True: "proven", False: "WRONG", None: "not proven"}
    rows = [
        (operation, *[words[known.get(f"{operation}.{dtype}")] for dtype in dtypes])
        for operation in operations()
    ]
    lines = [
        format_table(["operation", *dtypes], rows),
        'Backend "auto" uses a kernel where it is proven and was measured to be the fastest.',
        "`segfast.optimize` proves and measures what a model needs; `segfast prove` proves all.",
    ]
    return "\n".join(lines)


def _indented(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:{width}}  {value}" for name, value in lines)
