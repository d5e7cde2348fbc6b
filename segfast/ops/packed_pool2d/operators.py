"""The registered operators of packed pooling: checks, shapes, kernels, and the same in ATen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import channels_innermost, in_format, output_format
from .._operands import empty, load_kernels
from .._operator import Operator
from . import formulas


def check_places(operation: str, places: Tensor, like: Tensor, size: Sequence[int]) -> None:
    """Raise RuntimeError for places that are not those of windows of `size` in images `like` [N, C, ...]."""
    wanted = (like.shape[0], -(-like.shape[1] // 4), *size)
    if places.dtype != torch.uint8 or places.shape != wanted:
        raise RuntimeError(
            f"{operation}: indices must be uint8 {list(wanted)}, 2 bits a window, as packed_max_pool2d "
            f"returns them, got {str(places.dtype).removeprefix('torch.')} {list(places.shape)}"
        )
    if places.device != like.device:
        raise RuntimeError(
            f"{operation}: input and indices must share a device, got {like.device} and {places.device}"
        )


def _pooled_shapes(input: Tensor, ceil_mode: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    batch, channels = input.shape[:2]
    size = [(side + ceil_mode) // 2 for side in input.shape[2:]]
    return (batch, channels, *size), (batch, (channels + 3) // 4, *size)


def _pool_fake(input: Tensor, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    memory_format = output_format(input, input)
    values, places = _pooled_shapes(input, ceil_mode)
    return (
        empty(values, input, memory_format),
        torch.empty(places, dtype=torch.uint8, device=input.device, memory_format=memory_format),
    )


def _pool_kernels(input: Tensor, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    memory_format = output_format(input, input)
    shape, places_shape = _pooled_shapes(input, ceil_mode)
    out = empty(shape, input)
    places = torch.empty(
        places_shape, dtype=torch.uint8, device=input.device, memory_format=torch.channels_last
    )
    if out.numel() > 0:
        load_kernels().packed_max_pool2d(channels_innermost(input), out, places)
    return in_format(out, memory_format), in_format(places, memory_format)


def _pool_reference(input: Tensor, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    memory_format = output_format(input, input)
    values, places = formulas.pool(input, ceil_mode)
    return in_format(values, memory_format), in_format(places, memory_format)


def _unpool_fake(input: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    check_places("packed_max_unpool2d", places, input, input.shape[2:])
    return empty((*input.shape[:2], *size), input, output_format(input, input))


def _dense(places: Tensor) -> Tensor:
    return places.contiguous(memory_format=torch.channels_last)


def _unpool_kernels(input: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    check_places("packed_max_unpool2d", places, input, input.shape[2:])
    out = empty((*input.shape[:2], *size), input)
    if out.numel() > 0:
        load_kernels().packed_max_unpool2d(channels_innermost(input), _dense(places), out)
    return in_format(out, output_format(input, input))


def _unpool_reference(input: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    return in_format(formulas.unpool(input, places, size), output_format(input, input))


def _backward_fake(grad: Tensor, places: Tensor) -> Tensor:
    check_places("packed_max_unpool2d_backward", places, grad, places.shape[2:])
    return empty((*grad.shape[:2], *places.shape[2:]), grad, output_format(grad, grad))


def _backward_kernels(grad: Tensor, places: Tensor) -> Tensor:
    check_places("packed_max_unpool2d_backward", places, grad, places.shape[2:])
    out = empty((*grad.shape[:2], *places.shape[2:]), grad)
    if out.numel() > 0:
        load_kernels().packed_max_unpool2d_backward(channels_innermost(grad), _dense(places), out)
    return in_format(out, output_format(grad, grad))


def _backward_reference(grad: Tensor, places: Tensor) -> Tensor:
    return in_format(formulas.unpool_backward(grad, places), output_format(grad, grad))


def _no_flops(*_, **__) -> int:
    """As torch counts pooling: comparisons are none."""
    return 0


POOL = Operator(
    "packed_max_pool2d(Tensor input, bool ceil_mode) -> (Tensor, Tensor)",
    kernels=_pool_kernels,
    reference=_pool_reference,
    fake=_pool_fake,
    flops=_no_flops,
    per_sample=(0,),
)
UNPOOL = Operator(
    "packed_max_unpool2d(Tensor input, Tensor places, SymInt[2] size) -> Tensor",
    kernels=_unpool_kernels,
    reference=_unpool_reference,
    fake=_unpool_fake,
    flops=_no_flops,
    per_sample=(0, 1),
)
UNPOOL_BACKWARD = Operator(
    "packed_max_unpool2d_backward(Tensor grad, Tensor places) -> Tensor",
    kernels=_backward_kernels,
    reference=_backward_reference,
    fake=_backward_fake,
    flops=_no_flops,
    per_sample=(0, 1),
)
