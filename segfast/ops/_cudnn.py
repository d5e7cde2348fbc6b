"""conv2d by one of cuDNN's calls that take the epilogue along.

Two are known: ATen's `cudnn_convolution_relu` and `cudnn_convolution_add_relu`, and a graph of cuDNN's, where
PyPI's `nvidia-cudnn-frontend` is installed. Neither has a gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from . import _cudnn_graph
from ._backend import change_explanation, is_noting, note_taken
from ._captured import is_captured, renewed
from ._geometry import output_size
from ._operands import Pair
from ._operator import autocast_dtype, needs_autograd
from ._prepared_weights import cast, watch

RELU, GRAPH = "cudnn_relu", "cudnn_graph"
_MOST_ELEMENTS = 2**31 - 1  # of a tensor that cuDNN takes whole; ATen's plain call cuts larger ones up
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state


def candidates(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> tuple[str, ...]:
    """The names of cuDNN's fused calls that could serve a conv2d.

    Empty where somebody has to see a differentiable or plain operator: a gradient, a transform, a compiler, a
    tracer or a tensor mode.
    """
    if _somebody_listens() or not isinstance(input, Tensor) or not _has_cudnn(input):
        return ()
    if needs_autograd(input, weight, bias, scale, shift, residual):
        return ()
    if residual is not None and 0 in residual.stride():
        return ()  # expanded: it would be written out
    dtype = autocast_dtype(input) or input.dtype
    found: tuple[str, ...] = (RELU,) if activation == "relu" and dtype in _RELU_DTYPES else ()
    # The graph knows neither torch's switch for tf32 nor the one for deterministic algorithms.
    exact = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    if activation in _cudnn_graph.CUDNN_ACTIVATIONS and dtype in _GRAPH_DTYPES and not exact:
        found += (GRAPH,) if _cudnn_graph.installed() else ()
    return found


_GRAPH_DTYPES = (torch.float16, torch.bfloat16)
_RELU_DTYPES = (*_GRAPH_DTYPES, torch.float32)


def _has_cudnn(input: Tensor) -> bool:
    return input.is_cuda and torch.version.hip is None and torch.backends.cudnn.enabled


def _somebody_listens() -> bool:
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or _tracing() is not None


def conv2d_cudnn(
    name: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor | None:
    """act(scale * (conv(input, weight) + bias) + shift + residual), by that fused call of cuDNN's.

    None for what it does not take; whatever is wrong with the arguments, ATen says. Scale and shift reach
    `cudnn_convolution_relu` folded into filter and bias: computed in fp32, rounded once to the input's dtype,
    as `torch.nn.utils.fuse_conv_bn_weights` leaves them, and remembered beside the filter.
    """
    if name not in candidates(input, weight, bias, scale, shift, residual, activation):
        return None
    if input.dim() != 4 or weight.dim() != 4:
        return None
    dtype, given = autocast_dtype(input), weight
    batch, _, height, width = input.shape
    filters, _, *kernel = weight.shape
    if dtype is not None:
        input, weight = input.to(dtype), cast(weight, dtype)
        bias, residual = [None if t is None else t.to(dtype) for t in (bias, residual)]
    shape = (batch, filters, *output_size(height, width, kernel, stride, padding, dilation))
    if not _fits(shape, input, weight, bias, stride, padding, dilation, groups, scale, shift, residual):
        return None
    try:
        y = CALLS[name](
            input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation
        )
    except _cudnn_graph.GraphRefused:
        return None
    if is_noting():
        change_explanation(name, "")
    note_taken("conv2d", (given,))
    return y


def _fits(
    shape, input, weight, bias, stride, padding, dilation, groups, scale, shift, residual
) -> bool:  # fmt: skip
    """True if the operands are in order, and as the measurement had them: channels_last and aligned."""
    if min(stride) < 1 or min(padding) < 0 or min(dilation) < 1 or groups < 1 or min(shape) < 1:
        return False
    filters = shape[1]
    if input.shape[1] != weight.shape[1] * groups or filters % groups or weight.numel() == 0:
        return False
    if any([t is not None and t.shape != (filters,) for t in (bias, scale, shift)]):
        return False
    if residual is not None and residual.shape != shape:
        return False
    if any([t is not None and t.dtype != input.dtype for t in (weight, bias, residual)]):
        return False
    if any([t is not None and t.device != input.device for t in (weight, bias, scale, shift, residual)]):
        return False
    images = [t for t in (input, residual) if t is not None]
    return (
        all([t.is_contiguous(memory_format=torch.channels_last) for t in images])
        and all([t.data_ptr() % 16 == 0 for t in (*images, weight)])
        and max(input.numel(), shape[0] * shape[1] * shape[2] * shape[3]) <= _MOST_ELEMENTS
    )


def conv2d_relu(
    input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation="relu"
) -> Tensor:
    """By ATen's fused call; the arguments are in order, the activation is relu."""
    weight, term = _folded(weight, bias, scale, shift)
    if residual is None:
        return torch.cudnn_convolution_relu(input, weight, term, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(
        input, weight, residual, 1.0, term, stride, padding, dilation, groups
    )


def _folded(
    weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Filter and bias of scale * (conv + bias) + shift, in the filter's dtype, remembered while all stand."""
    if scale is None and (shift is None or (bias is None and shift.dtype == weight.dtype)):
        return weight, bias if shift is None else shift
    parts = (bias, scale, shift)
    versions = [-1 if t is None or t.is_inference() else t._version for t in (weight, *parts)]
    capturing = is_captured([weight])
    folds = _folds.get(weight, [])
    known = next((fold for fold in folds if fold.is_of(parts)), None)
    if known is not None and known.versions == versions:
        known.captured |= capturing
        filters, term = known.result
        return (weight if filters is None else filters), term
    term = _added(bias, scale, shift)
    filters = None if scale is None else (weight * scale.float()[:, None, None, None]).to(weight.dtype)
    result = (filters, None if term is None else term.to(weight.dtype))
    # What is computed during a capture is the graph's, and an inference tensor's writes leave no trace.
    if not capturing and not any([t is not None and t.is_inference() for t in (weight, *parts)]):
        captured = known is not None and known.captured
        if known is not None and captured:
            result = renewed(known.result, result)
        # Those that graphs read stay as long as what they were computed from.
        others = [fold for fold in folds if fold is not known and fold.captured and fold.stands()]
        _folds[weight] = [*others, _Fold(parts, versions, result, captured)]
        watch(weight, *parts)
    filters, term = result
    return (weight if filters is None else filters), term


class _Fold:
    """A filter that differs from its weight, or None, and a bias; and what they were computed from."""

    def __init__(self, parts: tuple[Tensor | None, ...], versions: list[int], result: Any, captured: bool):
        self.parts = [None if t is None else TensorWeakRef(t) for t in parts]
        self.versions, self.result = versions, result
        self.captured = captured  # a CUDA graph reads `result`

    def is_of(self, parts: tuple[Tensor | None, ...]) -> bool:
        found = zip(self.parts, parts, strict=True)
        return all([t is None if ref is None else t is not None and ref() is t for ref, t in found])

    def stands(self) -> bool:
        return all([ref is None or ref() is not None for ref in self.parts])


# By weight, which none of a fold may keep alive.
_folds: Any = WeakTensorKeyDictionary()


def conv2d_graph(
    input, weight, bias, stride, padding, dilation, groups, scale, shift, residual, activation
) -> Tensor:
    """The convolution by a cuDNN graph, for valid arguments. Raises GraphRefused where no engine takes it."""
    terms = [("mul", scale), ("add", _added(bias, scale, shift))]
    found = [(kind, _aligned(t.float())[None, :, None, None]) for kind, t in terms if t is not None]
    if residual is not None:
        found.append(("add", residual))
    batch, _, height, width = input.shape
    size = output_size(height, width, weight.shape[2:], stride, padding, dilation)
    shape = (batch, weight.shape[0], *size)
    return _cudnn_graph.fused_graph(input, weight, found, shape, stride, padding, dilation, activation)


def _aligned(vector: Tensor) -> Tensor:
    """A vector as graphs are planned for: some channels of a longer one may begin anywhere."""
    return vector if vector.is_contiguous() and vector.data_ptr() % 16 == 0 else vector.clone()


CALLS: dict[str, Callable[..., Tensor]] = {RELU: conv2d_relu, GRAPH: conv2d_graph}


def _added(bias: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The part of scale * (conv + bias) + shift beside scale * conv, in fp32 where it is computed."""
    if bias is None:
        return shift
    if scale is not None:
        bias = bias * scale.float()
    return bias if shift is None else bias + shift.float()
