"""A plain network with every convolution, batch norm, residual and relu sequence as one call of cuDNN's.

What the best of cuDNN's own fusions make of a whole network in inference: the baseline beside eager and
torch.compile. Batch norms that no relu follows are folded into their convolution.
"""

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_aten = torch.ops.aten
_RELUS = (_aten.relu.default, _aten.relu_.default)
_ADDS = (_aten.add.Tensor, _aten.add_.Tensor)


def fused_with_cudnn(network: nn.Module, images: torch.Tensor) -> tuple[Callable[..., torch.Tensor], int]:
    """The network in eval mode, for images of this shape and dtype, and how many sequences are one call."""
    with torch.no_grad():
        module: fx.GraphModule = torch.export.export(network.eval(), (images,)).module()
    count = 0
    for node in list(module.graph.nodes):
        if node.target in _RELUS:
            count += _fuse(module, node)
    for node in list(module.graph.nodes):
        sequence = _sequence(node) if node.target is _aten.batch_norm.default else None
        if sequence is not None:
            with module.graph.inserting_before(node):
                operands = _operands(module, *sequence)
                node.replace_all_uses_with(module.graph.call_function(_aten.conv2d.default, operands))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, count


def _fuse(module: fx.GraphModule, relu: fx.Node) -> bool:
    """Put one call in the place of `relu` and what only it uses; whether that could be done."""
    source, residual = relu.args[0], None
    sequence = _sequence(source, relu)
    if sequence is None and source.target in _ADDS and _only_for(source, relu) and len(source.args) == 2:
        for mine, other in (source.args, source.args[::-1]):
            if sequence is None and isinstance(mine, fx.Node) and isinstance(other, fx.Node):
                sequence, residual = _sequence(mine, source), other
    # cuDNN's fused calls are for dense convolutions.
    if sequence is None or (len(sequence[0].args) > 6 and sequence[0].args[6] != 1):
        return False
    with module.graph.inserting_before(relu):
        x, weight, bias, *options = _operands(module, *sequence)
        if residual is None:
            function, args = torch.cudnn_convolution_relu, (x, weight, bias, *options)
        else:
            function, args = torch.cudnn_convolution_add_relu, (x, weight, residual, 1.0, bias, *options)
        relu.replace_all_uses_with(module.graph.call_function(function, args))
    # At once: what writes over its operand counts as used.
    for node in dict.fromkeys((relu, source, *reversed(sequence))):
        if node is not None and not node.users:
            module.graph.erase_node(node)
    return True


def _only_for(node: fx.Node, user: fx.Node | None) -> bool:
    return user is None or list(node.users) == [user]


def _sequence(node: fx.Node, user: fx.Node | None = None) -> tuple[fx.Node, fx.Node | None] | None:
    """The convolution behind `node`, and the batch norm after it, where nobody but `user` sees them."""
    norm = node if node.target is _aten.batch_norm.default else None
    convolution = node if norm is None else norm.args[0]
    if getattr(convolution, "target", None) is not _aten.conv2d.default:
        return None
    visible = _only_for(node, user) and (norm is None or _only_for(convolution, norm))
    return (convolution, norm) if visible else None


def _operands(module: fx.GraphModule, convolution: fx.Node, norm: fx.Node | None) -> tuple:
    """Arguments of the convolution with its norm folded into filter and bias: in fp32, rounded once."""
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    x, weight, bias, *options = (*convolution.args, *defaults[len(convolution.args) :])
    if norm is None:
        return x, weight, bias, *options

    def value(node: fx.Node | None) -> torch.Tensor | None:
        return None if node is None else attrgetter(node.target)(module).detach()

    wide = [None if t is None else t.float() for t in map(value, (weight, bias, *norm.args[1:5]))]
    filters, offset, gamma, beta, mean, variance = wide
    folded = fuse_conv_bn_weights(filters, offset, mean, variance, norm.args[7], gamma, beta)
    dtype = value(weight).dtype
    nodes = []
    for part, t in zip(("weight", "bias"), folded, strict=True):
        name = f"folded_{convolution.name}_{part}"
        t = t.detach().to(dtype)
        kept = t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        module.register_buffer(name, kept)
        nodes.append(module.graph.get_attr(name))
    return x, *nodes, *options
