"""The groups of layers in a graph that Dynamo captured, replaced by calls of what runs them faster.

A group is a convolution with what follows it, a depthwise pair, the branches of an ASPP, an up-convolution
with its concatenation, or the argmax of upsampled scores. On a GPU it becomes a call of `segfast.functional`
where that runs something else than ATen; on a CPU, where its parameters are constants, an operator that runs
what was chosen for it. All else stays as it was.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .. import functional as F
from ..nn._fused.folding import affine
from ..nn._fused.layers import Group, groups
from ..ops._backend import _INTERPRETING, noting
from .graph_parts import (
    CONVOLUTIONS,
    Node,
    are_constants,
    chain_of,
    geometry_of,
    part_of,
    put,
    put_constant,
    shape_of,
    value_of,
    weight_and_bias,
    writes_between,
)
from .rewrite_cpu import replaced_on_cpu

_CATS = (torch.cat, torch.concat)


def rewrite(module: fx.GraphModule) -> int:
    """Replace the groups of a graph for which something else than ATen is chosen; how many those were."""
    count = 0
    for replace in (_replace_branches, _replace_up_convolution, _replace_convolution, _replace_argmax):
        gone: set[fx.Node] = set()
        for node in list(module.graph.nodes):
            replaced = [] if node in gone or node.op == "placeholder" else replace(module, node)
            # One by one: torch takes a method that writes to its tensor for dead code.
            for old in reversed(replaced):
                module.graph.erase_node(old)
            gone.update(replaced)
            count += bool(replaced)
    module.recompile()
    return count


class _Computed(NamedTuple):
    """An argument that `function` computes, of nodes: once where these are constants, else at each call."""

    function: Callable[..., Tensor]
    args: Any


def _map(tree: Any, of_leaf: Callable[[Any], Any]) -> Any:
    """`tree` with each node and each `_Computed` in it replaced."""
    if isinstance(tree, (fx.Node, _Computed)):
        return of_leaf(tree)
    if isinstance(tree, dict):
        return {key: _map(value, of_leaf) for key, value in tree.items()}
    return type(tree)([_map(value, of_leaf) for value in tree]) if isinstance(tree, (list, tuple)) else tree


def _example(leaf: Any) -> Any:
    if isinstance(leaf, _Computed):
        return leaf.function(*_map(leaf.args, _example))
    return leaf.meta["example_value"]


def _replaced(
    module: fx.GraphModule, end: Node, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> bool:
    """Put a call of `function` in the place of `end` if something else than ATen is chosen for it."""
    # Dynamo's own mode: the current one is the backend's.
    with noting() as found, end.meta["example_value"].fake_mode:
        value = function(*_map(args, _example), **_map(kwargs, _example))
    if not found or all(note.backend == "aten" for note in found):
        return False

    def node_of(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return leaf
        if are_constants(_nodes_in(leaf.args)):
            constant = leaf.function(*_map(leaf.args, value_of))
            return put_constant(module, f"{end.name}_{leaf.function.__name__.strip('_')}", constant, end)
        with end.graph.inserting_before(end):
            return end.graph.call_function(leaf.function, leaf.args)

    put(end, function, _map(args, node_of), _map(kwargs, node_of), value)
    return True


def _nodes_in(tree: Any) -> list[Any]:
    found: list[Any] = []
    _map(tree, found.append)
    return found


def _scale(weight, bias, mean, var, eps) -> Any:
    return affine((weight, bias, mean, var, None), eps).scale


def _shift(weight, bias, mean, var, eps) -> Any:
    return affine((weight, bias, mean, var, None), eps).shift


def _epilogue(norm: Any) -> tuple[Any, Any]:
    """The scale and shift of a norm."""
    return (None, None) if norm is None else (_Computed(_scale, norm), _Computed(_shift, norm))


def _replace_convolution(module: fx.GraphModule, head: Node) -> list[Node]:
    """The nodes that one call does the work of by now; none where `head` begins no group."""
    if head.target not in CONVOLUTIONS:
        return []
    chain, parts = chain_of(head)
    if not parts[0].kind or not _is_of_one_dtype(head):
        return []
    on_cpu = head.meta["example_value"].is_cpu and not _INTERPRETING
    if on_cpu:
        # There each convolution is a call of its own.
        second = next((i for i, part in enumerate(parts[1:], 1) if part.kind == "dense"), len(parts))
        chain, parts = chain[:second], parts[:second]
    for length, group in (*groups(parts), (1, Group(head))):
        # The call stands where the group ends: there its residual is computed already.
        end = chain[length - 1]
        if writes_between(head, end, chain):
            continue
        if replaced_on_cpu(module, end, group) if on_cpu else _replaced_by_call(module, end, group):
            return chain[:length]
    return []


def _is_of_one_dtype(head: Node) -> bool:
    """True if neither autocast nor anything else casts what a convolution computes with."""
    return len({node.meta["example_value"].dtype for node in (head, *head.args[:2])}) == 1


def _replaced_by_call(module: fx.GraphModule, end: Node, group: Group) -> bool:
    input, weight, *geometry = group.head.args
    scale, shift = _epilogue(group.norm)
    ending = {"activation": group.activation, "negative_slope": group.negative_slope}
    if part_of(group.head, None).kind == "depthwise" and group.residual is None:
        if group.pointwise is None:
            geometry = geometry[:4]  # without the groups
            return _replaced(
                module, end, F.depthwise_conv2d, input, weight, *geometry, scale=scale, shift=shift, **ending
            )
        return _replaced(module, end, F.separable_conv2d, *_separable(group), **_separable_ending(group))
    function = F.conv_transpose2d if group.head.target is torch.conv_transpose2d else F.conv2d
    epilogue = {"scale": scale, "shift": shift, "residual": group.residual, **ending}
    return _replaced(module, end, function, input, weight, *geometry, **epilogue)


def _separable(group: Group) -> tuple[Any, ...]:
    """The positional arguments of a depthwise pair's call."""
    input, weight, *options = group.head.args
    pointwise, pointwise_bias = weight_and_bias(group.pointwise)
    bias, *geometry = options[:4] or [None]
    return input, weight, pointwise, bias, pointwise_bias, *geometry


