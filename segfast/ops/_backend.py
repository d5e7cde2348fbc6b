"""Which implementation runs: "triton" (our kernels), "aten" (cuDNN, oneDNN) or "auto".

Decided in Python, before any operator.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "aten")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


class _State(threading.local):
    """The calling thread's choice. Not a ContextVar: reading one breaks torch.compile(fullgraph=True)."""

    def __init__(self) -> None:
        self.backend = _DEFAULT
        self.decisions: list[Decision] | None = None


_DEFAULT = _checked(os.environ.get("SEGFAST_BACKEND", "auto"), "SEGFAST_BACKEND")


class Decision(NamedTuple):
    """One choice of backend, and why."""

    operation: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend} ({self.reason})"


_state = _State()


class backend:
    """Choose the backend for the calling thread, at once; as a context manager, until the block ends.

    Args:
        name: "auto" (a kernel of ours where it is proven on this GPU and measured faster, else ATen),
            "triton" (our kernels or an error), or "aten" (cuDNN on a GPU, oneDNN on a CPU).

    Raises:
        ValueError: another name.

    Example:
        >>> import segfast
        >>> with segfast.backend("aten"):
        ...     segfast.get_backend()
        'aten'
    """

    def __init__(self, name: str):
        self._previous = _state.backend
        _state.backend = _checked(name, "backend")

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *_: object) -> None:
        _state.backend = self._previous


def get_backend() -> str:
    """The calling thread's backend."""
    return _state.backend


def use_triton(operation: str, reason_not: Callable[..., str | None], *args: Any) -> bool:
    """Whether `operation` runs our kernels for these arguments.

    `reason_not(*args)` is the family's predicate: None, or why its kernels cannot serve the call. Under
    "auto" a kernel must moreover be proven on this GPU and measured faster (the predicate's caller passes
    that in `args`).

    Raises:
        NotImplementedError: "triton" was asked for by name and the kernels cannot serve the call.
    """
    choice = _state.backend
    if choice == "aten":
        return _decided(operation, "aten", "asked for by name", False)
    reason = reason_not(choice, *args)
    if reason is None:
        return _decided(
            operation, "triton", "asked for by name" if choice == "triton" else "proven, faster", True
        )
    if choice == "triton":
        raise NotImplementedError(f'{operation}: backend "triton" cannot serve this call: {reason}')
    return _decided(operation, "aten", reason, False)


def _decided(operation: str, chosen: str, reason: str, answer: bool) -> bool:
    if _state.decisions is not None:
        _state.decisions.append(Decision(operation, chosen, reason))
    return answer


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Decision]:
    """Run `function(*args, **kwargs)` without gradients and list which backend each operation took, and why.

    Example:
        >>> import torch, segfast
        >>> x, w = torch.randn(1, 8, 4, 4), torch.randn(8, 4, 2, 2)
        >>> print(segfast.explain(segfast.functional.conv_transpose2d, x, w, stride=2)[0])
        conv_transpose2d: aten (the tensors are on a CPU)
    """
    previous, _state.decisions = _state.decisions, []
    try:
        with torch.no_grad():
            function(*args, **kwargs)
        return _state.decisions
    finally:
        _state.decisions = previous


_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_gpu_reasons: dict[int | None, str | None] = {}


def certainly_aten(input: Tensor) -> bool:
    """Whether a call on `input` is ATen's whatever its sizes, and nobody asks why: a CPU's usual case."""
    return input.is_cpu and not _INTERPRETING and _state.backend != "triton" and _state.decisions is None


def kernel_reason_not(choice: str, input: Tensor, autocast: torch.dtype | None = None) -> str | None:
    """What every family asks of a tensor for its kernels: device, architecture, dtype (or autocast's)."""
    dtype = autocast or input.dtype
    if input.is_cuda:
        reason = _gpu_reason_not(input.device.index)
        if reason is not None:
            return reason
    elif not input.is_cpu:
        return f"no kernels for device {input.device.type!r}"
    elif not _INTERPRETING:
        return "the tensors are on a CPU"
    elif choice != "triton":
        return "the tensors are on a CPU; the interpreter runs only what is asked for by name"
    elif dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if dtype not in _KERNEL_DTYPES:
        return f"no kernels for {str(dtype).removeprefix('torch.')} (float16, bfloat16 and float32 have them)"
    return None


def _gpu_reason_not(index: int | None) -> str | None:
    if index not in _gpu_reasons:
        old = torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)
        _gpu_reasons[index] = "the GPU's compute capability is below 8.0" if old else None
    return _gpu_reasons[index]


def measured_reason_not(
    operations: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
    channels_in: int,
    channels_out: int,
    taps: int,
    groups: int,
    pixels: int,
    geometry: tuple[tuple[int, int], ...] | None = None,
) -> str | None:
    """Why "auto" keeps ATen for these operations: not proven here, not measured, or measured slower.

    `geometry` is (stride, dilation, kernel) for operations whose tables tell those apart.
    """
    if torch.compiler.is_compiling():
        pixels = -1  # may be symbolic: decide for all image sizes at once
    index = -1 if device.index is None else device.index
    return _measured_reason_not(
        operations, dtype, index, channels_in, channels_out, taps, groups, geometry, pixels
    )


@functools.lru_cache(maxsize=4096)
def _look_up(
    operations: tuple[str, ...],
    dtype: torch.dtype,
    index: int,
    channels_in: int,
    channels_out: int,
    taps: int,
    groups: int,
    geometry: tuple[tuple[int, int], ...] | None,
    log2_pixels: int,
) -> str | None:
    from segfast.kernels import _configs, _device

    device = torch.device("cuda", index) if index >= 0 else torch.device("cuda")
    arch, slug = _device.architecture(device), _device.gpu_slug(device)
    name = str(dtype).removeprefix("torch.")
    for operation in operations:
        if f"{operation}.{name}" not in _configs.proven_entries(arch):
            return f"{operation} in {name} is not proven on this GPU ({arch})"
    variant = "" if geometry is None else _configs.geometry_variant(*geometry)
    stem = _configs.stem(channels_in, channels_out, taps, groups, dtype, variant)
    ours = theirs = 0.0
    for operation in operations:
        row = _configs.measured(operation, f"{stem}{log2_pixels if log2_pixels >= 0 else ''}", slug, arch)
        if row is None:
            return f"{operation} was not measured for this shape on this GPU"
        ours += row["us"]
        theirs += row["aten_us"]
    if ours >= theirs:
        return f"ATen was measured faster ({theirs:.0f} against {ours:.0f} us)"
    return None


def _measured_reason_not(operations, dtype, index, channels_in, channels_out, taps, groups, geometry, pixels):
    log2_pixels = pixels.bit_length() - 1 if pixels >= 0 else -1
    return _look_up(operations, dtype, index, channels_in, channels_out, taps, groups, geometry, log2_pixels)


# torch.compile calls it while tracing and keeps the answer (`torch.compiler.assume_constant_result`, without
# its import).
_measured_reason_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
_gpu_reason_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget_decisions() -> None:
    """Read proofs and tables anew at the next call."""
    from segfast.kernels import _configs

    _look_up.cache_clear()
    _configs.forget_tables()
