"""Which implementation runs: "triton" (our kernels), "aten" (cuDNN, oneDNN) or "auto".

Decided in Python, before any operator.
"""

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "aten")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_DEFAULT = _checked(os.environ.get("SEGFAST_BACKEND", "auto"), "SEGFAST_BACKEND")


class Decision(NamedTuple):
    """One choice of backend, and why."""

    operation: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend} ({self.reason})"


class _Notes(list[Decision]):
    """Decisions; and which tensors, by id, kernels of ours or cuDNN's fused calls took, by operation."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, int]] = []
        self.origins: dict[int, int] = {}  # of tensors computed from a weight, by id, the weight's id


class _Choice:
    """A backend, and the list that decisions are noted in; None where there is none."""

    backend: str | None = None
    decisions: "_Notes | None" = None


class _Thread(threading.local, _Choice):
    """The calling thread's own. Not a ContextVar: reading one breaks torch.compile(fullgraph=True)."""

    def __init__(self) -> None:
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
        name: "auto" (a kernel of ours where it is proven on this GPU and measured faster, on a CPU what was
            measured to be the fastest; else ATen), "triton" (our kernels or an error), or "aten" (cuDNN on a
            GPU, oneDNN on a CPU).

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
    """The backend of the calling thread: its own choice, else the main thread's."""
    return _thread.backend or _main.backend or _DEFAULT


def _noted() -> _Notes | None:
    """The list in which decisions of the calling thread are noted, if somebody asked."""
    return _main.decisions if _thread.decisions is None else _thread.decisions


def is_noting() -> bool:
    """Whether somebody asks for the decisions."""
    return _noted() is not None


# A predicate's reason where nothing is to be computed: by whatever name, ATen's is the right empty result.
EMPTY = "a tensor is empty"

# Operations whose kernels could not be compiled or launched in this process, and the kernel's error.
FAILED: dict[str, str] = {}


def use_triton(
    operation: str, reason_not: Callable[..., str | None], *args: Any, because: str = "proven, faster"
) -> bool:
    """Whether `operation` runs our kernels for these arguments.

    `reason_not(*args)` is the family's predicate: None, or why its kernels cannot serve the call. Under
    "auto" a kernel must moreover be proven on this GPU and measured faster (the predicate's caller passes
    that in `args`); `because` says in the decision what it was.

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
        noted.append(Decision(operation, chosen, reason))
    return answer


def add_reason(reason: str) -> None:
    """Add to the last decision's reason why ATen is called as it is, unless that was the reason already."""
    noted = _noted()
    if noted and reason.partition(" was ")[0] not in noted[-1].reason:
        noted[-1] = noted[-1]._replace(reason=f"{noted[-1].reason}; {reason}")


def change_decision(chosen: str, reason: str) -> None:
    """Say of the last decision that `chosen` runs instead, and why."""
    noted = _noted()
    if noted:
        noted[-1] = noted[-1]._replace(backend=chosen, reason=f"{noted[-1].reason}; {reason}")


def add_decision(operation: str, chosen: str, reason: str) -> None:
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


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Decision]:
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
    """Which of `tensors` a kernel of ours or a fused call of cuDNN's takes as they are while `run()` runs."""
    with noting() as found, torch.no_grad(), contextlib.suppress(NotImplementedError):
        run()  # raises where "triton" was asked for by name and serves only some of the layers
    failed = () if get_backend() == "triton" else FAILED
    taken = {found.origins.get(key, key) for operation, key in found.taken if operation not in failed}
    return [tensor for tensor in tensors if id(tensor) in taken]


@contextlib.contextmanager
def noting() -> Iterator[_Notes]:
    chooser = _chooser()
    previous, chooser.decisions = chooser.decisions, _Notes()
    try:
        yield chooser.decisions
    finally:
        chooser.decisions = previous


_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
_gpu_reasons: dict[int | None, str | None] = {}


def certainly_aten(input: Tensor) -> bool:
    """Whether a call on `input` is ATen's whatever its sizes, and nobody asks why: a CPU's usual case."""
    if get_backend() == "triton" or _noted() is not None:
        return False
    return not _INTERPRETING if input.is_cpu else input.is_cuda and not fusion_could_help(input)


