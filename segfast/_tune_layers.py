"""What `segfast tune` describes a layer with, and draws its tensors with."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Returns a tensor or a tuple of them; or, of ours, a function of none that makes them of what was launched.
Call = Callable[[], Any]


class Calls(NamedTuple):
    """Our call and ATen's, and what ours is held to where rounding makes ATen's own result too coarse.

    `rivals` are what else could serve the call, as the rows name them ("cudnn_relu"); `bucket` is the one the
    choice of backend looks up, where that is not the kernel's own.
    """

    ours: Call
    aten: Call
    reference: Call | None = None
    rivals: Mapping[str, Call] = {}
    bucket: str | None = None


class Layer(NamedTuple):
    """A convolution's sizes; of a separable one C_OUT is the 1x1 convolution's.

    `fused`: 1 with a scale, a shift and relu after it, for operations whose tables tell that apart.
    """

    batch: int
    c_in: int
    c_out: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    dilation: int = 1
    fused: int = 0

    def conv_size(self) -> tuple[int, int]:
        """Height and width of a convolution's result."""
        reach = self.dilation * (self.kernel - 1) + 1
        height, width = (
            (size + 2 * self.padding - reach) // self.stride + 1 for size in (self.height, self.width)
        )
        return height, width


class Head(NamedTuple):
    """The size of logits, and how many times higher and wider what is compared with labels is."""

    batch: int
    classes: int
    height: int
    width: int
    scale: int

    def output_size(self) -> tuple[int, int, int]:
        """Images, and their height and width."""
        return self.batch, self.scale * self.height, self.scale * self.width


class Pyramid(NamedTuple):
    """An ASPP's convolutions of one input: 1x1, and 3x3 at once, twice and three times a rate."""

    batch: int
    c_in: int
    c_out: int  # of each
    height: int
    width: int
    rate: int

    def dilations(self) -> tuple[int, ...]:
        """The convolutions'; the 1x1 convolution's is first."""
        return 1, self.rate, 2 * self.rate, 3 * self.rate


class Image(NamedTuple):
    """Images of so many labels a pixel."""

    batch: int
    labels: int
    height: int
    width: int


AnyLayer = Layer | Head | Pyramid | Image


class Draw:
    """Random channels_last tensors of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *size: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*size, device=self.device, generator=self.generator)
        return values.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def integers(self, end: int, *size: int) -> Tensor:
        """From 0 to `end` - 1, int64 and dense."""
        return torch.randint(0, end, size, generator=self.generator, device=self.device)


def calls_of(
    ours: Callable[..., Tensor],
    aten: Callable[..., Tensor],
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    direction: str,
    draw: Draw,
) -> Calls:
    """Both functions of x and the weight, each with its own, in one direction: the result or a gradient."""
    mine, theirs = weights
    if direction == "forward":
        return Calls(partial(_without_gradients, ours, x, mine), partial(_without_gradients, aten, x, theirs))
    wanted = (x, x) if direction == "grad_input" else weights
    for leaf in wanted:
        leaf.requires_grad_()
    outputs = ours(x, mine), aten(x, theirs)
    grad = draw(*outputs[0].shape)
    first, second = (
        partial(torch.autograd.grad, y, leaf, grad, retain_graph=True)
        for y, leaf in zip(outputs, wanted, strict=True)
    )
    return Calls(first, second)


@torch.no_grad()
def _without_gradients(function: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
    return function(x, weight)