def _separable_ending(group: Group) -> dict[str, Any]:
    first, second = _epilogue(group.norm), _epilogue(group.pointwise_norm)
    return {
        "depthwise_scale": first[0],
        "depthwise_shift": first[1],
        "depthwise_activation": group.activation,
        "scale": second[0],
        "shift": second[1],
        "residual": group.pointwise_residual,
        "activation": group.pointwise_activation,
        "negative_slope": group.negative_slope,
    }


def _cat_of(node: Node) -> list[Node]:
    """The tensors that `node` puts side by side along the channels, where kernels run; else none."""
    if node.target not in _CATS or len(node.args) + len(node.kwargs) != 2 or not node.args:
        return []
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    tensors = node.args[0]
    known = isinstance(tensors, (list, tuple)) and all([len(shape_of(t) or ()) == 4 for t in tensors])
    known = known and len(set(tensors)) == len(tensors)
    on_kernels = _INTERPRETING or not node.meta["example_value"].is_cpu
    return list(tensors) if dim in (1, -3) and known and on_kernels else []


def _group_before(end: Node) -> tuple[list[Node], Group] | None:
    """The nodes of a group that ends with `end`, which one node alone reads, and the group."""
    head = end
    while isinstance(head, fx.Node) and head.target not in CONVOLUTIONS:
        if head.op not in ("call_function", "call_method") or not head.args:
            return None
        head = head.args[0]
    if not isinstance(head, fx.Node) or len(end.users) != 1 or not _is_of_one_dtype(head):
        return None
    chain, parts = chain_of(head)
    if end not in chain or not parts[0].kind:
        return None
    length = chain.index(end) + 1
    found = groups(parts[:length]) if length > 1 else [(1, Group(head))]
    fits = found and found[0][0] == length and not writes_between(head, end, chain)
    return (chain[:length], found[0][1]) if fits else None


