"""An atrous spatial pyramid in eval: few operators for what is some twenty layers.

The branches run side by side into one tensor. The pooled branch is the same at every pixel, so what the
projection makes of it is added to the projection's result: it is never enlarged nor concatenated.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional as F
from ...ops._epilogue import ACTIVATIONS
from ...ops._operands import pair
from .._rules import own_class
from ..conv2d import ConvBNAct
from .conv import FusedConv
from .eager import folds_filters, only_forward
from .folding import folded, needs_gradient, norm_tensors, remembered, runs_eagerly
from .layers import FusedLayer, fused_layer

_DROPOUTS = (nn.Dropout, nn.Dropout2d)


class _Ready(NamedTuple):
    """The parameters of an ASPP, prepared for its calls.

    `weights`, `scale` and `shift` are the branches' ([C_i, C_in, k, k], [sum C_i]), no weights where they run
    one by one; `pool_weight` [C_pool, C_in] and `pool_shift` have the norm in them; so has `constant_weight`
    [C_out, C_pool, k, k], the projection's columns of the pooled branch; `project` are the weight, scale and
    shift of its others.
    """

    weights: tuple[Tensor, ...]
    scale: Tensor | None
    shift: Tensor | None
    pool_weight: Tensor
    pool_shift: Tensor
    constant_weight: Tensor
    project: tuple[Tensor, Tensor | None, Tensor]


class FusedASPP(NamedTuple):
    """The layers of an ASPP: branches, the pooled branch's 1x1 convolution, the projection, dropout.

    `pool_first` says where the pooled branch is in the concatenation: before the others, or after them.
    """

    branches: tuple[FusedLayer, ...]
    pool: FusedConv
    project: FusedConv
    after: tuple[nn.Module, ...]
    pool_first: bool = False

    def is_eligible(self, input: Any) -> bool:
        """True if the layers, as they stand now, and the input are ones that `run` is right for."""
        return (
            isinstance(input, Tensor)
            and input.dim() == 4
            and input.numel() > 0
            and (runs_eagerly() or torch.compiler.is_compiling())
            and all([fused.is_eligible() for fused in self.fused_layers()])
            and not (torch.is_grad_enabled() and needs_gradient([input, *self._tensors()]))
        )

    def run(self, owner: nn.Module, input: Tensor) -> Tensor:
        """The ASPP of `input`; what follows from the parameters alone is remembered for `owner`."""
        folds = folds_filters(input, self.project.conv)
        if runs_eagerly():
            key = (folds, self.pool_first, *[norm.eps for norm in self._norms()])
            ready = remembered(owner, self._tensors(), key, lambda: self._ready(folds))
        else:
            ready = self._ready(folds)
        project, first = self.project, self.branches[0]
        features: Any
        if ready.weights:
            features = F.parallel_conv2d(
                input,
                ready.weights,
                [_geometry(fused).dilation for fused in self.branches],
                scale=ready.scale,
                shift=ready.shift,
                activation=first.activation,
                negative_slope=first.negative_slope,
            )
        else:
            features = [fused.run(input) for fused in self.branches]
        weight, scale, shift = ready.project
        constant = self._constant(ready, input).to(input.dtype)
        if constant.shape[0] == 1 and constant.shape[2:] == (1, 1):
            # One image: the same for all of the output's pixels.
            shift, residual = shift + constant.flatten(), None
        else:
            residual = constant.expand(-1, -1, *input.shape[2:])
        y = F.conv2d(
            features,
            weight,
            None,
            1,
            project.conv.padding,
            scale=scale,
            shift=shift,
            residual=residual,
            activation=project.activation,
            negative_slope=project.negative_slope,
        )
        for layer in self.after:
            y = layer(y)
        return y

    def _constant(self, ready: _Ready, input: Tensor) -> Tensor:
        """The pooled branch's part of the projection: [N, C_out, 1, 1], or of the image's size.

        A projection of more than one tap meets padding at the edges, where it adds less.
        """
        pooled = input.mean((2, 3), dtype=ready.pool_weight.dtype)
        z = torch.addmm(ready.pool_shift, pooled, ready.pool_weight.t())
        z = ACTIVATIONS[self.pool.activation](z, self.pool.negative_slope)
        weight = ready.constant_weight
        if weight.shape[2:] == (1, 1):
            return (z @ weight.flatten(1).t())[:, :, None, None]
        # Rows (columns) at the same distance from an edge are alike, and so are all those inside.
        reach = [size // 2 for size in weight.shape[2:]]
        sizes = [min(n, 2 * r + 1) for n, r in zip(input.shape[2:], reach, strict=True)]
        result = nn.functional.conv2d(z[:, :, None, None].expand(-1, -1, *sizes), weight, padding=reach)
        for axis, (n, r) in enumerate(zip(input.shape[2:], reach, strict=True), 2):
            if n <= 2 * r + 1:
                continue
            index = torch.arange(n, device=input.device)
            alike = index.clamp(max=r) + (index - (n - 1 - r)).clamp(min=0)
            result = result.index_select(axis, alike)
        return result

    def _ready(self, folds: bool) -> _Ready:
        first = self.branches[0]
        together = all(
            [isinstance(fused, FusedConv) and _ending(fused) == _ending(first) for fused in self.branches]
        )
        branches = [_folded(fused, folds) for fused in self.branches] if together else []
        scales = [scale for _, scale, _ in branches if scale is not None]
        pool_weight, _, pool_shift = _folded(self.pool, True)
        project_weight, project_scale, project_shift = _folded(self.project, folds)
        start, end = self._columns()
        kept = project_weight[:, end:] if self.pool_first else project_weight[:, :start]
        scaled, *_ = _folded(self.project, True)
        return _Ready(
            tuple([weight for weight, *_ in branches]),
            torch.cat(scales) if scales else None,
            torch.cat([shift for *_, shift in branches]) if branches else None,
            pool_weight.flatten(1),
            pool_shift.to(pool_weight.dtype),
            scaled[:, start:end].contiguous(),
            (kept.contiguous(memory_format=_format(project_weight)), project_scale, project_shift),
        )

    def _columns(self) -> tuple[int, int]:
        """The slice of the projection's input channels that is the pooled branch's."""
        all_of_them, pooled = self.project.conv.in_channels, self.pool.conv.out_channels
        return (0, pooled) if self.pool_first else (all_of_them - pooled, all_of_them)

    def fused_layers(self) -> list[FusedLayer]:
        """All that has parameters."""
        return [*self.branches, self.pool, self.project]

    def _norms(self) -> list[Any]:
        return [norm for fused in self.fused_layers() for norm in _norms(fused) if norm is not None]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = []
        for fused in self.fused_layers():
            for conv in _convs(fused):
                found += (conv.weight, conv.bias)
        for norm in self._norms():
            found += norm_tensors(norm)
        return tuple(found)


def _convs(fused: FusedLayer) -> list[Any]:
    if isinstance(fused, FusedConv):
        return [fused.conv]
    return [conv for conv in (fused.depthwise, fused.pointwise) if conv is not None]


def _norms(fused: FusedLayer) -> list[Any]:
    return [fused.norm] if isinstance(fused, FusedConv) else [fused.norm, fused.pointwise_norm]


def _ending(fused: FusedLayer) -> tuple[Any, ...]:
    return fused.activation, fused.negative_slope if fused.activation == "leaky_relu" else None


def _geometry(fused: FusedLayer) -> Any:
    """The convolution of a branch that has a geometry."""
    return fused.conv if isinstance(fused, FusedConv) else fused.depthwise


def _folded(fused: Any, folds: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The layer's filter, scale and shift; bias and norm in the shift, the scale in the filter if it `folds`.

    A folded filter is float32 at least.
    """
    weight, bias = fused.conv.weight, fused.conv.bias
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale, shift = folded(fused.norm)
    if scale is None or shift is None:
        scale = torch.ones(weight.shape[0], dtype=dtype, device=weight.device)
        shift = torch.zeros_like(scale)
    if bias is not None:
        shift = shift + scale * bias.to(scale.dtype)
    if folds:
        return weight.to(dtype) * scale.to(dtype)[:, None, None, None], None, shift.to(dtype)
    return weight, scale, shift


