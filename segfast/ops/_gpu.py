"""The choice on a GPU: the implementation verified and timed there for a call's shape, else ATen."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _choice
from ._backend import CHOSEN, EMPTY, backend, get_backend, is_noting, kernel_reason_not, noting
from ._choice import ATEN, Choice, choices
from ._gpu_call import GPU_OPERATIONS, Draw, GpuCall, Shape
from ._operands import load_kernels
from ._operator import is_traced

TRITON = "triton"
_tracing = torch._C._get_tracing_state
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What an operation made of others is called where each of those runs what was chosen for it.
PARTS = "parts"
_names: dict[int, str] = {}
_read: set[str] = set()
_known: set[str] = set()
_left_to_parts: set[str] = set()


def choose(
    operation: str,
    images: Sequence[Tensor],
    weights: Sequence[Tensor],
    options: tuple[Any, ...],
    differentiates: bool,
    dtype: torch.dtype | None = None,
    sizes: Sequence[Shape] = (),
    operands: Sequence[Tensor | None] = (),
) -> str | None:
    """The name of the candidate that runs a call under "auto", ATEN, TRITON or another; None: not measured.

    `options` are hashable and of numbers, strings, None and tuples of them; `dtype` is autocast's; `sizes`
    are shapes that count as further images'; `operands` are further ones, of which `options` says whether
    they are given.
    """
    first = images[0]
    if not first.is_cuda or get_backend() != "auto":
        return None
    index = -1 if first.device.index is None else first.device.index
    casts, dtype = dtype is not None, dtype or first.dtype
    if dtype not in _DTYPES or not can_choose(index) or _tracing() is not None:
        return None
    if any([t.dim() != 4 for t in (*images, *weights)]):
        return None  # torch says what is wrong
    if torch.compiler.is_compiling():
        shapes = (*[(0, _fixed(t.shape[1]), 0, 0) for t in images], *[(0, shape[1], 0, 0) for shape in sizes])
        filters = tuple([tuple([_fixed(n) for n in t.shape]) for t in weights])
        last = all([_channels_innermost(t) for t in images])
        return _while_compiling(operation, index, dtype, last, shapes, filters, options, differentiates)
    if operation in _left_to_parts:
        return None
    call = GpuCall(
        operation,
        gpu_name(index),
        dtype,
        load_kernels().dot_precision(dtype) if dtype == torch.float32 else "",
        all([_channels_innermost(t) for t in images]),
        (*[t.shape for t in images], *sizes),
        tuple([t.shape for t in weights]),
        options,
        differentiates,
    )
    found = choices().find(call)
    collected = _choice.collected()
    if collected is not None:
        if call in collected.counts or _can_measure(call, (*images, *weights, *operands), casts):
            collected.add(call, *weights)
    elif (
        _choice.measures_unseen()
        and not _is_settled(call, found, first.device)
        and _is_unwatched()
        and _can_measure(call, (*images, *weights, *operands), casts)
    ):
        from ._gpu_tune import measure_now  # which imports this module

        found = measure_now(call, first.device)
    if found is None:
        return None
    if is_noting():
        CHOSEN[operation] = str(found)
    return found.name


def reason_not(operation: str, chosen: str | None) -> str | None:
    """None if `chosen` is our kernels; else why they do not run."""
    if chosen == TRITON:
        return None
    if chosen is None:
        return "not measured on this GPU"
    return CHOSEN.get(operation, chosen) if is_noting() else chosen


def can_use_triton(
    backend: str, input: Tensor, weight: Tensor, dtype: torch.dtype | None, name: str, chosen: str | None
) -> str | None:
    """None if our kernels serve a convolution, else why not.

    `dtype` is autocast's, or None; `chosen` is what `choose` said of the operation `name`.
    """
    reason = kernel_reason_not(backend, input, dtype)
    if reason is None and (input.numel() == 0 or weight.numel() == 0):
        reason = EMPTY
    if reason is not None or backend == "triton":
        return reason
    return reason_not(name, chosen)


def can_choose(index: int) -> bool:
    """True if a call on the GPU of this index could run anything but ATen."""
    gpu = gpu_name(index)
    if gpu not in _read:
        _read.add(gpu)
        from ._choice_files import read_gpu  # which imports this module

        for call, choice in read_gpu(gpu).items():
            keep(call, choice)
    return gpu in _known or _choice.is_listening()


def keep(call: GpuCall, choice: Choice) -> None:
    """Remember `choice` in this process, with the tile sizes it was measured with."""
    kernels = load_kernels()
    for operation, bucket, fields in choice.tiles:
        kernels.keep_tile(f"{call.gpu}{call.precision}", operation, bucket, kernels.Tile(*fields))
    choices().add(call, choice)
    _known.add(call.gpu)


def forget() -> None:
    """Read choices anew at their next use."""
    _read.clear()
    _known.clear()
    load_kernels().forget_tiles()


@contextlib.contextmanager
def left_to_parts(operation: str) -> Iterator[None]:
    """Within it calls of `operation`, which consists of others, run those."""
    already = operation in _left_to_parts
    _left_to_parts.add(operation)
    try:
        yield
    finally:
        if not already:
            _left_to_parts.discard(operation)


def gpu_name(index: int) -> str:
    """The name of the GPU of this index, "nvidia-h200"; -1 is the current one."""
    if index < 0:
        index = torch.cuda.current_device()
    found = _names.get(index)
    if found is None:
        found = _names[index] = load_kernels().gpu_slug(torch.device("cuda", index))
    return found


def _while_compiling(
    operation: str,
    index: int,
    dtype: torch.dtype,
    channels_last: bool,
    images: tuple[Shape, ...],
    weights: tuple[Shape, ...],
    options: tuple[Any, ...],
    gradients: bool,
) -> str | None:
    """The choice of all sizes: ours where it was the fastest for each that was measured, else ATen."""
    if not can_choose(index):
        return None
    precision = load_kernels().dot_precision(dtype) if dtype == torch.float32 else ""
    gpu = gpu_name(index)
    call = GpuCall(operation, gpu, dtype, precision, channels_last, images, weights, options, gradients)
    names = {choice.name for choice in choices().of_any_size(call)}
    return names.pop() if len(names) == 1 else ATEN if names else None


# torch.compile calls these while tracing and keeps the answers (`torch.compiler.assume_constant_result`,
# without its import).
_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]
can_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fixed(size: int) -> int:
    """A size that torch.compile leaves open, as the number that it is now: which it then guards."""
    return len(range(size))


def _channels_innermost(t: Tensor) -> bool:
    return t.stride(1) == 1 or t.shape[1] == 1


def _can_measure(call: GpuCall, given: Sequence[Tensor | None], casts: bool) -> bool:
    """True if torch would take it at all; what is wrong with another, torch says.

    `given` are the tensors that it was asked with, images first; `casts`, that autocast makes one dtype of
    theirs.
    """
    shapes = (*call.images, *call.weights)
    if call.operation not in GPU_OPERATIONS or not all([min(shape) > 0 for shape in shapes]):
        return False
    tensors = [t for t in given if t is not None]
    first, *others = tensors
    main = tensors[: len(call.images) + len(call.weights)]
    same = casts or all([t.dtype == first.dtype for t in main])
    if not same or any([t.device != first.device for t in others]):
        return False
    try:
        # Meta tensors have sizes and no numbers: torch checks the call, and computes nothing.
        bound = GPU_OPERATIONS[call.operation].bind(call, Draw(call, torch.device("meta")))
        with noting(), backend("aten"), torch.no_grad():
            bound.function(*bound.tensors)
    except Exception:
        return False
    rest = [t.shape for t in tensors[len(main) :]]
    return not rest or rest == [t.shape for t in bound.tensors[len(main) :]]


def _is_settled(call: GpuCall, choice: Choice | None, device: torch.device) -> bool:
    """True if there is a choice, and no candidate that was left out of it as unproven is proven by now."""
    if choice is None or not choice.unproven:
        return choice is not None
    from ._gpu_measure import unproven  # which imports this module

    return bool(unproven(call, device))


def _is_unwatched() -> bool:
    """True if nobody would see, or record, what is done to measure."""
    return not is_traced() and not torch.cuda.is_current_stream_capturing()
