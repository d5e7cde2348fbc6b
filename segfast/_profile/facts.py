"""The kind of a layer or function call, and what is told of its tensors: bytes, shape, dtype, layout."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..nn._activation import activation_name
from ..nn._fused.conv import FusedConv
from ..nn._fused.folding import is_batch_norm
from ..nn._fused.layers import FusedLayer
from ..nn._rules import own_class

LAYOUT_COPY, CAST, BETWEEN = "layout copy", "cast", "between layers"
# Tensor methods that return the tensor itself where there is nothing to do.
_COPIES = ("contiguous", "clone", "reshape", "flatten", "to", "float", "half", "bfloat16", "double", "type")
_FUNCTIONS = {
    "activation": ("relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "sigmoid", "hardtanh", "softmax"),
    "add": ("add", "add_", "__add__", "__radd__", "__iadd__"),
    "batch_norm": ("batch_norm",),
    "cat": ("cat", "concat", "concatenate", "stack"),
    "conv2d": ("conv2d",),
    "conv_transpose2d": ("conv_transpose2d",),
    "pool": (
        *("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d"),
        *("adaptive_max_pool2d", "max_unpool2d"),
    ),
    "resize": ("interpolate", "upsample", "upsample_bilinear", "upsample_nearest", "grid_sample"),
    LAYOUT_COPY: _COPIES,
}
_OF_FUNCTION = {name: kind for kind, names in _FUNCTIONS.items() for name in names}
_CLASSES = {nn.Conv2d: "conv2d", nn.ConvTranspose2d: "conv_transpose2d", nn.Upsample: "resize"}
_MODULES = {"torch.nn.modules.activation": "activation", "torch.nn.modules.pooling": "pool"}


def kind_of_module(module: nn.Module) -> str:
    """The kind of a layer; of one of ours with layers in it, its family's name."""
    for kind, name in _CLASSES.items():
        if isinstance(module, kind):
            return name
    if is_batch_norm(module) or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch_norm"
    where = own_class(module).__module__
    if where.startswith("segfast.nn.") and activation_name(module) is None:
        return where.rpartition(".")[2]
    return _MODULES.get(where, "other")


def kind_of_function(function: Any) -> str:
    """The kind of a torch function or operator."""
    return _OF_FUNCTION.get(name_of_function(function), "other")


def kind_of_name(name: str) -> str:
    """The kind of an operator, or of a kernel that is named after one, such as "aten::convolution"."""
    if "convolution" in name and "fused" not in name:
        return "conv2d"
    return _OF_FUNCTION.get(name.rpartition("::")[2], "other")


def name_of_function(function: Any) -> str:
    """The name of a torch function, method or operator."""
    return getattr(function, "__name__", type(function).__name__).partition(".")[0]


def is_copying(function: Any) -> bool:
    """True of what copies a tensor only if its layout or dtype is to be another one."""
    return name_of_function(function) in _COPIES


def kind_of_fused(fused: FusedLayer) -> str:
    """The layers that are computed as one, in order."""
    if isinstance(fused, FusedConv):
        first = "conv_transpose2d" if fused.conv.transposed else "conv2d"
        parts = [first, fused.norm and "batch_norm", fused.activation and "activation"]
    else:
        parts = ["conv2d", fused.norm and "batch_norm", fused.activation and "activation"]
        if fused.pointwise is not None:
            parts += ["conv2d", fused.pointwise_norm and "batch_norm"]
            parts += [fused.pointwise_activation and "activation"]
    return " + ".join([part for part in parts if part])


def parts_of_fused(fused: FusedLayer) -> list[nn.Module]:
    """The modules whose parameters a fused layer reads; its first is the one that names it."""
    return [part for part in fused if isinstance(part, nn.Module)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in arguments or outputs of any structure."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors, each counted once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def memory_format_of(tensor: Tensor) -> str:
    """The layout of images; "" of a tensor that has none."""
    if tensor.layout != torch.strided or tensor.dim() != 4:
        return ""
    if tensor.is_contiguous():
        return "contiguous"
    return "channels_last" if tensor.is_contiguous(memory_format=torch.channels_last) else ""


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32's is "float32"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Facts:
    """The tensors of a leaf: bytes to move at least, the output, and of a convolution its call.

    `convolution` is (input shape, weight shape, stride, padding, dilation, groups, transposed).
    """

    bytes: int = 0
    backward_bytes: int = 0
    output: tuple[int, ...] = ()
    dtype: str = ""
    given_dtype: str = ""
    memory_format: str = ""
    parameters: int = 0
    convolution: tuple[Any, ...] | None = None


def facts_of(inputs: Any, output: Any, modules: list[nn.Module]) -> Facts:
    """The facts of a call in which `modules` are computed."""
    given, made = tensors_in(inputs), tensors_in(output)
    parameters, buffers = (
        [t for module in modules for t in getattr(module, of).values() if t is not None]
        for of in ("_parameters", "_buffers")
    )
    moved = [bytes_of(each) for each in (given, [*parameters, *buffers], made)]
    trained = bytes_of(p for p in parameters if p.requires_grad)
    differentiated = bytes_of(t for t in given if t.requires_grad)
    first = made[0] if made else None
    conv: Any = modules[0] if modules and isinstance(modules[0], nn.Conv2d | nn.ConvTranspose2d) else None
    call = None
    if conv is not None and given:
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.transposed)
        call = (tuple(given[0].shape), tuple(conv.weight.shape), *geometry)
    floating = next((t for t in given if t.is_floating_point()), None)
    return Facts(
        bytes=sum(moved),
        # The gradient of the output is read, inputs and parameters too, and their gradients are written.
        backward_bytes=sum(moved) + differentiated + trained,
        output=tuple(first.shape) if first is not None else (),
        dtype=dtype_name(first.dtype) if first is not None else "",
        given_dtype=dtype_name(floating.dtype) if floating is not None else "",
        memory_format=memory_format_of(first) if first is not None else "",
        parameters=sum(p.numel() for p in parameters),
        convolution=call,
    )
