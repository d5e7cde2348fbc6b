"""Classes made at run time for modules that are fused: the module's own class with something before it."""

import functools
from typing import Any

import torch
from torch import nn

from .folding import forget, runs_eagerly


class FusedModule:
    """Mixed into the class of a fused module; `unfused_class` is what it was made from."""

    unfused_class: type[nn.Module]

    def train(self, mode: bool = True):
        forget(*self.modules())  # type: ignore[attr-defined]
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, fn, recurse=True):
        forget(*self.modules())  # type: ignore[attr-defined]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __prepare_scriptable__(self):
        """As `Unscriptable`'s, of any class."""
        # What a layer within says holds once this is undone.
        for part in (super(), *self.children()):  # type: ignore[attr-defined]
            prepare = getattr(part, "__prepare_scriptable__", None)
            if prepare is not None:
                prepare()
        raise RuntimeError("a fused module cannot be scripted; call segfast.restore(model) first")

    def __reduce_ex__(self, protocol):
        # The class is made at run time: copies and pickles name those it was made from.
        return _remake, _mixins(type(self)), super().__reduce_ex__(protocol)[2]


@functools.cache
def fused_class(mixin: Any, kind: Any) -> Any:
    """`kind` with the methods of `mixin`, a `FusedModule`, before its own."""
    # Of the same Python module, by which torch.fx tells what is torch's own.
    body = {"unfused_class": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(f"Fused{kind.__name__}", (mixin, kind), body)


def unmix(module: nn.Module, mixin: Any) -> None:
    """Take `mixin` out of the class of a fused module, whichever others are mixed in too."""
    mixins, kind = _mixins(type(module))
    for each in reversed(mixins):
        kind = kind if each is mixin else fused_class(each, kind)
    module.__class__ = kind


def _mixins(kind: Any) -> tuple[tuple[Any, ...], Any]:
    """The parts a class was made of: the mixins, the last one first, and the class of the module itself."""
    mixins = []
    while issubclass(kind, FusedModule):
        mixins.append(kind.__bases__[0])
        kind = kind.unfused_class
    return tuple(mixins), kind


def runs_in_eval(module: Any) -> bool:
    """True if `module` is in eval, no DataParallel replica, and only eager code runs."""
    if torch.compiler.is_compiling() or module.training or getattr(module, "_is_replica", False):
        return False
    return runs_eagerly()


def _remake(mixins: tuple[Any, ...], kind: Any) -> nn.Module:
    for mixin in reversed(mixins):
        kind = fused_class(mixin, kind)
    return kind.__new__(kind)
