"""A convolution with its epilogue in one call of cuDNN's graphs (PyPI's `nvidia-cudnn-frontend`, optional).

The package uses the cuDNN that torch has loaded. Forward only.
"""

import functools
import importlib.util
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._operands import Pair, empty

# An epilogue's activation, as the graph's node and its arguments. cuDNN's gelu is the one with erf.
CUDNN_ACTIVATIONS: dict[str | None, tuple[str, dict[str, float]]] = {
    None: ("", {}),
    "relu": ("relu", {}),
    "relu6": ("relu", {"upper_clip": 6.0}),
    "silu": ("swish", {"swish_beta": 1.0}),
    "gelu": ("gelu", {}),
    "sigmoid": ("sigmoid", {}),
}
_MOST_PLANS = 512


class GraphRefused(RuntimeError):
    """No engine of this cuDNN takes the graph; the message is cuDNN's."""


class _Plan(NamedTuple):
    """A built graph, its tensors in the order image, filter, terms, result, and the workspace it asks for."""

    graph: Any
    tensors: tuple
    workspace_bytes: int


# A handle is one stream's at a time, so calls take turns at setting it and enqueueing their kernels.
_LOCK = threading.Lock()
_HANDLES: dict[torch.device, Any] = {}
_PLANS: dict[tuple, _Plan | GraphRefused] = {}


@functools.cache
def installed() -> bool:
    """True if the package is there."""
    return importlib.util.find_spec("cudnn") is not None


def fused_graph(
    x: Tensor,
    weight: Tensor,
    terms: Sequence[tuple[str, Tensor]],
    shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str | None,
    *,
    transposed: bool = False,
) -> Tensor:
    """act(... conv(x, weight) ...): channels_last of this shape, in x's dtype, on the current stream.

    Args:
        x, weight: as the convolution takes them; groups follow from the weight's channels.
        terms: ("mul" or "add", a tensor that broadcasts to the result), applied in order in fp32.
        shape: the result's.
        activation: one of CUDNN_ACTIVATIONS.
        transposed: a transposed convolution, the gradient of a convolution with respect to its image.

    Raises:
        ImportError: the package is not installed.
        GraphRefused: no engine takes the graph.
    """
    import cudnn

    # cuDNN reads tensors by DLPack, which has none that require a gradient.
    operands = [_channels_last(t.detach()) for t in (x, weight, *[t for _, t in terms])]
    kinds = tuple([kind for kind, _ in terms])
    options = (tuple(shape), stride, padding, dilation, activation, transposed)
    key = (x.device, kinds, options, *[(t.dtype, t.shape, t.stride()) for t in operands])
    with _LOCK, torch.cuda.device_of(x):
        handle = _HANDLES.get(x.device)
        if handle is None:
            handle = _HANDLES[x.device] = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(x.device).cuda_stream)
        plan = _PLANS.get(key)
        if plan is None:
            if len(_PLANS) >= _MOST_PLANS:
                _PLANS.clear()
            plan = _PLANS[key] = _build(cudnn, handle, operands, kinds, options)
        if isinstance(plan, GraphRefused):
            raise GraphRefused(*plan.args)
        output = empty(shape, x)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=x.device)
        pointers = dict(zip(plan.tensors, [*operands, output], strict=True))
        plan.graph.execute(pointers, workspace, handle=handle)
    return output


def _channels_last(t: Tensor) -> Tensor:
    """`t` with the strides cuDNN reads as channels_last, which torch leaves open where a side is 1."""
    t = t.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = t.shape
    strides = (height * width * channels, 1, width * channels, channels)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def _build(cudnn: Any, handle: Any, operands: list[Tensor], kinds: tuple, options: tuple):
    """The plan of these operands; or, once and for all, why there is none."""
    shape, stride, padding, dilation, activation, transposed = options
    types = {
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float16: cudnn.data_type.HALF,
        torch.float32: cudnn.data_type.FLOAT,
    }
    try:
        graph = cudnn.pygraph(
            io_data_type=types[operands[0].dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        image, filters, *terms = [graph.tensor_like(t) for t in operands]
        geometry = {"padding": list(padding), "stride": list(stride), "dilation": list(dilation)}
        if transposed:
            y = graph.conv_dgrad(loss=image, filter=filters, **geometry)
            _, channels, height, width = shape
            strides = [height * width * channels, 1, width * channels, channels]
            y.set_dim(list(shape)).set_stride(strides)
        else:
            y = graph.conv_fprop(image=image, weight=filters, **geometry)
        for kind, term in zip(kinds, terms, strict=True):
            y = graph.mul(a=y, b=term) if kind == "mul" else graph.add(a=y, b=term)
        node, arguments = CUDNN_ACTIVATIONS[activation]
        if node:
            y = getattr(graph, node)(input=y, **arguments)
        y.set_output(True)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        return _Plan(graph, (image, filters, *terms, y), max(1, graph.get_workspace_size()))
    except Exception as error:  # cuDNN's own types, which differ from version to version
        return GraphRefused(f"{type(error).__name__}: {error}".splitlines()[0])
