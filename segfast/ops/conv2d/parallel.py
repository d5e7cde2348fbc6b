"""Convolutions of one input side by side, as in DeepLab's atrous spatial pyramid, in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._aten_only import certainly_aten
from .._backend import note_taken, use_triton
from .._convolution import convolution_flops
from .._cpu import conv2d
from .._epilogue import check_activation, check_epilogue
from .._geometry import check_alike
from .._gpu import can_use_triton, choose
from .._layout import channels_innermost, fit_vectors, in_format, output_format, packed_weight
from .._operands import Pair, empty, load_kernels, pair
from .._operator import (
    Operator,
    _functorch_active,
    autocast_dtype,
    launch_again,
    launch_first,
    needs_autograd,
)
from .._prepared_weights import cast
from .operators import CONV2D


def _check(input: Tensor, weights: Sequence[Tensor], dilations: Sequence[Pair]) -> tuple[int, ...]:
    """The result's shape."""
    if not weights or len(weights) != len(dilations):
        raise RuntimeError(
            "parallel_conv2d: weights and dilations must be as many, and at least one, "
            f"got {len(weights)} and {len(dilations)}"
        )
    if input.dim() != 4:
        raise RuntimeError(f"parallel_conv2d: input must be [N, C_in, H, W], got {list(input.shape)}")
    for index, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        if weight.dim() != 4 or weight.shape[1] != input.shape[1]:
            raise RuntimeError(
                f"parallel_conv2d: weights[{index}] must be [C_out, {input.shape[1]}, kH, kW], "
                f"got {list(weight.shape)}"
            )
        if weight.shape[0] == 0:
            raise RuntimeError(f"parallel_conv2d: weights[{index}] has no filters: {list(weight.shape)}")
        if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
            raise RuntimeError(
                f"parallel_conv2d: weights[{index}] must have an odd height and width, which keep the "
                f"image's size, got {list(weight.shape[2:])}"
            )
        if min(dilation) < 1:
            raise RuntimeError(f"parallel_conv2d: dilations[{index}] must be positive, got {dilation}")
        check_alike("parallel_conv2d", input, **{f"weights[{index}]": weight})
    return (input.shape[0], sum([w.shape[0] for w in weights]), *input.shape[2:])


def _pairs(dilations: Sequence[int]) -> list[Pair]:
    return list(zip(dilations[::2], dilations[1::2], strict=True))


def _result_shape(input, weights, scale, shift, dilations):
    shape = _check(input, weights, _pairs(dilations))
    check_epilogue(shape, input.device, scale, shift, None)
    return shape


def _fake(input, weights, scale, shift, dilations, activation, negative_slope):
    shape = _result_shape(input, weights, scale, shift, dilations)
    return empty(shape, input, output_format(input, weights[0]))


def _kernels(input, weights, scale, shift, dilations, activation, negative_slope):
    kernels = load_kernels()
    tensors = (input, scale, shift, *weights)
    key = ("parallel_conv2d", kernels.layout_key(*tensors), input.device, dilations, activation,
           negative_slope, kernels.dot_precision(input.dtype))  # fmt: skip
    result = launch_again(key, (input, weights, scale, shift))
    if result is not None:
        return result
    shape = _result_shape(input, weights, scale, shift, dilations)
    image, vectors = channels_innermost(input), fit_vectors(scale, shift)
    filters = [packed_weight(w) for w in weights]
    options = (_pairs(dilations), activation, negative_slope)
    return launch_first(
        key,
        shape,
        output_format(input, weights[0]),
        tensors,
        (image, *vectors, *filters),
        lambda out: kernels.parallel_conv2d_forward(image, filters, *vectors, out, *options),
    )