def _is_branch(group: Group) -> bool:
    """True of a convolution that could be an ASPP's: odd, of stride 1, of the image's size."""
    if group.head.target is not torch.conv2d or group.residual is not None or group.pointwise is not None:
        return False
    geometry, kernel = geometry_of(group.head), (shape_of(group.head.args[1]) or ())[2:]
    if geometry is None:
        return False
    stride, padding, _, dilation, count = geometry
    kept = tuple([d * (k // 2) for d, k in zip(dilation, kernel, strict=True)])
    return stride == (1, 1) and padding == kept and count == 1 and all([k % 2 for k in kernel])


def _replace_branches(module: fx.GraphModule, cat: Node) -> list[Node]:
    """The branches of an ASPP: convolutions of one input that `cat` puts side by side."""
    tensors, first, alike, nodes = _cat_of(cat), 0, list[Group](), list[Node]()
    for index, tensor in enumerate(tensors):
        chain, group = _group_before(tensor) or ([], None)
        if group is not None and _is_branch(group) and (not alike or _kind(group) == _kind(alike[0])):
            first = first if alike else index
            alike.append(group)
            nodes += chain
        elif alike:
            break
    if len(alike) < 2:
        return []
    end = tensors[first + len(alike) - 1]
    heads = [group.head for group in alike]
    if any([writes_between(head, end, nodes) for head in heads]):
        return []
    branches = [(*weight_and_bias(group.head), group.norm) for group in alike]
    plain = all([bias is None and norm is None for _, bias, norm in branches])
    if not _replaced(
        module,
        end,
        F.parallel_conv2d,
        heads[0].args[0],
        [weight for weight, *_ in branches],
        [geometry_of(head)[3] for head in heads],  # type: ignore[index]
        scale=None if plain else _Computed(_joined_scale, branches),
        shift=None if plain else _Computed(_joined_shift, branches),
        activation=alike[0].activation,
        negative_slope=alike[0].negative_slope,
    ):
        return []
    # In the place of the last branch by now; the others are in it.
    call = cat.args[0][first + len(alike) - 1]
    cat.args = ([*tensors[:first], call, *tensors[first + len(alike) :]], *cat.args[1:])
    return nodes


def _kind(group: Group) -> Any:
    """The input and the ending, in which the branches of an ASPP are alike."""
    return group.head.args[0], group.activation, group.negative_slope


def _joined_scale(*branches: Any) -> Tensor:
    return torch.cat([_affine_of(*branch)[0] for branch in branches])


def _joined_shift(*branches: Any) -> Tensor:
    return torch.cat([_affine_of(*branch)[1] for branch in branches])


def _affine_of(weight: Tensor, bias: Tensor | None, norm: Any) -> Any:
    """The scale of a branch, and its shift with the bias in it."""
    if norm is None:
        scale = torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
        shift = torch.zeros_like(scale)
    else:
        scale, shift = _scale(*norm), _shift(*norm)
    return scale, shift if bias is None else shift + scale * bias.to(scale.dtype)


def _replace_up_convolution(module: fx.GraphModule, cat: Node) -> list[Node]:
    """A U-Net decoder's step: the up-convolution that `cat` puts behind the skip connection."""
    tensors = _cat_of(cat)
    found = _group_before(tensors[1]) if len(tensors) == 2 else None
    if found is None:
        return []
    chain, group = found
    geometry = geometry_of(group.head)
    transposed = group.head.target is torch.conv_transpose2d and group.norm is None and group.residual is None
    if not transposed or geometry is None or geometry[3:] != ((1, 1), 1):
        return []
    if writes_between(group.head, cat, [*chain, cat]):
        return []
    x, weight, bias = group.head.args[0], *weight_and_bias(group.head)
    ending = {"activation": group.activation, "negative_slope": group.negative_slope}
    replaced = _replaced(module, cat, F.up_concat, x, tensors[0], weight, bias, *geometry[:2], **ending)
    return [*chain, cat] if replaced else []


def _replace_argmax(module: fx.GraphModule, node: Node) -> list[Node]:
    """The largest score of bilinearly upsampled ones, without those; as `_replace_convolution`."""
    if node.target not in ("argmax", torch.argmax):
        return []
    scores = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    enlarged = isinstance(scores, fx.Node) and scores.target is torch.nn.functional.interpolate
    if not enlarged or dim not in (1, -3) or len(node.args) > 2 or node.kwargs.keys() - {"dim"}:
        return []
    names = ("size", "scale_factor", "mode", "align_corners")
    options = {**dict(zip(names, scores.args[1:], strict=False)), **scores.kwargs}
    known = options.get("mode") == "bilinear" and not options.keys() - set(names) and len(scores.users) == 1
    if not known or len(shape_of(scores) or ()) != 4 or writes_between(scores, node, [scores, node]):
        return []
    given = (options.get("size"), options.get("scale_factor"), "bilinear", bool(options.get("align_corners")))
    return [scores, node] if _replaced(module, node, F.upsample_argmax, scores.args[0], *given) else []
