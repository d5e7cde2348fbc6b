"""A depthwise and a 1x1 convolution, with the norms and activations after them, as one operator."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ... import functional as F
from .._rules import own_class
from .eager import folds_filters, global_hooks, only_forward
from .folding import folded, folded_filter, folds
from .ready import Ready, Stage, ready


def is_convolution(module: nn.Module) -> bool:
    """True if `module` is a `Conv2d` or `ConvTranspose2d`, torch's own or ours without an activation."""
    kind = own_class(module)
    if kind in (nn.Conv2d, nn.ConvTranspose2d):
        return True
    ours = kind.__module__.startswith("segfast.nn.") and isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    return ours and getattr(module, "activation", None) is None


def check_channels(conv: Any, input: Any) -> None:
    """Raise for an input of other channels than `conv` has: the operators take their number from it."""
    if isinstance(input, Tensor) and input.dim() > 2 and input.shape[-3] != conv.in_channels:
        raise RuntimeError(
            f"input must have {conv.in_channels} channels, got {list(input.shape)} "
            f"(the layer's weight is {list(conv.weight.shape)})"
        )


def padded(conv: Any, input: Tensor) -> tuple[Tensor, Any]:
    """The input, padded where zeros are not what pads it, and the padding left to the operator."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    if not isinstance(input, Tensor):
        raise TypeError(
            f"input must be one image where padding_mode is {conv.padding_mode!r}, "
            f"got a {type(input).__name__} of {len(input)}"
        )
    return nn.functional.pad(input, conv._reversed_padding_repeated_twice, conv.padding_mode), 0


class FusedSeparable(NamedTuple):
    """A depthwise and a 1x1 convolution with what follows each, in their order; None for what is lacking.

    `depthwise` is a `Conv2d` with filters of its own for each channel, `pointwise` a 1x1 `torch.nn.Conv2d`;
    without one, it is only the depthwise convolution with what follows it.
    """

    depthwise: Any
    norm: nn.Module | None = None
    activation: str | None = None
    pointwise: Any = None
    pointwise_norm: nn.Module | None = None
    pointwise_activation: str | None = None
    negative_slope: float = 0.01

    def plain(self) -> bool:
        """True if there is no norm, which would have to be in eval."""
        return self.norm is None and self.pointwise_norm is None

    def growth(self) -> float:
        """By what to multiply the input's elements before asking whether it is `worth_fusing`."""
        return 1

    def is_eligible(self) -> bool:
        """True if the layers, as they stand now, compute what one operator can."""
        layers = (self.depthwise, self.norm, self.pointwise, self.pointwise_norm)
        return (
            folds(self.norm)
            and folds(self.pointwise_norm)
            and is_convolution(self.depthwise)
            and (self.pointwise is None or is_pointwise(self.pointwise))
            and all([m is None or only_forward(m) for m in layers])
            and not global_hooks()
        )

    def ready(self, input: Any, residual: Tensor | None = None) -> Ready | None:
        """The computation of the layers on a CPU, if it is known and the layers are still eligible."""
        stages: list[Stage] = [(self.depthwise, self.norm, self.activation)]
        if self.pointwise is not None:
            stages.append((self.pointwise, self.pointwise_norm, self.pointwise_activation))
        return ready(stages, input, residual, self.negative_slope)

    def run(self, input: Tensor, residual: Tensor | None = None, ask: bool = True) -> Tensor:
        """All in one operator. `residual` is added before the last activation.

        With `ask` false `ready` is known to be None.
        """
        known = self.ready(input, residual) if ask else None
        if known is not None:
            return known.run(input, residual)
        layer = self.depthwise
        check_channels(layer, input)
        input, padding = padded(layer, input)
        geometry = (layer.stride, padding, layer.dilation)
        if self.norm is not None and folds_filters(input, layer):
            return self._run_folded(input, residual, geometry)
        scale, shift = folded(self.norm)
        if self.pointwise is None:
            return F.depthwise_conv2d(
                input,
                layer.weight,
                layer.bias,
                *geometry,
                scale=scale,
                shift=shift,
                activation=self.activation,
                negative_slope=self.negative_slope,
            )
        pointwise_scale, pointwise_shift = folded(self.pointwise_norm)
        return F.separable_conv2d(
            input,
            layer.weight,
            self.pointwise.weight,
            layer.bias,
            self.pointwise.bias,
            *geometry,
            depthwise_scale=scale,
            depthwise_shift=shift,
            depthwise_activation=self.activation,
            scale=pointwise_scale,
            shift=pointwise_shift,
            residual=residual,
            activation=self.pointwise_activation,
            negative_slope=self.negative_slope,
        )

    def _run_folded(self, input: Tensor, residual: Tensor | None, geometry: tuple) -> Tensor:
        weight, bias = folded_filter(self.depthwise, self.norm)
        slope = self.negative_slope
        if self.pointwise is None:
            return F.depthwise_conv2d(
                input, weight, bias, *geometry, activation=self.activation, negative_slope=slope
            )
        pointwise_weight, pointwise_bias = folded_filter(self.pointwise, self.pointwise_norm)
        return F.separable_conv2d(
            input,
            weight,
            pointwise_weight,
            bias,
            pointwise_bias,
            *geometry,
            depthwise_activation=self.activation,
            residual=residual,
            activation=self.pointwise_activation,
            negative_slope=slope,
        )


def is_pointwise(conv: Any) -> bool:
    """True if `conv` is a 1x1 convolution and no more."""
    # A parametrized layer is a subclass that keeps its forward.
    plain = getattr(own_class(conv), "forward", None) is nn.Conv2d.forward
    return (
        (plain or is_convolution(conv))
        and not conv.transposed
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding in ((0, 0), "valid", "same")
    )
