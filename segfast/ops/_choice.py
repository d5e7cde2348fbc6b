"""The choice of a call: the fastest candidate that was verified and timed on this machine for its shape.

A `Choice` names the one that won and what each took. Choices are remembered in the user's cache, one file a
machine and set of versions.
"""

import contextlib
import math
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backend
from ._backend import get_backend
from ._call import CANDIDATES, AnyCall, Call
from ._operator import is_traced
from ._prepared_weights import forget, forget_all, remembered

ATEN = "aten"
# Instead of a candidate: a call that is only listed need not be computed.
ZEROS = "zeros"
# Further away from every measured image than this, a size counts as never seen.
FARTHEST = 4.0


class Choice(NamedTuple):
    """The candidate that runs a call, and the microseconds of each that was right (the lower quartile).

    `tiles` are the tile sizes that the kernels of ours were fastest with: (operation, bucket, the fields of
    a `segfast.kernels.Tile`). `unproven` are candidates that were left out, as nothing proved them right.
    """

    name: str
    us: dict[str, float]
    tiles: tuple[tuple[str, str, tuple[Any, ...]], ...] = ()
    unproven: tuple[str, ...] = ()

    def __str__(self) -> str:
        others = [f"{name} {us:.0f}" for name, us in self.us.items() if name != self.name]
        text = f"{self.name}: {self.us[self.name]:.0f} us" if others else self.name
        others += [f"{name} not proven" for name in self.unproven]
        return f"{text} ({', '.join(others)})" if others else text


class Choices:
    """All choices of one machine, and the nearest one of shapes that were not measured."""

    def __init__(self) -> None:
        self.measured: dict[AnyCall, Choice] = {}
        self._near: dict[AnyCall, Choice | None] = {}
        self._sizes: dict[AnyCall, list[AnyCall]] = {}

    def add(self, call: AnyCall, choice: Choice) -> None:
        """Remember `choice` in this process."""
        if call not in self.measured:
            self._sizes.setdefault(call.of_any_size(), []).append(call)
        self.measured[call] = choice
        self._near.clear()
        _renew()

    def find(self, call: AnyCall) -> Choice | None:
        """The choice of a call, or of the measured one with the nearest number of pixels."""
        choice = self.measured.get(call)
        if choice is not None:
            return choice
        if call not in self._near:
            if len(self._near) >= 4096:
                self._near.clear()
            self._near[call] = self._nearest(call)
        return self._near[call]

    def _nearest(self, call: AnyCall) -> Choice | None:
        known = self._sizes.get(call.of_any_size(), [])
        if not known or call.pixels < 1:
            return None

        nearest = min(known, key=call.distance)
        choice = self.measured[nearest]
        near = call.distance(nearest) <= math.log(FARTHEST)
        return choice if near and call.can_run(choice.name) else None

    def of_any_size(self, call: AnyCall) -> list[Choice]:
        """The choices of every measured size of a call without one."""
        return [self.measured[each] for each in self._sizes.get(call, [])]


class Collected:
    """The calls made while somebody listens, each with the id of its weight, and how often each was made.

    A weight with a norm folded into it goes by the id of the layer's own. With `zeros` those on a CPU are not
    computed, and give zeros; what they were chosen to run is prepared.
    """

    def __init__(self, origins: dict[int, int], zeros: bool = False) -> None:
        self.zeros = zeros
        # Families of kernels, and dtypes, that run once they are proven: nothing is to be timed.
        self.unproven: set[tuple[str, torch.dtype]] = set()
        self.counts: dict[AnyCall, int] = {}
        self._weights: list[tuple[AnyCall, int]] = []
        self._origins = origins

    def add(self, call: AnyCall, *weights: Tensor) -> None:
        self.counts[call] = self.counts.get(call, 0) + 1
        self._weights += [(call, id(weight)) for weight in weights]

    def by_weight(self) -> dict[int, list[AnyCall]]:
        """The calls with each weight."""
        found: dict[int, list[AnyCall]] = {}
        for call, weight in self._weights:
            found.setdefault(self._origins.get(weight, weight), []).append(call)
        return found


_choices: Choices | None = None
# Counted up whenever a choice may have become another one.
_generation = 0
_collected: Collected | None = None
_measures_unseen = os.environ.get("SEGFAST_AUTOTUNE", "0") == "1"
PLAIN = (Tensor, torch.nn.Parameter)


def collected() -> "Collected | None":
    """Where calls are listed, if somebody listens."""
    return _collected


def measures_unseen() -> bool:
    """True if `autotune` asks for calls never seen to be measured."""
    return _measures_unseen


def is_listening() -> bool:
    """True if a call without a choice is to be collected or measured."""
    return _collected is not None or _measures_unseen


def choices() -> Choices:
    """Those of this machine, read from the user's cache at the first use."""
    global _choices
    if _choices is None:
        from ._choice_files import read  # which imports this module

        _choices = Choices()
        for call, choice in read().items():
            _choices.add(call, choice)
    return _choices


def _renew() -> None:
    global _generation
    _generation += 1


def settled() -> int | None:
    """A number that stays while choices do; None while somebody collects, measures or asks for reasons."""
    listening = _collected is not None or _measures_unseen or _backend.is_noting()
    return None if listening else _generation


