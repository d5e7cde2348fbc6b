"""Which implementation runs a call: the fastest of those verified and timed on this machine for its shape.

A `Call` says all that a choice may depend on, a `Candidate` is one implementation, a `Choice` the one that
won and what each took. Choices are remembered in the user's cache, one file a machine and set of versions.
"""

import contextlib
import math
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backend
from ._backend import get_backend
from ._geometry import output_size
from ._operands import Pair
from ._registry import is_traced

ATEN = "aten"
# Instead of a candidate: a call that is only listed need not be computed.
ZEROS = "zeros"
# Further away from every measured image than this, a size counts as never seen.
FARTHEST = 4.0


class Call(NamedTuple):
    """What a choice may depend on; `input` and `weight` are shapes, `dtype` what is computed in."""

    operation: str
    dtype: torch.dtype
    channels_last: bool
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: Pair
    padding: Pair
    output_padding: Pair
    dilation: Pair
    groups: int
    bias: bool
    residual: bool
    activation: str | None
    threads: int

    @property
    def pixels(self) -> int:
        """Of all images of the batch."""
        return self.input[0] * self.input[2] * self.input[3]

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return self.operation == "conv_transpose2d"

    def output(self) -> tuple[int, ...]:
        """The shape of the result."""
        batch, _, height, width = self.input
        kernel = self.weight[2:]
        if not self.transposed:
            size = output_size(height, width, kernel, self.stride, self.padding, self.dilation)
            return (batch, self.weight[0], *size)
        sizes = [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, d, k, o in zip(
                (height, width), self.stride, self.padding, self.dilation, kernel, self.output_padding,
                strict=True,
            )
        ]  # fmt: skip
        return (batch, self.weight[1] * self.groups, *sizes)

    def multiplications(self) -> int:
        """How many a direct computation takes."""
        pixels = self.pixels if self.transposed else math.prod((self.input[0], *self.output()[2:]))
        return math.prod(self.weight) * pixels

    def __str__(self) -> str:
        shape = "x".join(map(str, self.weight[2:]))
        out = self.output()
        parts = [f"{self.operation} {shape}, {self.input[1]} to {out[1]} channels, {out[2]}x{out[3]} pixels"]
        parts += [f"{self.input[0]} images"] if self.input[0] > 1 else []
        for name, value, usual in (("stride", self.stride, 1), ("dilation", self.dilation, 1)):
            parts += [] if value == (usual, usual) else [f"{name} {value[0]}"]
        parts += [f"{self.groups} groups"] if self.groups > 1 else []
        parts += ["residual"] if self.residual else []
        parts += [self.activation] if self.activation else []
        return ", ".join([*parts, str(self.dtype).removeprefix("torch.")])


class Choice(NamedTuple):
    """The candidate that runs a call, and the microseconds of each that was right (the lower quartile)."""

    name: str
    us: dict[str, float]

    def __str__(self) -> str:
        if len(self.us) < 2:
            return self.name
        others = [f"{name} {us:.0f}" for name, us in self.us.items() if name != self.name]
        return f"{self.name}: {self.us[self.name]:.0f} us ({', '.join(others)})"


class Candidate(NamedTuple):
    """One implementation of an operation.

    `serves(call)` says whether it can run a call; `prepare(weight, call)` returns what it wants instead of
    the weight, which is kept while the weight stands; `run(call, input, prepared, bias, residual,
    negative_slope)` computes.
    """

    serves: Callable[[Call], bool]
    prepare: Callable[[Tensor, Call], Any]
    run: Callable[..., Tensor]


# By operation and name, in the order of preference while nothing is measured. ATen is always one.
CANDIDATES: dict[str, dict[str, Candidate]] = {}


class Choices:
    """All choices of one machine, and the nearest one of shapes that were not measured."""

    def __init__(self) -> None:
        self.measured: dict[Call, Choice] = {}
        self._near: dict[Call, Choice | None] = {}
        self._sizes: dict[Call, list[Call]] = {}

    def add(self, call: Call, choice: Choice) -> None:
        """Remember `choice` in this process."""
        if call not in self.measured:
            self._sizes.setdefault(_of_any_size(call), []).append(call)
        self.measured[call] = choice
        self._near.clear()
        _renew()

    def find(self, call: Call) -> Choice | None:
        """The choice of a call, or of the measured one with the nearest number of pixels."""
        choice = self.measured.get(call)
        if choice is not None:
            return choice
        if call not in self._near:
            if len(self._near) >= 4096:
                self._near.clear()
            self._near[call] = self._nearest(call)
        return self._near[call]

    def _nearest(self, call: Call) -> Choice | None:
        known = self._sizes.get(_of_any_size(call), [])
        if not known or min(call.input) < 1 or min(call.output()) < 1:
            return None

        def distance(other: Call) -> float:
            return abs(math.log(other.pixels / call.pixels))

        nearest = min(known, key=distance)
        choice = self.measured[nearest]
        near = distance(nearest) <= math.log(FARTHEST)
        return choice if near and CANDIDATES[call.operation][choice.name].serves(call) else None


def _of_any_size(call: Call) -> Call:
    return call._replace(input=(0, call.input[1], 0, 0))


