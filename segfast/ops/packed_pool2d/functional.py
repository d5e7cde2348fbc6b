"""Packed max pooling and unpooling: the functions."""

from collections.abc import Sequence

from torch import Tensor

from .._backend import EMPTY, kernel_reason_not, use_triton
from .._gpu import choose, reason_not
from .._operator import needs_autograd
from . import autograd
from .operators import check_places

OPERATIONS = ("packed_max_pool2d", "packed_max_unpool2d", "packed_max_unpool2d_backward")


def can_use_triton(choice: str, input: Tensor, name: str, chosen: str | None) -> str | None:
    """None if our kernels serve the call, else why not; `chosen` is what `_gpu.choose` said of `name`."""
    reason = kernel_reason_not(choice, input)
    if reason is None and input.numel() == 0:
        reason = EMPTY
    if reason is not None or choice == "triton":
        return reason
    return reason_not(name, chosen)


def _check_input(operation: str, input: Tensor, least: int) -> None:
    if input.dim() != 4 or not input.is_floating_point() or min(input.shape[2:]) < least:
        raise RuntimeError(
            f"{operation}: input must be floating point [N, C, H, W] with H, W >= {least}, "
            f"got {str(input.dtype).removeprefix('torch.')} {list(input.shape)}"
        )


def packed_max_pool2d(input: Tensor, ceil_mode: bool = False) -> tuple[Tensor, Tensor]:
    """`torch.nn.functional.max_pool2d(input, 2, return_indices=True)` with the indices in 2 bits a window.

    That is a thirty-second of the memory of int64 indices; and the indices are all that a backward keeps.
    Values, and which pixel of a window is taken, are torch's to the last bit: of equal ones the first, of NaN
    the last. Differentiable any number of times.

    Args:
        input: [N, C, H, W]; float16, bfloat16 or float32 on our kernels.
        ceil_mode: True takes in the last pixels of odd sides, in windows cut off by the border.

    Returns:
        The largest of each window, [N, C, OH, OW] with halves of the sides, rounded down or, with
        `ceil_mode`, up; and the indices for `packed_max_unpool2d`, uint8 [N, ceil(C / 4), OH, OW]. A byte
        holds those of four channels: of channel c in bits 2 (c mod 4) and up, 2 row + column in the window.

    Raises:
        RuntimeError: an input that is no batch of floating-point images, or one without a window.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Example:
        >>> import torch, segfast
        >>> image = torch.tensor([[[[1.0, 2.0, 0.0], [5.0, 3.0, 4.0]]]])
        >>> values, indices = segfast.functional.packed_max_pool2d(image, ceil_mode=True)
        >>> values.tolist(), indices.tolist()
        ([[[[5.0, 4.0]]]], [[[[2, 2]]]])
        >>> segfast.functional.packed_max_unpool2d(values, indices, (2, 3)).tolist()
        [[[[0.0, 0.0, 0.0], [5.0, 0.0, 4.0]]]]
    """
    name = OPERATIONS[0]
    _check_input(name, input, 1 if ceil_mode else 2)
    chosen = choose(name, (input,), (), (ceil_mode,), needs_autograd(input))
    on_aten = not use_triton(name, can_use_triton, input, name, chosen)
    return autograd.pool(input, ceil_mode, on_aten)


def _has_windows(side: int, count: int) -> bool:
    """True if a side of so many pixels has that count of windows, rounded up or down."""
    return (side + 1) // 2 == count or side // 2 == count


def packed_max_unpool2d(input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
    """`torch.nn.functional.max_unpool2d(input, ..., 2)` with the indices of `packed_max_pool2d`.

    Every value comes to where its window's largest pixel was, all else is zero. Differentiable any number of
    times.

    Args:
        input: [N, C, OH, OW]; float16, bfloat16 or float32 on our kernels.
        indices: uint8 [N, ceil(C / 4), OH, OW], as `packed_max_pool2d` returned them.
        output_size: H and W of the result, those of the image that was pooled; twice the input's by default.
            A side is at most 1 less or more than twice the input's.

    Returns:
        [N, C, H, W] of the input's dtype.

    Raises:
        RuntimeError: an input that is no batch of floating-point images, indices of other windows.
        ValueError: an output size that the windows do not have.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.
    """
    name = OPERATIONS[1]
    _check_input(name, input, 1)
    check_places(name, indices, input, input.shape[2:])
    doubled = [2 * side for side in input.shape[2:]]
    size = tuple(doubled if output_size is None else output_size)[-2:]
    if len(size) != 2 or not all(map(_has_windows, size, input.shape[2:])):
        raise ValueError(
            f"{name}: output_size must be within 1 of {doubled}, twice the input's, got {list(size)}"
        )
    sizes = ((*input.shape[:2], *size),)
    chosen = choose(name, (input,), (), (), needs_autograd(input), sizes=sizes)
    on_aten = not use_triton(name, can_use_triton, input, name, chosen)
    return autograd.unpool(input, indices, size, on_aten)
