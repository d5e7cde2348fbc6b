"""The implementation that runs: "triton" (our kernels), "aten" (cuDNN, oneDNN) or "auto".

Decided in Python, before any operator.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "aten")
# By a name of this module: it is looked up in every call.
_compiling = torch.compiler.is_compiling


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_DEFAULT = _checked(os.environ.get("SEGFAST_BACKEND", "auto"), "SEGFAST_BACKEND")


class Explanation(NamedTuple):
    """One choice of backend, and why."""

    operation: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend} ({self.reason})"


class _Notes(list[Explanation]):
    """Decisions; and which tensors, by id, kernels of ours or cuDNN's fused calls took, by operation."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, int]] = []
        self.origins: dict[int, int] = {}  # of tensors computed from a weight, by id, the weight's id


class _Choice:
    """A backend, and the list that explanations are noted in; None where there is none.

    Set from the beginning: a compiled model is compiled anew where an attribute has come since.
    """

    def __init__(self) -> None:
        self.backend: str | None = None
        self.explanations: _Notes | None = None


class _Thread(threading.local, _Choice):
    """The calling thread's own. Not a ContextVar: reading one breaks torch.compile(fullgraph=True)."""

    def __init__(self) -> None:
        super().__init__()
        self.is_main = threading.current_thread() is threading.main_thread()


# The main thread's choice holds for every thread without one of its own: those that torch.nn.DataParallel
# starts, and autograd's, know nothing of who started them.
_main = _Choice()
_main.backend = _DEFAULT
_thread = _Thread()


def _chooser() -> _Choice:
    return _main if _thread.is_main else _thread


class backend:
    """Choose the backend at once; as a context manager, until the block ends.

    In the main thread the choice holds for all threads that make none of their own, those that
    `torch.nn.DataParallel` starts and autograd's among them; in another thread, for that thread alone.

    Args:
        name: "auto" (what was measured to be the fastest on this machine, of our kernels only what is
            proven; where nothing was measured ATen), "triton" (our kernels or an error), or "aten" (cuDNN on
            a GPU, oneDNN on a CPU).

    Raises:
        ValueError: another name.

    Example:
        >>> import segfast
        >>> with segfast.backend("aten"):
        ...     segfast.get_backend()
        'aten'
    """

    def __init__(self, name: str):
        self._choice = _chooser()
        self._previous = self._choice.backend
        self._choice.backend = _checked(name, "backend")

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *_: object) -> None:
        self._choice.backend = self._previous


@contextlib.contextmanager
def backend_of_this_thread(name: str) -> Iterator[None]:
    """Within it the calling thread alone, be it the main one, has the backend `name`."""
    previous, _thread.backend = _thread.backend, name
    try:
        yield
    finally:
        _thread.backend = previous


def get_backend() -> str:
    """The calling thread's backend: its own choice, else the main thread's; "aten" in an export to ONNX."""
    if _compiling() and torch.onnx.is_in_onnx_export():
        return "aten"  # which knows none of our operators
    return _thread.backend or _main.backend or _DEFAULT


def _noted() -> _Notes | None:
    """The list in which explanations of the calling thread's calls are noted, if somebody asked."""
    return _main.explanations if _thread.explanations is None else _thread.explanations


def is_noting() -> bool:
    """True if somebody asks for explanations."""
    return _noted() is not None


# A predicate's reason where nothing is to be computed: by whatever name, ATen's is the right empty result.
EMPTY = "a tensor is empty"

# What was last chosen for an operation, and what each candidate took, while somebody asks for reasons.
CHOSEN: dict[str, str] = {}

# Operations whose kernels could not be compiled or launched in this process, and the kernel's error.
FAILED: dict[str, str] = {}


def use_triton(
    operation: str, reason_not: Callable[..., str | None], *args: Any, because: str = "measured faster"
) -> bool:
    """True if `operation` runs our kernels for these arguments.

    `reason_not(backend, *args)` is the family's predicate: None, or why its kernels do not serve the call:
    they cannot, or something else was chosen. `because` explains why they do, if no figures do.

    Raises:
        NotImplementedError: "triton" was asked for by name and the kernels cannot serve the call.
    """
    choice = get_backend()
    if choice == "aten":
        return _decided(operation, "aten", "asked for by name", False)
    reason = reason_not(choice, *args)
    if reason is None:
        note_taken(operation, args)
        return _decided(operation, "triton", "asked for by name" if choice == "triton" else because, True)
    if choice == "triton" and reason != EMPTY:
        raise NotImplementedError(f'{operation}: backend "triton" cannot serve this call: {reason}')
    return _decided(operation, "aten", reason, False)