class Collected:
    """The calls made while somebody listens, each with the id of its weight, and how often each was made.

    A weight with a norm folded into it goes by the id of the layer's own. With `zeros` those that have no
    choice are not computed, and give zeros.
    """

    def __init__(self, origins: dict[int, int], zeros: bool = False) -> None:
        self.zeros = zeros
        self.counts: dict[Call, int] = {}
        self._weights: list[tuple[Call, int]] = []
        self._origins = origins

    def add(self, call: Call, weight: Tensor) -> None:
        self.counts[call] = self.counts.get(call, 0) + 1
        self._weights.append((call, id(weight)))

    def by_weight(self) -> dict[int, list[Call]]:
        """The calls with each weight."""
        found: dict[int, list[Call]] = {}
        for call, weight in self._weights:
            found.setdefault(self._origins.get(weight, weight), []).append(call)
        return found


_choices: Choices | None = None
# Counted up whenever a choice may have become another one.
_generation = 0
_collected: Collected | None = None
_measures_unseen = os.environ.get("SEGFAST_AUTOTUNE", "0") == "1"
PLAIN = (Tensor, torch.nn.Parameter)


def choices() -> Choices:
    """Those of this machine, read from the user's cache at the first use."""
    global _choices
    if _choices is None:
        from ._choice_files import read

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


def forget_choices() -> None:
    """Read them anew at their next use, and drop what was prepared for them."""
    global _choices
    _choices = None
    _renew()
    _prepared.clear()


def are_there_choices() -> bool:
    """Whether a call could run anything but ATen on a CPU."""
    return _collected is not None or _measures_unseen or bool(choices().measured)


@contextlib.contextmanager
def collect(zeros: bool = False) -> Iterator[Collected]:
    """List the calls made meanwhile.

    One that has no choice runs the candidate that is preferred; with `zeros` it gives zeros at once.
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

    Without gradients, on a CPU, and nowhere while a graph is captured or compiled. What was measured is
    remembered in the user's cache. `SEGFAST_AUTOTUNE=1` does the same for a whole program.

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


def could_choose(input: Tensor) -> bool:
    """Whether a convolution of `input` may run something else than ATen on a CPU, if nobody listens."""
    if torch.compiler.is_compiling() or not input.is_cpu or torch.is_grad_enabled():
        return False
    return get_backend() == "auto" and are_there_choices()


def fusion_could_help(input: Tensor) -> bool:
    """Whether something could run on `input` that computes a convolution and what follows it in one pass.

    Elsewhere layers put together are the same passes over the images, and Python's time besides.
    """
    return _backend.fusion_could_help(input) or could_choose(input)


def can_choose(input: Tensor, *others: Tensor | None) -> bool:
    """Whether these tensors could be a chosen candidate's: on a CPU, without gradients, nobody listening."""
    if not input.is_cpu or get_backend() != "auto" or is_traced() or not are_there_choices():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (input, *others)]):
        return False
    return all([t is None or type(t) in PLAIN for t in (input, *others)])


def choose(call: Call, weight: Tensor) -> str | None:
    """The name of the candidate that runs `call`, or `ZEROS`; None where none is known."""
    found = choices().find(call)
    if _collected is not None:
        if not _is_valid(call):
            return None
        _collected.add(call, weight)
        if found is None:
            return ZEROS if _collected.zeros else _preferred(call, weight)
    elif found is None and _measures_unseen and _is_valid(call):
        from ._measure import measure_and_keep

        found = measure_and_keep([call])[call]
    return None if found is None else found.name


def _preferred(call: Call, weight: Tensor) -> str | None:
    for name, candidate in CANDIDATES[call.operation].items():
        if candidate.serves(call):
            try:
                prepared(weight, call, name)
            except RuntimeError:
                continue  # as oneDNN refuses some geometries
            return name
    return None


def _is_valid(call: Call) -> bool:
    """Whether torch would take it; what is wrong with another, torch says."""
    filters = call.weight[0] if call.transposed else call.weight[1] * call.groups
    return (
        min(call.input) > 0
        and min(call.weight) > 0
        and filters == call.input[1]
        and call.weight[0] % call.groups == 0
        and min(call.stride) > 0
        and min(call.dilation) > 0
        and min(call.padding) >= 0
        and min(call.output()) > 0
    )


class _Prepared:
    """What candidates made of a weight, by candidate and geometry, as long as it stands unchanged."""

    __slots__ = ("address", "kept", "ref", "version")

    def __init__(self, weight: Tensor, ref: "weakref.ref[Tensor]"):
        self.ref, self.kept = ref, dict[Any, Any]()
        self.version, self.address = _version(weight), weight.data_ptr()

    def describes(self, weight: Tensor) -> bool:
        return self.ref() is weight and self.version == _version(weight) and self.address == weight.data_ptr()


_prepared: dict[int, _Prepared] = {}


def prepared(weight: Tensor, call: Call, name: str) -> Any:
    """What the candidate `name` wants instead of `weight`, remembered until that is written to or goes.

    A write through `.data` leaves no trace in torch: `forget_prepared` is for those.
    """
    key = id(weight)
    entry = _prepared.get(key)
    if entry is None or not entry.describes(weight):
        ref = weakref.ref(weight, lambda _: _prepared.pop(key, None))
        entry = _Prepared(weight, ref)
        if not weight.is_inference():  # its writes cannot be seen
            _prepared[key] = entry
    kind = (
        name,
        call.operation,
        call.dtype,
        call.stride,
        call.padding,
        call.dilation,
        call.output_padding,
        call.groups,
    )
    found = entry.kept.get(kind)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = CANDIDATES[call.operation][name].prepare(weight.detach(), call)
        entry.kept[kind] = found
    return found


def forget_prepared(*weights: Tensor | None) -> None:
    """Prepare each of these anew at its next call."""
    for weight in weights:
        _prepared.pop(id(weight), None)
    _renew()


def _version(weight: Tensor) -> int:
    return -1 if weight.is_inference() else weight._version
