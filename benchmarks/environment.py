"""The device, versions, commit and date of a measurement."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def dry_run() -> bool:
    """True if `SEGFAST_DRY_RUN=1` asks for the control flow alone, on a CPU."""
    return os.environ.get("SEGFAST_DRY_RUN", "0") == "1"


def slug(name: str) -> str:
    """A GPU's name as files spell it: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: torch.device) -> dict[str, str]:
    """The columns that every row of a run shares."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, arch = properties.name, f"sm_{properties.major}{properties.minor}"
        if torch.version.hip:
            arch = properties.gcnArchName.split(":")[0]
    else:
        name, arch = "cpu", "cpu"
    return {
        "gpu": slug(name),
        "arch": arch,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "isa": cpu_isa(),
        "threads": str(torch.get_num_threads()),
    }


def cpu_name() -> str:
    """The processor as its maker calls it; of some virtual machines only the make."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    values = {}
    for line in reversed(lines):
        name, _, value = line.partition(":")
        values[name.strip()] = value.strip()
    name = values.get("model name") or platform.processor() or platform.machine()
    # A hypervisor may hide the model's number, but not these.
    known = "cpu family" in values and "model" in values
    return f"{name} (family {values['cpu family']}, model {values['model']})" if known else name


def cpu_isa() -> str:
    """The widest vectors that torch's own kernels use here, and the bf16 units beside them."""
    units = [torch.backends.cpu.get_cpu_capability()]
    if torch.cpu._is_avx512_bf16_supported():
        units.append("AVX512-BF16")
    if torch.cpu._is_amx_tile_supported():
        units.append("AMX")
    return " ".join(units)


def commit() -> str:
    """The tree's commit, with `+` where it has changes; `SEGFAST_COMMIT` where the tree came without git."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("SEGFAST_COMMIT", "unknown")
    return head + ("+" if _output("git", "-C", str(ROOT), "status", "--porcelain") else "")


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
