"""One small call of every public function, of every family: what the tests of this folder are run on.

A new function is added here, with its definition by torch's own functions; then every test beside this file
holds for it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segfast
from segfast import functional as sf
from segfast.ops import _backend
from segfast.ops.packed_pool2d import formulas
from tests.conv2d.reference import conv2d_of_images, define_of_images, define_parallel, parallel_of_named
from tests.fused_conv import REFERENCE_ACTIVATIONS, draw, fused
from tests.segmentation_head import reference as reference_module
from tests.separable_conv2d.reference import define_separable, plain_depthwise

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Example:
    """A call of a public function.

    Args:
        name: what tests are called by.
        family: of `segfast.ops.FAMILIES`.
        ours: the function, its tensors by keyword.
        define: the same by torch's own functions, of any dtype; may be `ours`, which on ATen in float64 is
            then held to be right by tests of its own.
        shapes: the differentiable operands' by their names, for a number of channels that come out; images
            and weights before what may be left out.
        options: keyword arguments that are no tensors.
        required: how many operands come first that may not be left out.
        batched: operands whose dimension 0 is the batch.
        flops: floating-point operations of a call of all operands, counted by hand.
        activations: keyword arguments that take an activation.
        differentiates: False where the results have no gradients.
        others: options to leave the residual out and give instead of `options`.
        error: what the kernels' results may be off by, of the largest.
    """

    name: str
    family: str
    ours: Callable[..., Any]
    define: Callable[..., Any]
    shapes: Callable[[int], Shapes]
    options: Mapping[str, Any] = field(default_factory=dict)
    required: int = 2
    batched: tuple[str, ...] = ("input", "residual")
    flops: int = 0
    activations: tuple[str, ...] = ("activation",)
    differentiates: bool = True
    others: tuple[Mapping[str, Any], ...] = ()
    error: float = 1e-5

    def __str__(self) -> str:
        return self.name

    def tensors(
        self,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        channels: int = 4,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """All operands."""
        return {
            name: draw(*shape, dtype=dtype, seed=seed + i, channels_last=channels_last and len(shape) == 4)
            for i, (name, shape) in enumerate(self.shapes(channels).items())
        }

    def least(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of these operands those that may not be left out."""
        return dict(list(tensors.items())[: self.required])

    def run(self, tensors: Mapping[str, Tensor], activation: str | None = None) -> tuple[Tensor, ...]:
        """Our results."""
        slope = {"negative_slope": 0.2} if activation == "leaky_relu" else {}
        return _tuple(self.ours(**tensors, **self.options, **self._activated(activation), **slope))

    def reference(self, tensors: Mapping[str, Tensor], activation: str | None = None) -> tuple[Tensor, ...]:
        """The definition's results."""
        return _tuple(self.define(**tensors, **self.options, **self._activated(activation)))

    def _activated(self, activation: str | None) -> dict[str, str]:
        return {} if activation is None else dict.fromkeys(self.activations, activation)


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def with_hardsigmoid(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(tensors, activation)` with torch's hardsigmoid replaced: that has no second derivative."""

    def clamped(tensors, activation):
        before = REFERENCE_ACTIVATIONS["hardsigmoid"]
        REFERENCE_ACTIVATIONS["hardsigmoid"] = lambda z: (z + 3).clamp(0, 6) / 6
        try:
            return run(tensors, activation)
        finally:
            REFERENCE_ACTIVATIONS["hardsigmoid"] = before

    return clamped


def define_up_concat(x, skip, weight, bias=None, stride=2, padding=0, activation=None) -> Tensor:
    """By torch's own layers: grow up to the skip by less than a stride, else crop the skip's center."""
    layer = torch.nn.ConvTranspose2d(*weight.shape[:2], weight.shape[2:], stride, padding, device="meta")
    strides = layer.stride
    smallest = F.conv_transpose2d(x, weight, None, stride, padding).shape[2:]
    size = [
        have if have - up < s else up for up, have, s in zip(smallest, skip.shape[2:], strides, strict=True)
    ]
    extra = layer._output_padding(x, size, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation)
    up = REFERENCE_ACTIVATIONS[activation](F.conv_transpose2d(x, weight, bias, stride, padding, extra))
    top, left = ((have - want) // 2 for have, want in zip(skip.shape[2:], size, strict=True))
    return torch.cat([skip[:, :, top : top + size[0], left : left + size[1]], up], 1)


def define_statistics(*args, **options) -> tuple[Tensor, Tensor, Tensor]:
    """A depthwise convolution with the sums of its results and of their squares."""
    y = fused(plain_depthwise)(*args, **options)
    return y, y.sum((2, 3)), y.square().sum((2, 3))


def define_filter(values, features, normalization=None) -> Tensor:
    """Gaussian filtering of all pairs of points."""
    points, coordinates = values.flatten(2), features.flatten(2).transpose(1, 2)
    kernel = torch.exp(-0.5 * (coordinates[:, :, None] - coordinates[:, None]).square().sum(-1))
    norm = kernel.sum(2).rsqrt() if normalization == "symmetric" else torch.ones_like(kernel[:, 0])
    return (norm[:, None] * ((norm[:, None] * points) @ kernel)).reshape(values.shape)


_EPILOGUE = ("bias", "scale", "shift")
_GEOMETRIES = ({}, {"stride": 2, "padding": 1}, {"padding": 2}, {"padding": 2, "dilation": (2, 1)})


def _vectors(channels: int, names: tuple[str, ...] = _EPILOGUE) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (channels,))


def _statistics(**tensors_and_options):
    return sf.depthwise_conv2d(**tensors_and_options, return_statistics=True)


def _pooled(input, **options):
    return sf.packed_max_pool2d(input, **options)[0]


def _define_pooled(input, ceil_mode):
    return F.max_pool2d(input, 2, ceil_mode=ceil_mode)


def _places(input) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The places in windows of an image of some odd size, as torch has them and as we do; and the size."""
    size = 2 * input.shape[2] - 1, 2 * input.shape[3]
    image = torch.zeros(*input.shape[:2], *size)
    image[:, 1::2, ::2, 1::2] = 1
    image[:, ::2, 1::4] = 1
    torchs = F.max_pool2d(image, 2, ceil_mode=True, return_indices=True)[1]
    return torchs, formulas.pool(image, True)[1], size


def _unpooled(input):
    _, places, size = _places(input)
    return sf.packed_max_unpool2d(input, places, size)


def _define_unpooled(input):
    indices, _, size = _places(input)
    return F.max_unpool2d(input, indices, 2, output_size=size)


_, _TARGET = reference_module.head((2, 3, 3, 4), {"size": (5, 7)})
_LOGITS = {"required": 1, "batched": ("logits",), "activations": ()}


def _entropy(logits, **options):
    return sf.upsample_cross_entropy(logits, _TARGET, ignore_index=reference_module.IGNORED, **options)


def _define_entropy(logits, **options):
    return reference_module.cross_entropy(logits, _TARGET, **options)


def _define_dice(logits, **options):
    return reference_module.dice(logits, _TARGET, **options)


def _dice(logits, **options):
    return sf.upsample_dice(logits, _TARGET, ignore_index=reference_module.IGNORED, **options)


def _labels(logits, **options):
    return sf.upsample_argmax(logits, return_confidence=True, **options)


def _define_labels(logits, **options):
    return reference_module.interpolate(logits, **options).softmax(1).max(1)[::-1]


def _exact(values, features, normalization):
    return sf.gaussian_filter(values, features, method="exact", normalization=normalization, tolerance=0.0)


def _lattice(values, features, normalization):
    return sf.gaussian_filter(values, features, method="lattice", normalization=normalization)


def _learned(unary, image, theta_alpha, theta_beta, theta_gamma, **weights):
    """A mean field of all pairs, with deviations of a size that means something from normal numbers."""
    thetas = {"theta_alpha": 3 + theta_alpha.tanh(), "theta_beta": 50 + 9 * theta_beta}
    thetas["theta_gamma"] = 1.6 + theta_gamma.tanh() / 2
    return sf.mean_field(unary, 40 * image, **thetas, **weights, iterations=2, method="exact", tolerance=0.0)


def _given(unary, image, **weights):
    """A mean field on the lattice, with deviations that are numbers."""
    return sf.mean_field(unary, 40 * image, theta_beta=30.0, **weights, iterations=2, method="lattice")


EXAMPLES = [
    Example(
        "conv2d", "conv2d", sf.conv2d, fused(F.conv2d),
        lambda c: {"input": (2, 3, 3, 4), "weight": (c, 3, 3, 1), **_vectors(c), "residual": (2, c, 3, 4)},
        {"padding": (2, 0), "dilation": 2}, others=_GEOMETRIES,
        flops=2 * (2 * 3 * 4) * 4 * 9,
    ),
    Example(
        "conv2d in groups", "conv2d", sf.conv2d, fused(F.conv2d),
        lambda c: {"input": (2, 4, 4, 4), "weight": (2 * c, 2, 3, 3), **_vectors(2 * c),
                   "residual": (2, 2 * c, 2, 2)},
        {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
        flops=2 * (2 * 2 * 2) * 8 * 18,
    ),
    Example(
        "conv2d of images", "conv2d", conv2d_of_images, define_of_images,
        lambda c: {"input": (2, 2, 5, 4), "input1": (2, 3, 3, 3), "weight": (c, 5, 2, 3), **_vectors(c),
                   "residual": (2, c, 4, 3)},
        {"padding": 1}, required=3, batched=("input", "input1", "residual"), others=_GEOMETRIES,
        flops=2 * (2 * 4 * 3) * 4 * 30,
    ),
    Example(
        "parallel_conv2d", "conv2d", parallel_of_named, define_parallel,
        lambda c: {"input": (2, 2, 3, 4), "weight0": (c, 2, 1, 1), "weight1": (1, 2, 3, 3),
                   "weight2": (2, 2, 1, 3), "scale": (c + 3,), "shift": (c + 3,)},
        {"dilations": (1, 2, 3)}, required=4, batched=("input",),
        others=({"dilations": (1, 3, 2)}, {"dilations": (1, (2, 1), 3)}),
        flops=2 * (2 * 3 * 4) * (4 * 2 + 1 * 18 + 2 * 6),
    ),
    Example(
        "conv_transpose2d", "conv_transpose2d", sf.conv_transpose2d, fused(F.conv_transpose2d),
        lambda c: {"input": (2, 4, 3, 2), "weight": (4, c, 3, 3), **_vectors(c), "residual": (2, c, 6, 4)},
        {"stride": 2, "padding": 1, "output_padding": 1},
        others=({}, {"stride": 2, "padding": 1}, {"padding": 1, "dilation": (2, 1)}),
        flops=2 * (2 * 3 * 2) * 4 * 4 * 9,
    ),
    Example(
        "conv_transpose2d in groups", "conv_transpose2d", sf.conv_transpose2d, fused(F.conv_transpose2d),
        lambda c: {"input": (2, 4, 2, 3), "weight": (4, c, 2, 2), **_vectors(2 * c),
                   "residual": (2, 2 * c, 4, 7)},
        {"stride": 2, "groups": 2, "dilation": (1, 2)},
        flops=2 * (2 * 2 * 3) * 4 * 4 * 4,
    ),
    Example(
        "up_concat", "conv_transpose2d", sf.up_concat, define_up_concat,
        lambda c: {"x": (2, 4, 3, 3), "skip": (2, 3, 7, 11), "weight": (4, c, 2, 2), "bias": (c,)},
        required=3, batched=("x", "skip"), others=({"stride": 1}, {"padding": 1}),
        flops=2 * (2 * 3 * 3) * 4 * 4 * 4,
    ),
    Example(
        "depthwise_conv2d", "separable_conv2d", sf.depthwise_conv2d, fused(plain_depthwise),
        lambda c: {"input": (2, c // 2 or 1, 5, 3), "weight": (c, 1, 3, 2), **_vectors(c)},
        {"stride": (2, 1), "padding": 1}, others=_GEOMETRIES,
        batched=("input",),
        flops=2 * (2 * 3 * 4) * 4 * 6,
    ),
    Example(
        "depthwise_conv2d with statistics", "separable_conv2d", _statistics, define_statistics,
        lambda c: {"input": (2, 2, 4, 4), "weight": (2, 1, 3, 3), **_vectors(2)},
        {"padding": 1, "dilation": (1, 2)},
        batched=("input",),
        flops=2 * (2 * 4 * 2) * 2 * 9,
    ),
    Example(
        "separable_conv2d", "separable_conv2d", sf.separable_conv2d, define_separable,
        lambda c: {"input": (2, 3, 3, 4), "depthwise_weight": (3, 1, 3, 3), "pointwise_weight": (c, 3, 1, 1),
                   **_vectors(3, ("depthwise_bias", "depthwise_scale", "depthwise_shift")), **_vectors(c),
                   "residual": (2, c, 3, 4)},
        {"padding": 1}, required=3, activations=("depthwise_activation", "activation"),
        others=({}, {"padding": 1, "stride": 2}, {"padding": 1, "dilation": 2}),
        flops=2 * (2 * 3 * 4) * 3 * (9 + 4),
    ),
    Example(
        "packed_max_pool2d", "packed_pool2d", _pooled, _define_pooled,
        lambda c: {"input": (2, c, 5, 6)}, {"ceil_mode": True}, required=1, batched=("input",),
        activations=(),
    ),
    Example(
        "packed_max_unpool2d", "packed_pool2d", _unpooled, _define_unpooled,
        lambda c: {"input": (2, c, 3, 4)}, required=1, batched=("input",), activations=(),
    ),
    Example(
        "upsample_cross_entropy", "segmentation_head", _entropy, _define_entropy,
        lambda c: {"logits": (2, 3, 3, 4)}, {"size": (5, 7), "label_smoothing": 0.1}, **_LOGITS,
        flops=8 * 2 * 3 * 5 * 7,
    ),
    Example(
        "upsample_cross_entropy of each pixel", "segmentation_head", _entropy, _define_entropy,
        lambda c: {"logits": (2, 3, 3, 4)}, {"size": (5, 7), "reduction": "none", "mode": "nearest"},
        **_LOGITS,
        flops=8 * 2 * 3 * 5 * 7,
    ),
    Example(
        "upsample_dice", "segmentation_head", _dice, _define_dice,
        lambda c: {"logits": (2, 3, 3, 4)}, {"size": (5, 7), "align_corners": True}, **_LOGITS,
        flops=8 * 2 * 3 * 5 * 7,
    ),
    Example(
        "upsample_argmax", "segmentation_head", _labels, _define_labels,
        lambda c: {"logits": (2, 3, 3, 4)}, {"size": (5, 7)}, **_LOGITS, differentiates=False,
        flops=8 * 2 * 3 * 5 * 7,
    ),
    Example(
        "gaussian_filter of all pairs", "dense_crf", _exact, define_filter,
        lambda c: {"values": (2, 2, 3, 3), "features": (2, 3, 3, 3)}, {"normalization": "symmetric"},
        batched=("values", "features"), activations=(), error=2e-3,
        flops=2 * 9**2 * (2 * (2 + 1) + 2 * 3 + 4),
    ),
    Example(
        "gaussian_filter on the lattice", "dense_crf", _lattice, _lattice,
        lambda c: {"values": (2, 2, 3, 3), "features": (2, 3, 3, 3)}, {"normalization": "symmetric"},
        batched=("values", "features"), activations=(),
        flops=2 * 9 * 4 * (3 + 1) * (2 + 1),
    ),
    Example(
        "mean_field of all pairs", "dense_crf", _learned, _learned,
        lambda c: {"unary": (2, 3, 3, 4), "image": (2, 2, 3, 4), "theta_alpha": (2,), "theta_beta": (2,),
                   "theta_gamma": (), "bilateral_weight": (3, 3), "spatial_weight": (3,),
                   "compatibility": (3, 3)},
        required=5, batched=("unary", "image"), activations=(), error=2e-3,
    ),
    Example(
        "mean_field on the lattice", "dense_crf", _given, _given,
        lambda c: {"unary": (2, 3, 3, 4), "image": (2, 3, 3, 4), "bilateral_weight": (3, 3),
                   "spatial_weight": (3,)},
        batched=("unary", "image"), activations=(), error=2e-3,
    ),
]  # fmt: skip


def over(where: Callable[[Example], bool] = lambda example: True) -> pytest.MarkDecorator:
    """Parametrizes a test by `example`."""
    return pytest.mark.parametrize("example", list(filter(where, EXAMPLES)), ids=str)


# The ways a call can take: ATen's functions; our registered operators, computed by their definitions; and our
# kernels, which are "triton", in the interpreter's session.
ON_ANY_CPU = ["aten", "registered"]
ROUTES = [*ON_ANY_CPU, pytest.param("triton", marks=pytest.mark.interpreter)]


@contextlib.contextmanager
def on(route: str, example: Example) -> Iterator[None]:
    """Within it a call of `example` on a CPU takes this route.

    "registered" serves gradients of our own in float64, and costs none of the interpreter's time.
    """
    with pytest.MonkeyPatch.context() as patch:
        if route == "registered" and example.family == "dense_crf":
            patch.setattr("segfast.ops.dense_crf.functional._as_operator", lambda tensor: True)
            route = "aten"
        elif route == "registered":
            patch.setattr(_backend, "_INTERPRETING", True)
            patch.setattr(_backend, "_KERNEL_DTYPES", (*_backend._KERNEL_DTYPES, torch.float64))
            route = "triton"
        with segfast.backend(route):
            yield