def standing() -> int | str | None:
    """A key of what decides, beside the call, what runs on a CPU without gradients: `settled()`, or `ATEN`.

    None where layers are to ask anew at each call.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _backend.is_noting() or is_traced():
        return None
    if torch.autograd.forward_ad._current_level >= 0 or _collected is not None or _measures_unseen:
        return None
    backend = get_backend()
    if backend == "auto" and choices().measured:
        return _generation
    return None if backend == "triton" else ATEN


def forget_choices() -> None:
    """Read them anew at their next use, and drop what was prepared for them."""
    global _choices
    _choices = None
    _renew()
    forget_all()


def are_there_choices() -> bool:
    """True if a call could run anything but ATen on a CPU."""
    return is_listening() or bool(choices().measured)


@contextlib.contextmanager
def collect(zeros: bool = False) -> Iterator[Collected]:
    """List the calls made meanwhile.

    One that has no choice runs the candidate that is preferred; with `zeros` all on a CPU give zeros.
    """
    global _collected
    with _backend.noting() as notes:
        previous, _collected = _collected, Collected(notes.origins, zeros)
        try:
            yield _collected
        finally:
            _collected = previous


@contextlib.contextmanager
def autotune() -> Iterator[None]:
    """Measure each call of a shape never seen on the spot, as `torch.backends.cudnn.benchmark` does.

    On a CPU without gradients, on a GPU with them too, and nowhere while a graph is captured or compiled.
    What was measured is remembered in the user's cache. `SEGFAST_AUTOTUNE=1` does the same for a whole
    program.

    Example:
        >>> import torch, segfast
        >>> x, w = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
        >>> with segfast.autotune():
        ...     y = segfast.functional.conv2d(x, w)
    """
    global _measures_unseen
    previous, _measures_unseen = _measures_unseen, True
    try:
        yield
    finally:
        _measures_unseen = previous
        if not previous:
            for finish in _when_tuned:
                finish()


_when_tuned: list[Callable[[], None]] = []


def when_tuned(finish: Callable[[], None]) -> None:
    """Call `finish` at the end of each `autotune`."""
    _when_tuned.append(finish)


def could_choose(input: Tensor) -> bool:
    """True if a convolution of `input` may run something else than ATen on a CPU, if nobody listens."""
    if torch.is_grad_enabled() or not input.is_cpu or is_traced():
        return False
    return get_backend() == "auto" and are_there_choices()


def can_choose(input: Tensor, *others: Tensor | None) -> bool:
    """True if these tensors could be a chosen candidate's: on a CPU, without gradients, nobody listening."""
    if not input.is_cpu or get_backend() != "auto" or is_traced() or not are_there_choices():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (input, *others)]):
        return False
    return all([t is None or type(t) in PLAIN for t in (input, *others)])


def choose(
    call: Call, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> str | None:
    """The name of the candidate that runs `call`, or `ZEROS`; None where none is known."""
    found = choices().find(call)
    if _collected is not None:
        if not _is_valid(call, weight, bias, residual):
            return None
        _collected.add(call, weight)
        if _collected.zeros:
            if found is not None:
                _prepare(weight, call, found.name)
            return ZEROS
        if found is None:
            return _preferred(call, weight)
    elif found is None and _measures_unseen and _is_valid(call, weight, bias, residual):
        from ._measure import measure_and_keep  # which imports this module

        found = measure_and_keep([call])[call]
    return None if found is None else found.name


def _preferred(call: Call, weight: Tensor) -> str | None:
    for name, candidate in CANDIDATES[call.operation].items():
        if candidate.serves(call) and _prepare(weight, call, name):
            return name
    return None


def _prepare(weight: Tensor, call: Call, name: str) -> bool:
    """True if the candidate could make what it wants of `weight`, which is kept for its next call."""
    try:
        prepared(weight, call, name)
    except RuntimeError:
        return False  # as oneDNN refuses some geometries
    return True


def fits(call: Call, bias: Tensor | None, residual: Tensor | None) -> bool:
    """True if bias and residual have their shapes; else torch says what is wrong, or broadcasts."""
    shape = call.output()
    return (bias is None or bias.shape == shape[1:2]) and (residual is None or residual.shape == shape)


def _is_valid(call: Call, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """True if torch would take it; what is wrong with another, torch says."""
    filters = call.weight[0] if call.transposed else call.weight[1] * call.groups
    return (
        min(call.input) > 0
        and min(call.weight) > 0
        and filters == call.input[1]
        and call.weight[0] % call.groups == 0
        and min(call.stride) > 0
        and min(call.dilation) > 0
        and min(*call.padding, *call.output_padding) >= 0
        and all(map(operator.lt, call.output_padding, map(max, call.stride, call.dilation)))
        and min(call.output()) > 0
        and fits(call, bias, residual)
        and all(t is None or t.is_cpu for t in (weight, bias, residual))
    )


def prepared(weight: Tensor, call: Call, name: str) -> Any:
    """The candidate's own form of `weight`, remembered until that is written to or goes."""
    candidate = CANDIDATES[call.operation][name]
    geometry = (call.stride, call.padding, call.dilation, call.output_padding, call.groups)
    kind = (name, call.operation, call.dtype, *geometry)

    def prepare(w: Tensor) -> Any:
        made = candidate.prepare(w, call)
        if candidate.layout is None:
            return made
        return remembered(weight, (*kind, candidate.layout(made)), lambda _: made)

    return remembered(weight, (*kind, candidate.form(call)), prepare)


def forget_prepared(*weights: Tensor | None) -> None:
    """Prepare each of these anew at its next call."""
    forget(*weights)
    _renew()
