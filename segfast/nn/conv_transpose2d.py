"""`torch.nn.ConvTranspose2d` on our operator, and the modules people build around it."""

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..ops._epilogue import check_activation
from ._fused.folding import Remembers
from ._fused.ready import convolved
from ._rules import Rule


class ConvTranspose2d(Remembers, torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a fused activation: same constructor, same state_dict, same results.

    Args:
        activation: None, "relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "hardswish"
            or "hardsigmoid".
        negative_slope: leaky_relu's.

    Shapes: [N, C_in, H, W] or [C_in, H, W] to [N, C_out, H_out, W_out] or [C_out, H_out, W_out].

    Raises:
        ValueError: an unknown activation.

    Example:
        >>> import torch, segfast
        >>> up = segfast.nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)
        >>> up(torch.randn(1, 8, 5, 5), output_size=[10, 10]).shape
        torch.Size([1, 4, 10, 10])
    """

    # Class attributes, so that a torch module becomes one of these by changing its class alone.
    activation: str | None = None
    negative_slope: float = 0.01

    def __init__(self, *args, activation: str | None = None, negative_slope: float = 0.01, **kwargs):
        check_activation(activation)
        super().__init__(*args, **kwargs)
        if activation is not None:
            self.activation = activation
            self.negative_slope = negative_slope

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        y = convolved(self, input) if output_size is None else None
        if y is not None:
            return y
        # torch's annotations take these for lists or strings; they are pairs of ints.
        stride: Any = self.stride
        padding: Any = self.padding
        output_padding: Any = self.output_padding
        dilation: Any = self.dilation
        if output_size is not None:
            kernel: Any = self.kernel_size
            output_padding = tuple(
                self._output_padding(input, output_size, stride, padding, kernel, 2, dilation)
            )
        return F.conv_transpose2d(
            input,
            self.weight,
            self.bias,
            stride,
            padding,
            output_padding,
            self.groups,
            dilation,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )

    def extra_repr(self) -> str:
        extra = super().extra_repr()
        if self.activation is not None:
            extra += f", activation={self.activation}"
        if self.activation == "leaky_relu":
            extra += f", negative_slope={self.negative_slope}"
        return extra


RULES = [
    Rule(
        source=torch.nn.ConvTranspose2d,
        target=ConvTranspose2d,
        attributes={"activation": None, "negative_slope": 0.01},
        related={
            torch.nn.ConvTranspose1d: "one-dimensional; the kernels are for images",
            torch.nn.ConvTranspose3d: "three-dimensional; the kernels are for images",
        },
        functional="conv_transpose2d",
    )
]