def fusion_could_help(input: Tensor) -> bool:
    """Whether one of our kernels, or of cuDNN's fused calls, could run on `input`.

    Elsewhere layers put together are the same passes over the images, and Python's time besides.
    """
    if not input.is_cuda:
        return input.is_cpu and _INTERPRETING
    choice = get_backend()
    return choice == "triton" or (choice == "auto" and _is_anything_known(_index(input.device)))


def _is_anything_known(index: int) -> bool:
    """True if anything was proven or measured on this GPU."""
    return _anything_known(index)


@functools.cache
def _anything_known(index: int) -> bool:
    from segfast.kernels import _configs

    arch, slug = _here(index)
    return bool(_configs.proven_entries(arch) or _configs.tables(slug, arch))


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


# What a measured row may time beside our kernel, and what it is called. The plain convolution and passes over
# its result, and cuDNN's calls that take the epilogue along.
_RIVALS = {"aten": "ATen", "cudnn_relu": "cuDNN's fused call", "cudnn_graph": "a cuDNN graph"}
Geometry = tuple[tuple[int, int], ...]


def measured_reason_not(
    operations: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
    channels_in: int,
    channels_out: int,
    taps: int,
    groups: int,
    pixels: int,
    geometry: Geometry | None = None,
    fused: bool = False,
    rivals: tuple[str, ...] = (),
) -> str | None:
    """Why "auto" keeps ATen for these operations: not proven here, not measured, or measured slower.

    `geometry` is (stride, dilation, kernel) for operations whose tables tell those apart, `fused` whether an
    epilogue follows, for those that tell that. `rivals` are what could serve the call beside ATen's plain
    convolution: our kernel must have been faster than each that was measured.
    """
    if torch.compiler.is_compiling():
        pixels = -1  # may be symbolic: decide for all image sizes at once
    sizes = (dtype, _index(device), channels_in, channels_out, taps, groups, geometry, fused)
    return _measured_reason_not(operations, sizes, pixels, rivals)


def measured_rival(
    operation: str,
    dtype: torch.dtype,
    device: torch.device,
    channels_in: int,
    channels_out: int,
    taps: int,
    groups: int,
    pixels: int,
    geometry: Geometry | None,
    fused: bool,
    rivals: tuple[str, ...],
) -> tuple[str, str] | None:
    """Which of `rivals` was measured faster than plain ATen and each other, and that in words; or None.

    For a shape that was not measured, the one that was faster on nearly all that were.
    """
    sizes = (dtype, _index(device), channels_in, channels_out, taps, groups, geometry, fused)
    return _rival(operation, sizes, pixels.bit_length() - 1, rivals)


def _index(device: torch.device) -> int:
    return -1 if device.index is None else device.index


def _here(index: int) -> tuple[str, str]:
    """Architecture and name of a GPU."""
    from segfast.kernels import _device

    device = torch.device("cuda", index) if index >= 0 else torch.device("cuda")
    return _device.architecture(device), _device.gpu_slug(device)


def _row(operation: str, sizes: tuple, log2_pixels: int, arch: str, slug: str) -> dict | None:
    """The measured row of an operation; of the size least favourable to our kernel if `log2_pixels` is -1."""
    from segfast.kernels import _configs

    dtype, _, channels_in, channels_out, taps, groups, geometry, fused = sizes
    variant = "" if geometry is None else _configs.geometry_variant(*geometry)
    variant += "-fused" if fused and operation.endswith("_forward") else ""
    stem = _configs.stem(channels_in, channels_out, taps, groups, dtype, variant)
    row = _configs.measured(operation, f"{stem}{log2_pixels if log2_pixels >= 0 else ''}", slug, arch)
    # A kernel's row that was timed as part of another family's operation has tiles, but no say here.
    return None if row is None or "timed_as" in row else row


