"""`torch.nn.Conv2d` on our operator, and its block with norm and activation."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ..ops._aten_only import certainly_aten
from ..ops._choice import could_choose
from ..ops._epilogue import check_activation
from ..ops._operands import pair
from ._activation import activation_module
from ._fused.folding import Remembers
from ._fused.layers import run_layers
from ._fused.ready import convolved
from ._fused.separable import padded
from ._rules import Rule


class Conv2d(Remembers, nn.Conv2d):
    """`torch.nn.Conv2d` with a fused activation: same constructor, same state_dict, same results.

    Args:
        activation: None, "relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "sigmoid", "hardswish"
            or "hardsigmoid".
        negative_slope: leaky_relu's.

    Shapes: [N, C_in, H, W] or [C_in, H, W] to [N, C_out, H_out, W_out] or [C_out, H_out, W_out]. A list of
    images stands for their concatenation along the channels, as in `segfast.functional.conv2d`, where zeros
    are what pads it.

    Raises:
        ValueError: an unknown activation.

    Example:
        >>> import torch, segfast
        >>> conv = segfast.nn.Conv2d(8, 4, 3, padding=12, dilation=12, activation="relu")
        >>> conv(torch.randn(1, 8, 33, 33)).shape
        torch.Size([1, 4, 33, 33])
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

    def forward(self, input: Tensor) -> Tensor:
        y = convolved(self, input)
        if y is not None:
            return y
        plain = self.activation is None and self.dilation == (1, 1) and isinstance(input, Tensor)
        if plain and certainly_aten(input) and not could_choose(input):
            # torch's own layer: the operator would only take longer to come to the same call.
            return super().forward(input)
        # torch's annotations take these for tuples of any length; they are pairs.
        stride: Any = self.stride
        dilation: Any = self.dilation
        input, padding = padded(self, input)
        return F.conv2d(
            input,
            self.weight,
            self.bias,
            stride,
            padding,
            dilation,
            self.groups,
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


class ConvBNAct(Remembers, nn.Sequential):
    """Convolution, norm, activation, under torchvision's names for them ("0", "1", "2").

    In eval, and in train where there is no norm, one operator computes all of it, batch norm as a scale and a
    shift. In train the norm and the activation are one function, for which the convolution's result alone is
    kept: the activation's is made again in the backward pass, for the convolution of a block that follows
    too. With `torch.nn.SyncBatchNorm`, over gloo on a CPU too. Under `torch.compile`, hooks, checkpointing or
    forward-mode AD, without gradients and with norms other than batch norm the layers run one after the
    other. A result that is written to before the next layer reads it is kept as it is; writes through what
    shares its memory alone (`.data`, numpy) are not seen. The scale and shift are remembered until the norm's
    tensors are written to (not seen: a write through `.data`; call `eval()` after one).

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: the convolution's.
        padding: as in `torch.nn.Conv2d`; None keeps the image's size at stride 1.
        norm_layer: called with the number of channels; None for no norm.
        activation: None, or a name `Conv2d` knows.
        negative_slope: leaky_relu's.

    Shapes: [N, C_in, H, W] to [N, C_out, H_out, W_out]; a list of images as in `Conv2d`.

    Raises:
        ValueError: an unknown activation; a kernel that no padding keeps the size of.

    Example:
        >>> import torch, segfast
        >>> block = segfast.nn.ConvBNAct(8, 16, dilation=2).eval()
        >>> block(torch.randn(2, 8, 9, 9)).shape
        torch.Size([2, 16, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        device=None,
        dtype=None,
    ):
        check_activation(activation)
        if padding is None:
            padding = _padding_that_keeps_the_size(kernel_size, dilation)
        layers: list[nn.Module] = [
            Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                groups,
                bias,
                device=device,
                dtype=dtype,
            )
        ]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels).to(device=device, dtype=dtype))
        if activation is not None:
            layers.append(activation_module(activation, negative_slope))
        super().__init__(*layers)

    def forward(self, input: Any) -> Tensor:
        return run_layers(list(self), input)


def _padding_that_keeps_the_size(kernel_size, dilation) -> tuple[int, int]:
    totals = [
        d * (k - 1) for k, d in zip(pair(kernel_size, "kernel_size"), pair(dilation, "dilation"), strict=True)
    ]
    if totals[0] % 2 or totals[1] % 2:
        raise ValueError(
            f"kernel_size must be odd where no padding is given, which keeps the size, got {kernel_size}"
        )
    return totals[0] // 2, totals[1] // 2


def _is_dilated(module: nn.Module) -> bool:
    """A dilated convolution of images that is not depthwise, for that is another family's."""
    dilation = getattr(module, "dilation", 1)
    groups = getattr(module, "groups", 1)
    if not isinstance(dilation, tuple) or not isinstance(groups, int):
        return False
    depthwise = groups > 1 and getattr(module, "in_channels", 0) == groups
    return max(dilation, default=1) > 1 and not depthwise and not getattr(module, "transposed", False)


RULES = [
    Rule(
        source=nn.Conv2d,
        target=Conv2d,
        attributes={"activation": None, "negative_slope": 0.01},
        applies=_is_dilated,
        related={
            nn.Conv1d: "one-dimensional; the kernels are for images",
            nn.Conv3d: "three-dimensional; the kernels are for images",
        },
    )
]
