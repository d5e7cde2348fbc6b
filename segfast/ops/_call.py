"""A call that something can be chosen for, and an implementation of it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._geometry import output_size, transposed_output_size
from ._operands import Pair


class AnyCall(Protocol):
    """The key of a choice: hashable, and equal where the same choice holds."""

    @property
    def operation(self) -> str:
        """The function that was called."""

    @property
    def pixels(self) -> int:
        """Pixels of all images of the batch."""

    def of_any_size(self) -> Any:
        """The same call, whatever the images' size."""

    def distance(self, other: Any) -> float:
        """The logarithm of how many times more pixels one of the two has."""

    def can_run(self, name: str) -> bool:
        """True if the candidate `name` serves it."""

    def multiplications(self) -> int:
        """How many a direct computation takes."""


class Call(NamedTuple):
    """A call, as far as a choice may depend on it: the shapes of its operands, the dtype it computes in."""

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
        """Pixels of all images of the batch."""
        return self.input[0] * self.input[2] * self.input[3]

    @property
    def transposed(self) -> bool:
        """True if it is a transposed convolution."""
        return self.operation == "conv_transpose2d"

    def of_any_size(self) -> "Call":
        """The same call, whatever the images' size."""
        return self._replace(input=(0, self.input[1], 0, 0))

    def distance(self, other: "Call") -> float:
        """The logarithm of how many times more pixels one of the two has."""
        return abs(math.log(other.pixels / self.pixels))

    def can_run(self, name: str) -> bool:
        """True if the candidate `name` serves it."""
        return (
            min(self.input) > 0 and min(self.output()) > 0 and CANDIDATES[self.operation][name].serves(self)
        )

    def output(self) -> tuple[int, ...]:
        """The shape of the result."""
        batch, _, height, width = self.input
        kernel = self.weight[2:]
        if not self.transposed:
            size = output_size(height, width, kernel, self.stride, self.padding, self.dilation)
            return (batch, self.weight[0], *size)
        options = (self.stride, self.padding, self.output_padding, self.dilation)
        size = transposed_output_size((height, width), kernel, *options)
        return (batch, self.weight[1] * self.groups, *size)

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


class Candidate(NamedTuple):
    """One implementation of an operation.

    `serves(call)` says whether it can run a call; `prepare(weight, call)` returns what it wants instead of
    the weight, which is kept while the weight stands; `run(call, input, prepared, bias, residual,
    negative_slope)` computes. `form(call)` is what of the images' size and the threads the prepared weight
    depends on: others are right, and slow. `layout(prepared)` tells where forms have come to the same.
    """

    serves: Callable[[Call], bool]
    prepare: Callable[[Tensor, Call], Any]
    run: Callable[..., Tensor]
    form: Callable[[Call], Any] = lambda call: None
    layout: Callable[[Any], Any] | None = None


# By operation and name, in the order of preference while nothing is measured. ATen is always one.
CANDIDATES: dict[str, dict[str, Candidate]] = {}