def _fastest(row: dict, rivals: tuple[str, ...]) -> tuple[str, float]:
    """The fastest measured one of ATen and `rivals`, and its microseconds."""
    times = {name: row[f"{name}_us"] for name in ("aten", *rivals) if f"{name}_us" in row}
    return min(times.items(), key=lambda item: item[1])


@functools.lru_cache(maxsize=4096)
def _look_up(
    operations: tuple[str, ...], sizes: tuple, log2_pixels: int, rivals: tuple[str, ...]
) -> str | None:
    from segfast.kernels import _configs

    arch, slug = _here(sizes[1])
    name = str(sizes[0]).removeprefix("torch.")
    for operation in operations:
        if f"{operation}.{name}" not in _configs.proven_entries(arch):
            return f"{operation} in {name} is not proven on this GPU ({arch})"
    ours = theirs = 0.0
    fastest = "aten"
    for operation in operations:
        row = _row(operation, sizes, log2_pixels, arch, slug)
        if row is None:
            return f"{operation} was not measured for this shape on this GPU"
        ours += row["us"]
        found, us = _fastest(row, rivals)
        theirs += us
        fastest = found if found != "aten" else fastest
    if ours >= theirs:
        return f"{_RIVALS[fastest]} was measured faster ({theirs:.0f} against {ours:.0f} us)"
    return None


@functools.lru_cache(maxsize=4096)
def _rival(operation: str, sizes: tuple, log2_pixels: int, rivals: tuple[str, ...]) -> tuple[str, str] | None:
    here = _here(sizes[1])
    row = _row(operation, sizes, log2_pixels, *here)
    if row is None:
        return _usual_rival(operation, sizes, rivals, *here)
    name, us = _fastest(row, rivals)
    words = f"{_RIVALS[name]} was measured faster than plain ATen ({us:.0f} against {row['aten_us']:.0f} us)"
    return None if name == "aten" else (name, words)


# For a shape that was not measured: of how many others a rival must have been measured, and on what share of
# them it must have been no slower than ATen, a little noise aside.
_MANY, _NEARLY_ALL, _NOISE = 20, 0.99, 1.03


def _usual_rival(
    operation: str, sizes: tuple, rivals: tuple[str, ...], arch: str, slug: str
) -> tuple[str, str] | None:
    """The rival that was faster than ATen on nearly all shapes measured in this dtype, fused or bare."""
    from segfast.kernels import _configs

    dtype, _, _, _, _, groups, _, fused = sizes
    ending = f"{'-fused' if fused else ''}-{str(dtype).removeprefix('torch.')}"
    alike = []
    for bucket, row in _configs.rows_of(operation, slug, arch):
        stem = bucket.rpartition("-p")[0]
        if f"-g{groups}-" in stem and stem.endswith(ending) and ("-fused" in stem) == fused:
            alike.append(row)
    best, gain = None, 0.0
    for name in rivals:
        ratios = [row["aten_us"] / row[f"{name}_us"] for row in alike if f"{name}_us" in row]
        sound = [ratio for ratio in ratios if ratio * _NOISE >= 1]
        if len(ratios) < _MANY or len(sound) < _NEARLY_ALL * len(ratios):
            continue
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        if mean > max(gain, _NOISE):
            words = f"{_RIVALS[name]} was measured faster than plain ATen on {len(ratios)} shapes like it"
            best, gain = (name, words), mean
    return best


def _measured_reason_not(operations, sizes, pixels, rivals):
    log2_pixels = pixels.bit_length() - 1 if pixels >= 0 else -1
    return _look_up(operations, sizes, log2_pixels, rivals)


# torch.compile calls these while tracing and keeps the answers (`torch.compiler.assume_constant_result`,
# without its import). Under a `functools` cache the mark is not seen: Dynamo traces what is behind it.
_is_anything_known._dynamo_marked_constant = True  # type: ignore[attr-defined]
_measured_reason_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
_gpu_reason_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget_decisions() -> None:
    """Read proofs and tables anew at the next call."""
    from segfast.kernels import _configs

    _look_up.cache_clear()
    _anything_known.cache_clear()
    _rival.cache_clear()
    _configs.forget_tables()
