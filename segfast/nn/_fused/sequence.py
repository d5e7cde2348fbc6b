"""A sequence of layers that its first layer computes at once, in a forward that calls them one by one.

The layers keep their places, parameters and names; their classes change. While the forward of the module that
calls them runs, the first returns the result of the whole sequence, and each of the others hands on
exactly that tensor. Called by themselves, compiled, exported or traced, under hooks or on a DataParallel
replica, they compute what they always did. A sequence that was begun and not ended is an error.
"""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...ops._kept import hooks_of_others
from .._rules import own_class
from .eager import only_forward, worth_fusing
from .folding import runs_eagerly
from .layers import FusedLayer
from .swap import FusedModule, fused_class, unmix
from .training import train_layers

# In the __dict__ of a sequence's layers, and of an `nn.Sequential` that calls sequences itself: by position.
_PLACE = "_segfast_sequence"
_SEQUENCES = "_segfast_sequences"
# In that of a module whose forward calls them one by one.
_CALLER = "_segfast_caller"


_NOT_BEGUN = (-1, -1, None)


class _Caller:
    """Stands for the module whose forward calls the layers, wherever both are copied to."""


class _Run:
    """One forward of a caller: the sequences begun in it, each with its next layer, end and tensor."""

    __slots__ = ("begun",)

    def __init__(self) -> None:
        self.begun: dict[FusedSequence, tuple[int, int, Tensor]] = {}


class _Threads(threading.local):
    def __init__(self) -> None:
        self.runs: dict[_Caller, _Run] = {}
        self.forced: bool | None = None


_threads = _Threads()


class FusedSequence:
    """Layers that follow one another in a caller's forward.

    Args:
        layers: the convolution and what comes after it.
        names: theirs, for messages.
        options: what the first so many of them compute, the longest first.
        wrappers: modules whose call begins or ends within the sequence.
        in_train: whether they follow one another in train mode too.
        keeps_less: whether they do with the norms, which then keep less for the backward pass.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        names: Sequence[str],
        options: Sequence[tuple[int, FusedLayer]],
        wrappers: Sequence[nn.Module] = (),
        in_train: bool = True,
        keeps_less: bool = False,
    ):
        self.layers, self.names = list(layers), list(names)
        self.options, self.in_train, self.keeps_less = list(options), in_train, keeps_less
        self.growth = self.options[0][1].growth()
        asked = {id(part) for part in self.options[0][1] if isinstance(part, nn.Module)}
        # Whose hooks must see what they would see unfused, beside those that the fused layer itself asks for.
        self.others = [m for m in (*layers, *wrappers) if id(m) not in asked]
        self.caller: _Caller | None = None

    def step(self, position: int, layer: nn.Module, input: Any) -> Tensor | None:
        """The result of the layer at `position`, or None if it shall compute it itself."""
        run = None if self.caller is None else _threads.runs.get(self.caller)
        if run is None or layer is not self.layers[position]:
            return None
        if position == 0:
            return self._begin(run, input)
        following, length, output = run.begun.get(self, _NOT_BEGUN)
        if position != following or input is not output:
            return None
        if position + 1 == length:
            del run.begun[self]
        else:
            run.begun[self] = (position + 1, length, output)
        return output

    def begins(self, layers: Sequence[nn.Module | None]) -> bool:
        """True if its layers are the first of `layers`."""
        some = layers[: len(self.layers)]
        return len(some) == len(self.layers) and all([a is b for a, b in zip(some, self.layers, strict=True)])

    def compute(self, input: Any) -> tuple[Tensor, int] | None:
        """The result of its first layers and of how many, or None if they shall compute it themselves."""
        if _threads.forced is False or not self._is_unwatched():
            return None
        length, first = self.options[0]
        if self.keeps_less:
            trained = train_layers(self.layers[:length], input)
            if trained is not None:
                return trained, length
        if not self.in_train and any([m.training for m in self.layers]):
            return None
        known = first.ready(input)
        if known is not None:
            return known.run(input, None), length
        # Costs as much as a small layer, and is asked last.
        if not runs_fused(input, self.growth) or not runs_eagerly() or _is_checkpointed():
            return None
        for length, fused in self.options:
            if fused.is_eligible():
                return fused.run(input, ask=fused is not first), length
        return None

    def _begin(self, run: _Run, input: Any) -> Tensor | None:
        if self in run.begun:
            raise self.broken(run)
        found = self.compute(input)
        if found is None:
            return None
        output, length = found
        run.begun[self] = (1, length, output)
        return output

    def _is_unwatched(self) -> bool:
        return all([only_forward(m) for m in self.others])

    def broken(self, run: _Run) -> RuntimeError:
        """The error of a sequence that was begun and not ended."""
        following, length, _ = run.begun[self]
        return RuntimeError(
            f"the fused layers {', '.join(self.names[:length])} were not called one after the other: "
            f"{self.names[following]} did not follow {self.names[following - 1]}. Was a layer replaced after "
            "segfast.optimize, or does the forward take another path than on the example inputs? "
            "segfast.restore undoes the fusion"
        )


class _Layer(FusedModule):
    """Mixed into the class of a sequence's layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            sequence, position = vars(self)[_PLACE]
            output = sequence.step(position, self, args[0])
            if output is not None:
                return output
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Sequential(FusedModule):
    """Mixed into the class of an `nn.Sequential` that calls the layers of sequences itself."""

    def forward(self, input: Any) -> Any:
        sequences = vars(self).get(_SEQUENCES)  # none in a slice
        if sequences is None or not runs_eagerly() or getattr(self, "_is_replica", False):
            return super().forward(input)  # type: ignore[misc]
        layers: list[nn.Module] = list(self._modules.values())  # type: ignore[attr-defined]
        position = 0
        while position < len(layers):
            sequence = sequences.get(position)
            found = (
                sequence.compute(input)
                if sequence is not None and sequence.begins(layers[position:])
                else None
            )
            input, length = (layers[position](input), 1) if found is None else found
            position += length
        return input


