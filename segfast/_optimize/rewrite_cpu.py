"""Convolutions of a captured graph on a CPU, replaced by an operator that runs what is chosen for them."""

from typing import Any

import torch
from torch import Tensor, fx

from ..nn._fused.folding import affine, scaled
from ..nn._fused.layers import Group
from ..ops._backend import get_backend
from ..ops._call import Call
from ..ops._choice import ATEN, choices, measures_unseen
from ..ops._cpu_operator import cpu_convolution
from .graph_parts import (
    Node,
    are_constants,
    geometry_of,
    hints_of,
    put,
    put_constant,
    shape_of,
    value_of,
    weight_and_bias,
)

# Inductor runs them too, in a program where a call costs nothing; what is to run instead saves a tenth.
_INDUCTORS = (ATEN, "onednn")
_LEAST_GAIN = 1.1


def replaced_on_cpu(module: fx.GraphModule, end: Node, group: Group) -> bool:
    """Put the operator in the place of `end`, with which `group` ends, if that pays.

    It does where something faster than inductor's own call is chosen. The parameters must be constants.
    """
    geometry = geometry_of(group.head)
    sizes = hints_of(shape_of(group.head.args[0]) or ())
    if geometry is None or sizes is None:
        return False
    *pairs, count = geometry
    folded = _folded(group, count)
    if folded is None:
        return False
    weight, bias = folded
    transposed = group.head.target is torch.conv_transpose2d
    stride, padding, output_padding, dilation = pairs
    call = Call(
        "conv_transpose2d" if transposed else "conv2d",
        weight.dtype,
        True,
        sizes,
        tuple(weight.shape),
        stride,
        padding,
        output_padding,
        dilation,
        count,
        bias is not None,
        group.residual is not None,
        group.activation,
        torch.get_num_threads(),
    )
    # Inductor folds what a transposed convolution is multiplied with into its filters as if they were not
    # transposed: with as many channels before as after it, that goes unnoticed and is wrong.
    folds_wrongly = transposed and weight.shape[0] == weight.shape[1] * count
    if not folds_wrongly and not _is_faster(call):
        return False
    tensors = [
        None if tensor is None else put_constant(module, f"{group.head.name}_{kind}", tensor, end)
        for kind, tensor in (("weight", weight), ("bias", bias))
    ]
    args = (group.head.args[0], *tensors, group.residual, transposed, *geometry, group.activation)
    put(end, cpu_convolution, (*args, group.negative_slope), {}, end.meta["example_value"])
    return True


def _is_faster(call: Call) -> bool:
    """True if what is chosen for `call`, measured now under `segfast.autotune`, is worth it."""
    if get_backend() != "auto":
        return False
    choice = choices().find(call)
    if choice is None and measures_unseen():
        from ..ops._measure import measure_and_keep  # heavy, and seldom wanted

        choice = measure_and_keep([call])[call]
    if choice is None or choice.name in _INDUCTORS:
        return False
    others = [us for name, us in choice.us.items() if name in _INDUCTORS]
    return not others or min(others) >= _LEAST_GAIN * choice.us[choice.name]


def _folded(group: Group, count: int) -> tuple[Tensor, Tensor | None] | None:
    """The filter and bias of a group with its norm in them; None where they are no constants."""
    nodes = weight_and_bias(group.head)
    norm, eps = ((), 0.0) if group.norm is None else (group.norm[:4], group.norm[4])
    if not isinstance(eps, float) or not are_constants((*nodes, *norm)):
        return None
    weight, bias, *tensors = [None if node is None else value_of(node) for node in (*nodes, *norm)]
    assert weight is not None
    if not norm:
        return weight, bias
    both: Any = affine((*tensors, None), eps)
    scale, shift = [tensor.to(weight.dtype) for tensor in both]
    shift = shift if bias is None else shift + bias * scale
    return scaled(weight, scale, group.head.target is torch.conv_transpose2d, count), shift
