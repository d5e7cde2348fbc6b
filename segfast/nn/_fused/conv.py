"""A convolution, transposed or not, with the norm and activation after it, as one operator."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional as F
from .eager import folds_filters, global_hooks, only_forward
from .folding import folded, folded_filter, folds
from .ready import Ready, ready
from .separable import is_convolution, padded
from .training import train, trains


def _trains_in_16_bits(conv: Any) -> bool:
    """True if autograd would keep an epilogue's fp32 intermediates, where the layers keep 16 bits."""
    weight = conv.weight
    if not (torch.is_grad_enabled() and weight.requires_grad) or torch.compiler.is_compiling():
        return False
    return weight.dtype.itemsize == 2 or torch.is_autocast_enabled(weight.device.type)


class FusedConv(NamedTuple):
    """A convolution and what follows it; None for what it lacks.

    `conv` is a `Conv2d` or `ConvTranspose2d`, torch's or ours, of any geometry.
    """

    conv: Any
    norm: nn.Module | None = None
    activation: str | None = None
    negative_slope: float = 0.01

    def plain(self) -> bool:
        """True if there is no norm, which would have to be in eval."""
        return self.norm is None

    def growth(self) -> float:
        """By what to multiply the input's elements before asking whether it is `worth_fusing`.

        What is saved is passes over the output; a quarter of those count. On a CPU none is, where no norm is:
        ATen's activation is written over the convolution's result as ours is.
        """
        if self.norm is None:
            return 0
        conv = self.conv
        area = conv.stride[0] * conv.stride[1]
        return conv.out_channels / conv.in_channels * (area if conv.transposed else 1 / area) / 4

    def is_eligible(self) -> bool:
        """True if the layers, as they stand now, compute what one operator can."""
        return (
            is_convolution(self.conv)
            and folds(self.norm)
            and only_forward(self.conv)
            and not _trains_in_16_bits(self.conv)
            and (self.norm is None or only_forward(self.norm))
            and not global_hooks()
        )

    def is_trained(self) -> bool:
        """True if `train` computes what the layers do in training, where `may_train`."""
        return (
            trains(self.norm)
            and is_convolution(self.conv)
            and all([only_forward(m) for m in (self.conv, self.norm) if m is not None])
        )

    def train(self, input: Any, residual: Tensor | None = None) -> Tensor:
        """The layers in training; `residual` is added before the activation."""
        return train(self.conv, self.norm, input, self.activation, self.negative_slope, residual)

    def ready(self, input: Any, residual: Tensor | None = None) -> Ready | None:
        """The computation of the layers on a CPU, if it is known and the layers are still eligible."""
        if self.conv.transposed:
            return None
        return ready(((self.conv, self.norm, self.activation),), input, residual, self.negative_slope)

    def run(self, input: Any, residual: Tensor | None = None, ask: bool = True) -> Tensor:
        """The layers in one operator; `input` may be several images, as `segfast.functional.conv2d` has it.

        `residual` is added before the activation. With `ask` false `ready` is known to be None.
        """
        conv = self.conv
        known = self.ready(input, residual) if ask else None
        if known is not None:
            return known.run(input, residual)
        scale = shift = None
        if self.norm is not None and folds_filters(input if isinstance(input, Tensor) else input[0], conv):
            weight, bias = folded_filter(conv, self.norm)
        else:
            weight, bias = conv.weight, conv.bias
            scale, shift = folded(self.norm)
        epilogue: Any = {
            "scale": scale,
            "shift": shift,
            "residual": residual,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
        }
        if conv.transposed:
            geometry = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
            return F.conv_transpose2d(input, weight, bias, *geometry, **epilogue)
        input, padding = padded(conv, input)
        return F.conv2d(input, weight, bias, conv.stride, padding, conv.dilation, conv.groups, **epilogue)