class _Calling(FusedModule):
    """Mixed into the class of a module whose forward calls the layers of sequences, around its call.

    The forward and its signature stay its own.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = vars(self).get(_CALLER)
        if caller is None or not _may_compute(self, args):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        runs, run = _threads.runs, _Run()
        outer = runs.get(caller)
        runs[caller] = run
        try:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            if outer is None:
                del runs[caller]
            else:
                runs[caller] = outer
        if run.begun:
            raise next(iter(run.begun)).broken(run)
        return output


def _may_compute(module: Any, args: tuple[Any, ...]) -> bool:
    """True if some sequence may be computed in the module's call."""
    if torch.compiler.is_compiling() or getattr(module, "_is_replica", False) or not runs_eagerly():
        return False
    # Channels grow by 6 in the blocks of MobileNets: no sequence in here will be worth it.
    return _threads.forced is not None or len(args) != 1 or worth_fusing(args[0], 8)


def fuse(caller: nn.Module, sequences: Sequence[FusedSequence]) -> None:
    """Let `caller`'s forward compute each sequence at once."""
    children = list(caller._modules.values())
    for sequence in sequences:
        for position, layer in enumerate(sequence.layers):
            vars(layer)[_PLACE] = (sequence, position)
            kind: Any = type(layer)
            layer.__class__ = fused_class(_Layer, kind)
        begin = _place_in(children, sequence)
        if begin is None or own_class(caller).forward is not nn.Sequential.forward:
            if _CALLER not in vars(caller):
                vars(caller)[_CALLER] = _Caller()
                kind = type(caller)
                caller.__class__ = fused_class(_Calling, kind)
            sequence.caller = vars(caller)[_CALLER]
            continue
        if _SEQUENCES not in vars(caller):
            vars(caller)[_SEQUENCES] = {}
            kind = type(caller)
            caller.__class__ = fused_class(_Sequential, kind)
        vars(caller)[_SEQUENCES][begin] = sequence


def _place_in(children: Sequence[nn.Module | None], sequence: FusedSequence) -> int | None:
    """Where the layers of `sequence` stand one after the other."""
    first = next((i for i, child in enumerate(children) if child is sequence.layers[0]), None)
    return first if first is not None and sequence.begins(children[first:]) else None


def unfuse(model: nn.Module) -> None:
    """Undo `fuse` for every sequence with a layer in `model`."""
    found = [sequence_of(module) for module in model.modules()]
    found += [each for module in model.modules() for each in vars(module).get(_SEQUENCES, {}).values()]
    unfuse_some(model, {sequence for sequence in found if sequence is not None})


def unfuse_some(model: nn.Module, sequences: Collection[FusedSequence]) -> None:
    """Undo `fuse` for these sequences, and for what in `model` would call them."""
    for sequence in sequences:
        for layer in sequence.layers:
            if vars(layer).pop(_PLACE, None) is not None:
                unmix(layer, _Layer)
    left = {place[0].caller for m in model.modules() if (place := vars(m).get(_PLACE)) is not None}
    for module in model.modules():
        places = vars(module).get(_SEQUENCES)
        if places is not None:
            for position in [position for position, sequence in places.items() if sequence in sequences]:
                del places[position]
            if not places:
                del vars(module)[_SEQUENCES]
                unmix(module, _Sequential)
        if _CALLER in vars(module) and vars(module)[_CALLER] not in left:
            del vars(module)[_CALLER]
            unmix(module, _Calling)


def sequence_of(module: nn.Module) -> FusedSequence | None:
    """The sequence that `module` is a layer of."""
    place = vars(module).get(_PLACE)
    return None if place is None else place[0]


def runs_fused(input: Any, growth: float = 1) -> bool:
    """True if something fused is to run on `input`: where it is worth it, or as `fusing` says."""
    return worth_fusing(input, growth) if _threads.forced is None else _threads.forced


@contextmanager
def fusing(forced: bool) -> Iterator[None]:
    """In this thread, sequences are fused where they can be, or nowhere, worth it or not."""
    _threads.forced = forced
    try:
        yield
    finally:
        _threads.forced = None


def _is_checkpointed() -> bool:
    """True if what the backward needs may be being dropped, to be computed again outside of the caller."""
    return torch.is_grad_enabled() and hooks_of_others()