def _format(weight: Tensor) -> torch.memory_format:
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


class _Reading:
    """An ASPP that was found in some modules, and what of them it depends on."""

    def __init__(self, roots: Sequence[nn.Module], aspp: FusedASPP):
        self.roots, self.aspp = list(roots), aspp
        self.modules = [module for root in roots for module in root.modules()]
        self.state = self._state()

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        return (
            self.roots == roots
            and self._state() == self.state
            and all([only_forward(module) for module in self.modules])
        )

    def _state(self) -> list[Any]:
        found: list[Any] = [(type(m), *m._modules.values()) for m in self.modules]
        for fused in self.aspp.fused_layers():
            conv = _geometry(fused)
            found.append((conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode))
        return found


# Beside the modules, not in them, as what norms fold into is.
_readings: "weakref.WeakKeyDictionary[nn.Module, _Reading]" = weakref.WeakKeyDictionary()


def aspp_in(
    owner: nn.Module,
    branches: Sequence[nn.Module],
    pool: nn.Module,
    project: nn.Module,
    *,
    pool_first: bool = False,
) -> FusedASPP | None:
    """The ASPP that these modules of `owner` are the parts of, or None where one is something else.

    `pool`, called by whoever knows its forward, holds the mean over the image and what follows it.
    """
    if torch.compiler.is_compiling():
        return _read(branches, pool, project, pool_first)
    roots = [*branches, pool, project]
    reading = _readings.get(owner)
    if reading is not None and reading.holds(roots):
        return reading.aspp
    aspp = _read(branches, pool, project, pool_first)
    if aspp is not None:
        _readings[owner] = _Reading(roots, aspp)
    return aspp


