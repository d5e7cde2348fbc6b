"""The nodes of a graph that Dynamo captured, read as parts of groups: convolution, norm, activation."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..nn._fused.layers import Part
from ..ops._geometry import resolve_padding
from ..ops._operands import Pair, pair

# An fx.Node, whose arguments may be anything.
Node = Any
# In the meta of a node that is a parameter's value.
FROZEN = "segfast_frozen"
CONVOLUTIONS = (torch.conv2d, torch.conv_transpose2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")
_FUNCTIONS: dict[Any, str] = {
    torch.nn.functional.relu: "relu",
    torch.relu: "relu",
    torch.nn.functional.relu6: "relu6",
    torch.nn.functional.silu: "silu",
    torch.nn.functional.hardswish: "hardswish",
    torch.nn.functional.hardsigmoid: "hardsigmoid",
    torch.sigmoid: "sigmoid",
    torch.nn.functional.sigmoid: "sigmoid",
}


def writes_between(head: Node, end: Node, chain: Sequence[Node]) -> bool:
    """True if a node of another group may write to what the convolution reads, before the group's end."""
    node = head.next
    while node is not end and head is not end:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        written = name.endswith("_") or name in _IN_PLACE or node.kwargs.get("inplace") or True in node.args
        if node not in chain and (written or "out" in node.kwargs):
            return True
        node = node.next
    return False


def chain_of(head: Node) -> tuple[list[Node], list[Part]]:
    """The nodes from a convolution on, each of which alone reads the one before, and their parts."""
    chain, parts = [head], [part_of(head, None)]
    while len(chain[-1].users) == 1:
        [user] = chain[-1].users
        part = part_of(user, chain[-1])
        if not part.kind:
            break
        chain.append(user)
        parts.append(part)
    return chain, parts


def part_of(node: Node, before: Node | None) -> Part:
    """The part that `node`, which reads `before`, is of a group."""
    target, args = node.target, node.args
    if target in CONVOLUTIONS and (before is None or args[:1] == (before,)):
        return _convolution_part(node)
    if before is None or node.op not in ("call_function", "call_method"):
        return Part("", node)
    if target in _ADDITIONS and len(args) == 2 and not node.kwargs:
        first, second = args
        other = second if first is before else first
        if target is operator.iadd and first is not before:
            return Part("", node)  # the other is written over
        alike = isinstance(other, fx.Node) and other is not before and shape_of(other) == shape_of(node)
        return Part("addition", other) if alike else Part("", node)
    if not args or args[0] is not before:
        return Part("", node)
    if target is torch.nn.functional.batch_norm:
        mean, var, weight, bias, training = (*args[1:], *[None] * 5)[:5]
        fixed = not (training or node.kwargs) and mean is not None and var is not None and len(args) == 8
        return Part("norm", (weight, bias, mean, var, args[7])) if fixed else Part("", node)
    name, slope = _activation(node)
    return Part("activation" if name else "", node, activation=name, negative_slope=slope)


def _convolution_part(node: Node) -> Part:
    if node.kwargs or len(node.args) < 2:
        return Part("", node)
    weight, result = [shape_of(each) or () for each in (node.args[1], node)]
    if len(weight) != 4 or len(result) != 4:
        return Part("", node)
    if node.target is torch.conv_transpose2d:
        return Part("dense", node)
    stride, padding, _, count = _options(node, (1, 0, 1, 1))
    if count > 1 and weight[1] == 1:
        return Part("depthwise", node)
    once = stride in (1, (1, 1)) and padding in (0, (0, 0), "valid", "same")
    return Part("dense", node, pointwise=weight[2:] == (1, 1) and count == 1 and once)


def _activation(node: Node) -> tuple[str | None, float]:
    args, kwargs = node.args[1:], node.kwargs
    if node.target is torch.nn.functional.leaky_relu:
        slope = args[0] if args else kwargs.get("negative_slope", 0.01)
        return ("leaky_relu", slope) if isinstance(slope, float) else (None, 0.01)
    if node.target is torch.nn.functional.hardtanh:
        return "relu6" if tuple(args[:2]) == (0.0, 6.0) else None, 0.01
    if node.target is torch.nn.functional.gelu:
        approximate = args[0] if args else kwargs.get("approximate", "none")
        return "gelu_tanh" if approximate == "tanh" else "gelu", 0.01
    if node.op == "call_method":
        known = node.target if node.target in ("relu", "relu_", "sigmoid", "sigmoid_") else None
        return None if known is None else known.rstrip("_"), 0.01
    return _FUNCTIONS.get(node.target), 0.01


def shape_of(value: Any) -> tuple[Any, ...] | None:
    example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return tuple(example.shape) if isinstance(example, Tensor) else None


def geometry_of(head: Node) -> tuple[Pair, Pair, Pair, Pair, int] | None:
    """Stride, padding, output padding, dilation and groups; None for a "same" padding that is uneven."""
    if head.target is torch.conv_transpose2d:
        stride, padding, output_padding, groups, dilation = _options(head, (1, 0, 0, 1, 1))
    else:
        stride, padding, dilation, groups = _options(head, (1, 0, 1, 1))
        output_padding = 0
    image, weight = [head.args[i].meta["example_value"] for i in (0, 1)]  # type: ignore[union-attr]
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    padded, padding = resolve_padding("conv2d", image, weight, stride, padding, dilation)
    if padded is not image:
        return None
    return stride, padding, pair(output_padding, "output_padding"), dilation, groups


def _options(head: Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """The options of a convolution, which follow input, weight and bias."""
    given = head.args[3:]
    return (*given, *defaults[len(given) :])


def hints_of(shape: Sequence[Any]) -> tuple[int, ...] | None:
    """A shape in numbers, those of the example where sizes are dynamic; None where there is no example."""
    sizes = [size if isinstance(size, int) else size.node.hint for size in shape]
    return None if None in sizes else tuple(sizes)


def weight_and_bias(head: Node) -> tuple[Node, Node | None]:
    """Those of a convolution."""
    return head.args[1], head.args[2] if len(head.args) > 2 else None


def are_constants(nodes: Iterable[Node | None]) -> bool:
    """True if all are parameters that were frozen: other tensors of the module may change unnoticed."""
    return all([node is None or node.meta.get(FROZEN, False) for node in nodes])


def value_of(node: Node) -> Tensor:
    """The value of a constant."""
    return getattr(node.graph.owning_module, node.target)


def put_constant(module: fx.GraphModule, name: str, value: Tensor, before: Node) -> Node:
    """The node of a new tensor of `module`, whose name begins with `name`."""
    while hasattr(module, name):
        name += "_"
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def put(end: Node, function: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> None:
    """Put a call in the place of `end`, whose value is like `value`."""
    with end.graph.inserting_before(end):
        call = end.graph.call_function(function, args, kwargs)
    call.meta = {**end.meta, "example_value": value}
    end.replace_all_uses_with(call)
