"""Depthwise convolution as a `torch.nn.Conv2d`, and the blocks built on it: Xception's and MobileNetV2's."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ..ops._aten_only import certainly_aten
from ..ops._choice import could_choose
from ..ops._epilogue import ACTIVATIONS, activate_, check_activation
from ..ops.separable_conv2d.operators import taps_major
from ._activation import activation_module, activation_name
from ._fused.conv import FusedConv
from ._fused.eager import only_forward, worth_fusing
from ._fused.folding import Remembers
from ._fused.layers import run_layers
from ._fused.ready import convolved
from ._fused.separable import FusedSeparable, check_channels, padded
from ._fused.training import may_train, train_layers
from ._rules import Rule


class DepthwiseConv2d(Remembers, nn.Conv2d):
    """`torch.nn.Conv2d` with a filter (or several) for each channel, and a fused activation.

    The constructor is `torch.nn.Conv2d`'s, with `groups` the input's channels; same state_dict, same results.

    Args:
        groups: `in_channels`, which it is by default.
        activation: None, "relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "hardswish"
            or "hardsigmoid".
        negative_slope: leaky_relu's.

    Shapes: [N, C_in, H, W] or [C_in, H, W] to [N, C_out, H_out, W_out] or [C_out, H_out, W_out]; C_out is a
    multiple of C_in.

    Raises:
        ValueError: groups other than `in_channels`, out_channels that are no multiple of them, an unknown
            activation.

    Example:
        >>> import torch, segfast
        >>> conv = segfast.nn.DepthwiseConv2d(8, 8, 3, padding=1, activation="relu6")
        >>> conv(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    # Class attributes, so that a torch module becomes one of these by changing its class alone.
    activation: str | None = None
    negative_slope: float = 0.01

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ):
        if groups is not None and groups != in_channels:
            raise ValueError(f"groups must be in_channels ({in_channels}) or None, got {groups}")
        check_activation(activation)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if activation is not None:
            self.activation = activation
            self.negative_slope = negative_slope

    def forward(self, input: Tensor) -> Tensor:
        y = convolved(self, input)
        if y is not None:
            return y
        check_channels(self, input)
        plain = self.activation is None and self.dilation == (1, 1) and isinstance(input, Tensor)
        if plain and certainly_aten(input) and not could_choose(input):
            # torch's own layer: the operator would only take longer to come to the same call.
            return super().forward(input)
        # torch's annotations take these for tuples of any length; they are pairs.
        stride: Any = self.stride
        dilation: Any = self.dilation
        input, padding = padded(self, input)
        return F.depthwise_conv2d(
            input,
            self.weight,
            self.bias,
            stride,
            padding,
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


class SeparableConv2d(Remembers):
    """Depthwise, then pointwise convolution, with a norm and an activation after each: Xception's layer.

    Its children are `conv_dw`, `bn_dw`, `conv_pw` and `bn_pw`, timm's names. In eval, and in train where
    there is no norm, one operator computes all of it, batch norm as a scale and a shift; in train each norm
    and its activation are one function, which keeps less (see `ConvBNAct`); the layers run one after the
    other under hooks on them or with norms other than batch norm. The scale and shift are remembered until
    the norm's tensors are written to (not seen: a write through `.data`; call `eval()` after one).

    Args:
        in_channels, out_channels, bias: of the pair; the depthwise convolution keeps the channels.
        kernel_size, stride, padding, dilation: the depthwise convolution's.
        norm_layer: called with the number of channels, after each convolution; None for no norms.
        depthwise_activation, activation: None, or a name `DepthwiseConv2d` knows.
        negative_slope: leaky_relu's.

    Shapes: [N, C_in, H, W] to [N, C_out, H_out, W_out]. A residual of the output's shape is added before the
    last activation.

    Raises:
        ValueError: an unknown activation.

    Source: Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions" (2017).

    Example:
        >>> import torch, segfast
        >>> block = segfast.nn.SeparableConv2d(8, 16, padding=1, norm_layer=torch.nn.BatchNorm2d)
        >>> block(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    bn_dw: nn.Module | None
    bn_pw: nn.Module | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        *,
        norm_layer: Callable[[int], nn.Module] | None = None,
        depthwise_activation: str | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        device=None,
        dtype=None,
    ):
        check_activation(depthwise_activation)
        check_activation(activation)
        super().__init__()

        def norm(channels: int) -> nn.Module | None:
            return None if norm_layer is None else norm_layer(channels).to(device=device, dtype=dtype)

        self.conv_dw = DepthwiseConv2d(
            in_channels,
            in_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.register_module("bn_dw", norm(in_channels))
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.register_module("bn_pw", norm(out_channels))
        self.depthwise_activation, self.activation = depthwise_activation, activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        slope = self.negative_slope
        if worth_fusing(input):
            pair = FusedSeparable(
                self.conv_dw,
                self.bn_dw,
                self.depthwise_activation,
                self.conv_pw,
                self.bn_pw,
                self.activation,
                slope,
            )
            if pair.is_eligible():
                return pair.run(input, residual)
        first = FusedConv(self.conv_dw, self.bn_dw, self.depthwise_activation, slope)
        second = FusedConv(self.conv_pw, self.bn_pw, self.activation, slope)
        if first.is_trained() and second.is_trained() and may_train():
            return second.train(first.train(input), residual)
        x = self.conv_dw(input)
        if self.bn_dw is not None:
            x = self.bn_dw(x)
        x = self.conv_pw(_activated(x, self.depthwise_activation, slope, self.bn_dw or self.conv_dw))
        if self.bn_pw is not None:
            x = self.bn_pw(x)
        if residual is not None:
            return ACTIVATIONS[self.activation](x + residual, slope)
        return _activated(x, self.activation, slope, self.bn_pw or self.conv_pw)

    def extra_repr(self) -> str:
        names = (self.depthwise_activation, self.activation)
        parts = [
            f"{name}={value}"
            for name, value in zip(("depthwise_activation", "activation"), names, strict=True)
            if value is not None
        ]
        if "leaky_relu" in names:
            parts.append(f"negative_slope={self.negative_slope}")
        return ", ".join(parts)


def _activated(x: Tensor, activation: str | None, negative_slope: float, made_by: nn.Module) -> Tensor:
    """The activation of what `made_by` returned; not over it where a hook, or another class, may keep it."""
    plain = isinstance(x, Tensor) and type(made_by) in (nn.BatchNorm2d, nn.Conv2d)
    if plain and only_forward(made_by):
        return activate_(x, activation, negative_slope)
    return ACTIVATIONS[activation](x, negative_slope)


class InvertedResidual(Remembers):
    """MobileNetV2's block: expand by a 1x1 convolution, convolve each channel, project; add the input.

    The input is added where it has the output's shape. The parameters bear torchvision's names. In eval the
    depthwise convolution, the projection, their batch norms and the addition are one operator, under the
    conditions of `SeparableConv2d`, and the expansion, its norm and activation are one before it.

    Args:
        stride: 1 or 2, the depthwise convolution's.
        expand_ratio: hidden channels over `in_channels`; 1 leaves the expansion out.
        kernel_size: odd, the depthwise convolution's; it pads to keep the size.
        norm_layer: called with the number of channels.
        activation: after the expansion and the depthwise convolution; a name `DepthwiseConv2d` knows.

    Shapes: [N, C_in, H, W] to [N, C_out, ceil(H / stride), ceil(W / stride)].

    Raises:
        ValueError: another stride, an even kernel size, an unknown activation.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), figure 4.

    Example:
        >>> import torch, segfast
        >>> block = segfast.nn.InvertedResidual(8, 8).eval()
        >>> block(torch.randn(1, 8, 7, 7)).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expand_ratio: float = 6,
        kernel_size: int = 3,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: str | None = "relu6",
    ):
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        super().__init__()
        self.stride, self.out_channels = stride, out_channels
        self.adds_input = stride == 1 and in_channels == out_channels
        hidden = round(in_channels * expand_ratio)
        expansion = nn.Conv2d(in_channels, hidden, 1, bias=False)
        depthwise = DepthwiseConv2d(
            hidden, hidden, kernel_size, stride, kernel_size // 2 * dilation, dilation, bias=False
        )
        convs = [depthwise] if expand_ratio == 1 else [expansion, depthwise]
        self.conv = nn.Sequential(
            *[nn.Sequential(c, norm_layer(hidden), activation_module(activation)) for c in convs],
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            norm_layer(out_channels),
        )

    def forward(self, input: Tensor) -> Tensor:
        layers: Any = self.conv
        *expansion, depthwise, projection, norm = layers
        conv, between, activation = depthwise
        known = activation_name(activation)
        if (
            known is not None
            and worth_fusing(input)
            and all([only_forward(m) for m in (self.conv, depthwise, activation)])
        ):
            name, slope = known
            pair = FusedSeparable(conv, between, name, projection, norm, negative_slope=slope)
            if pair.is_eligible():
                x = _expanded(expansion[0], input) if expansion else input
                return pair.run(x, input if self.adds_input else None)
        trained = train_layers([self.conv], input)
        x = self.conv(input) if trained is None else trained
        return input + x if self.adds_input else x


def _expanded(expansion: nn.Module, input: Tensor) -> Tensor:
    """The expansion's result: its layers as one operator, but under hooks on them or if it was replaced."""
    if type(expansion) is nn.Sequential and only_forward(expansion):
        return run_layers(list(expansion), input)
    return expansion(input)


def _is_depthwise(module: nn.Module) -> bool:
    """A filter a channel; one channel alone is a dense convolution too, and left to it."""
    groups = getattr(module, "groups", 1)
    return isinstance(groups, int) and groups > 1 and getattr(module, "in_channels", 0) in (groups, 0)


RULES = [
    Rule(
        source=nn.Conv2d,
        target=DepthwiseConv2d,
        attributes={"activation": None, "negative_slope": 0.01},
        applies=_is_depthwise,
        layout=taps_major,
        related={
            nn.Conv1d: "one-dimensional; the kernels are for images",
            nn.Conv3d: "three-dimensional; the kernels are for images",
        },
    )
]