def _decided(operation: str, chosen: str, reason: str, answer: bool) -> bool:
    noted = _noted()
    if noted is not None:
        if operation in FAILED and chosen == "triton" != get_backend():
            chosen, reason = "aten", FAILED[operation]
        elif chosen == "triton" != get_backend():
            reason = CHOSEN.get(operation, reason)
        noted.append(Explanation(operation, chosen, reason))
    return answer


def change_explanation(chosen: str, reason: str) -> None:
    """Say of the last call explained that `chosen` runs instead, and why if its reason does not say so."""
    noted = _noted()
    if noted:
        reasons = [each for each in (noted[-1].reason, reason) if each]
        noted[-1] = noted[-1]._replace(backend=chosen, reason="; ".join(reasons))


def add_explanation(operation: str, chosen: str, reason: str) -> None:
    """Note for `explain` what runs, where `use_triton` was not asked."""
    _decided(operation, chosen, reason, True)


def note_taken(operation: str, args: Iterable[Any]) -> None:
    """Note, if somebody asked, that a kernel of ours or a fused call of cuDNN's takes these tensors."""
    noted = _noted()
    if noted is not None:
        noted.taken += [(operation, id(arg)) for arg in args if isinstance(arg, Tensor)]


def note_origin(computed: Tensor, weight: Tensor) -> None:
    """Note, if somebody asked, that `computed` stands for `weight`: with a norm folded into it."""
    noted = _noted()
    if noted is not None:
        noted.origins[id(computed)] = id(weight)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Explanation]:
    """Run `function(*args, **kwargs)` without gradients and list which backend each operation took, and why.

    In the main thread, with what other threads decide meanwhile: those that `torch.nn.DataParallel` starts.

    Example:
        >>> import torch, segfast
        >>> x, w = torch.randn(1, 8, 4, 4), torch.randn(8, 4, 2, 2)
        >>> print(segfast.explain(segfast.functional.conv_transpose2d, x, w, stride=2)[0])
        conv_transpose2d: aten (the tensors are on a CPU)
    """
    with noting() as found, torch.no_grad():
        function(*args, **kwargs)
    return list(found)


def taken_by_kernels(run: Callable[[], Any], tensors: Iterable[Tensor]) -> list[Tensor]:
    """The ids of `tensors` that a kernel of ours or a fused call of cuDNN's takes as they are in `run()`."""
    with noting() as found, torch.no_grad(), contextlib.suppress(NotImplementedError):
        run()  # raises where "triton" was asked for by name and serves only some of the layers
    failed = () if get_backend() == "triton" else FAILED
    taken = {found.origins.get(key, key) for operation, key in found.taken if operation not in failed}
    return [tensor for tensor in tensors if id(tensor) in taken]


@contextlib.contextmanager
def noting() -> Iterator[_Notes]:
    chooser = _chooser()
    previous, chooser.explanations = chooser.explanations, _Notes()
    try:
        yield chooser.explanations
    finally:
        chooser.explanations = previous


_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_gpu_reasons: dict[int | None, str | None] = {}


def kernel_reason_not(choice: str, input: Tensor, autocast: torch.dtype | None = None) -> str | None:
    """The reason why no kernel runs on `input`, of any family: device, architecture, dtype (autocast's)."""
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


def too_old(device: torch.device) -> bool:
    """True if the kernels cannot run on this GPU."""
    return _gpu_reason_not(device.index) is not None


def _gpu_reason_not(index: int | None) -> str | None:
    if index not in _gpu_reasons:
        old = torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)
        _gpu_reasons[index] = "the GPU's compute capability is below 8.0" if old else None
    return _gpu_reasons[index]


# torch.compile calls it while tracing and keeps the answer (`torch.compiler.assume_constant_result`, without
# its import). Under a `functools` cache the mark is not seen: Dynamo traces what is behind it.
_gpu_reason_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
