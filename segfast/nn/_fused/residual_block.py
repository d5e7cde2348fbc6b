"""torchvision's residual blocks, in eval computed as one operator per convolution.

Each convolution's operator has the batch norm and the ReLU after it, the last one the addition of the
shortcut as well. The block's class changes; its parameters and children stay as they are. In training, where
asked for, each norm is one function with what follows it, which keeps less for the backward pass. With hooks
on a child, a compiler or tracer looking, or a child replaced by something unknown, it computes what it always
did.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from .._activation import activation_name
from .._rules import own_class
from .conv import FusedConv
from .eager import only_forward
from .folding import activation_of_norm, is_batch_norm
from .layers import is_convolution
from .sequence import runs_fused
from .swap import FusedModule, fused_class, runs_in_eval
from .training import may_train

# In the __dict__ of a fused block.
_KEEPS_LESS = "_segfast_keeps_less"
# Convolutions, and what they write compared to the block's input, on average: see `worth_fusing`. A quarter
# of that counts, as in `FusedConv.growth`.
_KINDS = {
    "torchvision.models.resnet.BasicBlock": (2, 1),
    "torchvision.models.resnet.Bottleneck": (3, 1 / 2),
}


class Block(NamedTuple):
    """The layers of a residual block: convolutions with what follows each, and the shortcut's if it has any.

    The shortcut is added before the last one's activation.
    """

    convs: tuple[FusedConv, ...]
    shortcut: FusedConv | None

    def is_eligible(self) -> bool:
        """True if the layers, as they stand now, compute what `run` does."""
        return all([fused.is_eligible() for fused in self.convs]) and (
            self.shortcut is None or self.shortcut.is_eligible()
        )

    def is_trained(self) -> bool:
        """True if `train` computes what the layers do in training, where `may_train`."""
        return all([fused.is_trained() for fused in self.convs]) and (
            self.shortcut is None or self.shortcut.is_trained()
        )

    def train(self, input: Tensor) -> Tensor:
        """The block of `input` in training."""
        *first, last = self.convs
        x = input
        for fused in first:
            x = fused.train(x)
        return last.train(x, input if self.shortcut is None else self.shortcut.train(input))

    def run(self, input: Tensor) -> Tensor:
        """The block of `input`."""
        *first, last = self.convs
        x = input
        for fused in first:
            x = fused.run(x)
        # Just before it is added, as the layers do.
        return last.run(x, input if self.shortcut is None else self.shortcut.run(input))


def is_block(module: nn.Module) -> bool:
    """True if the module is a residual block of a class whose forward is known."""
    return _name(module) in _KINDS


def can_fuse(module: nn.Module) -> bool:
    """True if the block's layers are of known kinds, and nobody looks at what happens between them."""
    unseen = "forward" not in vars(module) and all(
        [only_forward(m) for m in module.modules() if m is not module]
    )
    return unseen and _block_in(module) is not None


def fuse_block(module: nn.Module, keeps_less: bool = False) -> None:
    """Let `module`, of which `can_fuse` is true, compute its `Block`; with `keeps_less` in training too."""
    vars(module)[_KEEPS_LESS] = keeps_less
    if not is_fused_block(module):
        kind: Any = type(module)
        module.__class__ = fused_class(_Block, kind)


def is_fused_block(module: nn.Module) -> bool:
    """True if `fuse_block` has been here."""
    return isinstance(module, _Block)


def unfuse_blocks(model: nn.Module) -> None:
    """Undo `fuse_block` for every block in `model`."""
    for module in model.modules():
        if isinstance(module, _Block):
            fused: Any = module
            vars(fused).pop(_KEEPS_LESS, None)
            fused.__class__ = fused.unfused_class


def contents(module: nn.Module) -> str:
    """The layers that each of a block's operators computes, by the names of its children."""
    count = _KINDS[_name(module)][0]
    groups = [f"conv{i} + bn{i} + relu" for i in range(1, count)]
    if module._modules.get("downsample") is not None:
        groups.append("downsample")
    return ", ".join([*groups, f"conv{count} + bn{count} + addition + relu"])


class _Block(FusedModule):
    """Mixed into the class of a residual block."""

    def forward(self, x: Any) -> Any:
        if runs_in_eval(self):
            growth = _KINDS[_name(self)][1] / 4  # type: ignore[arg-type]
            if runs_fused(x, growth) and x.dim() == 4:
                block = _block_in(self)
                if block is not None and block.is_eligible():
                    return block.run(x)
        elif vars(self).get(_KEEPS_LESS) and may_train() and not getattr(self, "_is_replica", False):
            block = _block_in(self)
            if block is not None and block.is_trained():
                return block.train(x)
        return super().forward(x)  # type: ignore[misc]


def _block_in(module: Any) -> Block | None:
    """The block's layers as they are now, or None where one is of another kind; it may not fit."""
    children, count = module._modules, _KINDS[_name(module)][0]
    relu, downsample = children.get("relu"), children.get("downsample")
    activation = activation_name(relu) if isinstance(relu, nn.Module) and only_forward(relu) else None
    if activation is None:
        return None
    convs = []
    for i in range(1, count + 1):
        fused = _fused_layer(children.get(f"conv{i}"), children.get(f"bn{i}"), *activation)
        if fused is None:
            return None
        convs.append(fused)
    added, shortcut = convs[0].conv.in_channels, None
    if downsample is not None:
        if type(downsample) is not nn.Sequential or len(downsample) != 2 or not only_forward(downsample):
            return None
        shortcut = _fused_layer(*downsample)
        if shortcut is None:
            return None
        added = shortcut.conv.out_channels
    # Of other channels, the shortcut would be broadcast.
    return Block(tuple(convs), shortcut) if added == convs[-1].conv.out_channels else None


def _fused_layer(conv: Any, norm: Any, *activation: Any) -> FusedConv | None:
    known = (
        isinstance(conv, nn.Module)
        and isinstance(norm, nn.Module)
        and is_convolution(conv)
        and is_batch_norm(norm)
        and activation_of_norm(norm) is None
    )
    return FusedConv(conv, norm, *activation) if known else None


def _name(module: nn.Module) -> str:
    return f"{own_class(module).__module__}.{own_class(module).__qualname__}"