def _same(weight: Tensor, dilation: Pair) -> Pair:
    """The padding that keeps the size."""
    return dilation[0] * (weight.shape[2] // 2), dilation[1] * (weight.shape[3] // 2)


def _branches(convolution, input, weights, dilations, scale, shift, *ending) -> Tensor:
    """The branches one by one, each with its part of `scale` and `shift`, concatenated."""
    results, start = [], 0
    for weight, dilation in zip(weights, dilations, strict=True):
        end = start + weight.shape[0]
        mine = [None if v is None else v[start:end] for v in (scale, shift)]
        results.append(convolution(input, weight, _same(weight, dilation), dilation, *mine, *ending))
        start = end
    return torch.cat(results, 1)


def _aten_branch(input, weight, padding, dilation, scale, shift, activation, negative_slope):
    return conv2d(
        input, weight, None, (1, 1), padding, dilation, 1, scale, shift, None, activation, negative_slope
    )


def _chosen_branch(input, weight, padding, dilation, scale, shift, activation, negative_slope):
    """One branch, by the candidate that was chosen for it as a convolution of its own."""
    from .functional import conv2d as any_conv2d  # which imports this module

    options = {"scale": scale, "shift": shift, "activation": activation, "negative_slope": negative_slope}
    return any_conv2d(input, weight, None, 1, padding, dilation, **options)


def _kernel_branch(input, weight, padding, dilation, scale, shift, activation, negative_slope):
    return CONV2D.forward(
        input, weight, None, scale, shift, None, (1, 1), padding, dilation, 1, activation, negative_slope
    )


def _reference_branch(input, weight, padding, dilation, scale, shift, *ending):
    options = ((1, 1), padding, dilation, 1, *ending)
    return CONV2D.operator.reference(input, weight, None, scale, shift, None, *options)


def _reference(input, weights, scale, shift, dilations, activation, negative_slope):
    _result_shape(input, weights, scale, shift, dilations)
    pairs = _pairs(dilations)
    y = _branches(_reference_branch, input, weights, pairs, scale, shift, activation, negative_slope)
    return in_format(y, output_format(input, weights[0]))


PARALLEL = Operator(
    "parallel_conv2d(Tensor input, Tensor[] weights, Tensor? scale, Tensor? shift, SymInt[] dilations, "
    "str? activation, float negative_slope) -> Tensor",
    kernels=_kernels,
    reference=_reference,
    fake=_fake,
    flops=lambda input, weights, *_, **__: sum(convolution_flops(input, weight) for weight in weights),
)


def parallel_conv2d(
    input: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int | Pair],
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
) -> Tensor:
    """Convolutions of one input at several dilations, concatenated: the branches of an ASPP.

    `cat([act(scale_i * conv(input, weight_i, dilation_i) + shift_i)], 1)`, each convolution of stride 1 and
    padded to keep the size. On our kernels one launch computes all branches, skips the taps that meet nothing
    but padding, and writes each branch into its channels of the result.

    Args:
        input: [N, C_in, H, W].
        weights: each [C_i, C_in, kH, kW] with odd kH and kW.
        dilations: as many, an int or a pair each.
        scale, shift: [sum of C_i], for instance the branches' folded batch norms; evaluated in float32. A
            bias belongs into the shift.
        activation, negative_slope: as in `conv2d`.

    Returns:
        [N, sum of C_i, H, W]; channels_last if the input or the first weight is.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not go together, or an even kernel.
        ValueError: an unknown activation.
        NotImplementedError: backend "triton" was asked for and cannot serve the call.

    Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (2017), figure 5.

    Example:
        >>> import torch, segfast
        >>> x, w = torch.randn(1, 8, 9, 9), torch.randn(4, 8, 3, 3)
        >>> segfast.functional.parallel_conv2d(x, [w, w], [6, 12], activation="relu").shape
        torch.Size([1, 8, 9, 9])
    """
    check_activation(activation)
    pairs = [pair(d, "dilations") for d in dilations]
    dtype = autocast_dtype(input)
    # Choosing on a CPU, cast weights would be others at every call.
    casts = dtype is not None and not certainly_aten(input)
    if dtype is not None and casts:
        input, weights = input.to(dtype), [cast(w, dtype) for w in weights]
    if not (input.dim() == 4 and 0 < len(weights) == len(pairs) and all([w.dim() == 4 for w in weights])):
        _check(input, weights, pairs)  # raises
    ending = (scale, shift, activation, negative_slope)
    differentiates = needs_autograd(input, scale, shift, *weights)
    options = (tuple(pairs), scale is not None, shift is not None, activation)
    name = "parallel_conv2d"
    chosen = None
    if not differentiates:
        chosen = choose(name, (input,), weights, options, False, dtype, operands=(scale, shift))
    kernels = use_triton(name, can_use_triton, input, weights[0], dtype, name, chosen)
    if kernels:
        note_taken(name, weights)
    if kernels and not differentiates and not _functorch_active():
        rates = tuple([d for p in pairs for d in p])
        return PARALLEL(input, list(weights), scale, shift, rates, activation, negative_slope)
    # On ATen, with gradients, or where an operator on a list would not be seen, one after the other.
    checked = input if dtype is None or casts else input.to(weights[0].dtype)
    check_epilogue(_check(checked, weights, pairs), input.device, scale, shift, None)
    branch = _kernel_branch if kernels else _chosen_branch if input.is_cuda else _aten_branch
    return _branches(branch, input, weights, pairs, *ending)
