"""What `segfast tune` describes a layer with, and draws its tensors with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Returns a tensor or a tuple of them; or, of ours, a function of none that makes them of what was launched.
Call = Callable[[], Any]


class Calls(NamedTuple):
    """Our call and ATen's, and what ours is held to where rounding makes ATen's own result too coarse."""

    ours: Call
    aten: Call
    reference: Call | None = None


class Layer(NamedTuple):
    """A convolution's sizes; of a separable one C_OUT is the 1x1 convolution's."""

    batch: int
    c_in: int
    c_out: int
    height: int
    width: int
    kernel: int
    stride: int
    padding: int
    dilation: int = 1

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


AnyLayer = Layer | Head


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