def _read(
    branches: Sequence[nn.Module], pool: nn.Module, project: nn.Module, pool_first: bool
) -> FusedASPP | None:
    if not (only_forward(pool) and only_forward(project)):
        return None
    fused_layers = [fused_layer(list(leaves(branch))) for branch in branches]
    means: Any = [leaf for child in pool.children() for leaf in leaves(child)]
    mean, *pooled = means or [None]
    projected = list(leaves(project))
    after: list[nn.Module] = []
    while projected and own_class(projected[-1]) in _DROPOUTS:
        after.insert(0, projected.pop())
    fused_pool, fused_project = fused_layer(pooled), fused_layer(projected)
    if not (
        own_class(mean) is nn.AdaptiveAvgPool2d
        and mean.output_size in (1, (1, 1))
        and only_forward(mean)
        and isinstance(fused_pool, FusedConv)
        and isinstance(fused_project, FusedConv)
        and fused_pool.conv.kernel_size == (1, 1)
        and fused_project.conv.dilation == (1, 1)
        and fused_layers
        and all(
            [fused is not None and _keeps_size(fused) for fused in (*fused_layers, fused_pool, fused_project)]
        )
    ):
        return None
    found: Any = tuple(fused_layers)
    channels = sum([_convs(fused)[-1].out_channels for fused in found]) + fused_pool.conv.out_channels
    if channels != fused_project.conv.in_channels:
        return None
    return FusedASPP(found, fused_pool, fused_project, tuple(after), pool_first)


def _keeps_size(fused: FusedLayer) -> bool:
    """True if the layer is not transposed and its result, zeros around the image, has the image's size."""
    conv = _geometry(fused)
    if conv.transposed or conv.padding_mode != "zeros" or (isinstance(fused, FusedConv) and conv.groups != 1):
        return False
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    padding = conv.padding if isinstance(conv.padding, str) else pair(conv.padding, "padding")
    odd = all([k % 2 for k in conv.kernel_size])
    return odd and conv.stride == (1, 1) and padding in ("same", (total[0] // 2, total[1] // 2))


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that `module` calls in a row: a Sequential's, a ConvModule's (mmcv), or itself."""
    forward = getattr(own_class(module), "forward", None)
    sequential = forward in (nn.Sequential.forward, ConvBNAct.forward)
    if (sequential or _is_conv_module(module)) and only_forward(module):
        for child in module.children():
            yield from leaves(child)
    else:
        yield module


def _is_conv_module(module: Any) -> bool:
    """mmcv's convolution, norm and activation, in this order, which is also that of its children."""
    return (
        own_class(module).__name__ == "ConvModule"
        and getattr(module, "order", None) == ("conv", "norm", "act")
        and not getattr(module, "with_explicit_padding", True)
    )
