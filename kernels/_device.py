"""A device as launchers see it: its architecture, its limits, the precision of its matrix units."""

import contextlib
import functools
import os
import re
from collections.abc import Iterator

import torch

from ._launch import Launch, forget_launches

# Shared memory a program may use, in bytes, where no device is there to be asked.
_SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448,
                  "sm_103": 232448, "sm_120": 101376, "gfx942": 65536, "gfx950": 163840}  # fmt: skip
_pretended: str | None = None
_inline_ptx = True


def interpreting() -> bool:
    """True if Triton runs kernels in its interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def amd() -> bool:
    """True if kernels are compiled for AMD's GPUs."""
    return torch.version.hip is not None if _pretended is None else _pretended.startswith("gfx")


@contextlib.contextmanager
def pretend_architecture(name: str) -> Iterator[None]:
    """Let launchers choose tiles for the architecture `name` ("sm_90") whatever the tensors' device is."""
    global _pretended
    previous, _pretended = _pretended, name
    forget_launches()
    try:
        yield
    finally:
        _pretended = previous
        forget_launches()


def inline_ptx() -> bool:
    """True if a kernel may use NVIDIA's assembler: not in the interpreter, not on AMD, not where it is off.

    Every `tl.inline_asm_elementwise` stands under `if PTX:`, a constexpr parameter to which the launcher
    passes this, with the same in Triton's own operations beside it.
    """
    return _inline_ptx and not interpreting() and not amd()


@contextlib.contextmanager
def without_inline_ptx() -> Iterator[None]:
    """Let kernels take the plain form of what they write in PTX, for devices that execute Triton's IR only.

    The simulated device is one; `tests/device/conftest.py` enters this there.
    """
    global _inline_ptx
    previous, _inline_ptx = _inline_ptx, False
    forget_launches()
    try:
        yield
    finally:
        _inline_ptx = previous
        forget_launches()


@functools.cache
def _query(index: int) -> tuple[str, str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    slug = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    shared = getattr(properties, "shared_memory_per_block_optin", _SHARED_MEMORY.get(name, 65536))
    return name, slug, shared


def architecture(device: torch.device) -> str:
    """The architecture's name, "sm_90" or "gfx942"; "cpu" for a tensor without a GPU."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return "cpu"
    return _query(_index(device))[0]


def gpu_slug(device: torch.device) -> str:
    """The GPU's name as files of what was measured spell it ("nvidia-h200"); "cpu" without one."""
    return _query(_index(device))[1] if device.type == "cuda" else "cpu"


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory one program may use."""
    if _pretended is None and device.type == "cuda":
        return _query(_index(device))[2]
    return _SHARED_MEMORY.get(architecture(device), 232448)


def processors(device: torch.device) -> int:
    """How many multiprocessors (compute units) work side by side."""
    if _pretended is None and device.type == "cuda":
        return _processors(_index(device))
    return 132


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def bounded(launch: Launch, device: torch.device, registers: int = 168) -> Launch:
    """`launch` with a bound on a thread's registers; 168 are twelve warps on a multiprocessor.

    Left alone, ptxas goes for the next more programs at a time and spills a few registers for them.
    """
    if not architecture(device).startswith("gfx"):
        launch.options["maxnreg"] = registers
    return launch


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision` for a dot of `dtype` under cuDNN's own flag for fp32 convolutions."""
    if dtype != torch.float32:
        return "tf32"  # not looked at for 16-bit operands
    # Not torch.backends.cudnn.allow_tf32: reading it raises once the newer knob has been set.
    # This is torch.backends.cudnn.conv.fp32_precision, in a tenth of the time.
    precision = torch._C._get_fp32_precision_getter("cuda", "conv")
    full = fp32_precision()
    return "tf32" if precision == "tf32" and full != "ieee" else full


def fp32_precision() -> str:
    """Triton's `input_precision` for a dot of fp32 that keeps fp32's accuracy.

    Three tf32 products recover it and stay on the matrix units; AMD's have plain fp32.
    """
    return "ieee" if amd() else "tf32x3"
