"""Tensors of any strides: results in torch's memory formats, and the same numbers as of dense ones."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast import functional as sf
from tests.fused_conv import BACKENDS, draw

from .families import ON_ANY_CPU, on, over
from .test_gradients import assert_near, leaves_of


def layouts(*shape):
    """The same size in every memory format there is, ambiguous ones included."""
    base = draw(*shape)
    yield "contiguous", base
    yield "channels_last", base.contiguous(memory_format=torch.channels_last)
    yield "permuted", base.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    yield "transposed", base.transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.cat([base, base], 1).contiguous(memory_format=torch.channels_last)
    yield "slice of channels_last", wide[:, : shape[1]]
    yield "every other column", base.repeat_interleave(2, 3)[..., ::2]
    yield "expanded", base[:1, :1].expand(shape)


def _depthwise(x, weight, pads):
    return F.conv2d(x, weight, padding=pads, groups=x.shape[1])


def _separable(x, weight, pointwise):
    return F.conv2d(_depthwise(x, weight, 1), pointwise)


# Ours, torch's, and weights for a number of channels that come in.
FORMATS = {
    "conv2d": (
        lambda x, w: sf.conv2d(x, w, padding=1),
        lambda x, w: F.conv2d(x, w, padding=1),
        lambda c: [[(3, c, 2, 2)], [(1, c, 3, 3)], [(3, c, 1, 1)]],
    ),
    "conv_transpose2d": (
        lambda x, w: sf.conv_transpose2d(x, w, stride=2),
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        lambda c: [[(c, 3, 2, 2)], [(c, 1, 2, 2)], [(c, 3, 1, 1)]],
    ),
    "depthwise_conv2d": (
        lambda x, w: sf.depthwise_conv2d(x, w, padding=w.shape[2] // 2),
        lambda x, w: _depthwise(x, w, w.shape[2] // 2),
        lambda c: [[(c, 1, 3, 3)], [(2 * c, 1, 3, 3)], [(c, 1, 1, 1)], [(c, 1, 5, 5)]],
    ),
    "depthwise_conv2d with statistics": (
        lambda x, w: sf.depthwise_conv2d(x, w, padding=1, scale=draw(w.shape[0]), return_statistics=True)[0],
        lambda x, w: _depthwise(x, w, 1) * draw(w.shape[0])[:, None, None],
        lambda c: [[(c, 1, 3, 3)]],
    ),
    "separable_conv2d": (
        lambda x, w, p: sf.separable_conv2d(x, w, p, padding=1),
        _separable,
        lambda c: [[(c, 1, 3, 3), (3, c, 1, 1)], [(c, 1, 3, 3), (1, c, 1, 1)]],
    ),
}
SHAPES = [(2, 4, 3, 5), (1, 4, 3, 3), (2, 1, 3, 4), (2, 4, 1, 1), (1, 1, 1, 1), (1, 4, 1, 5), (3, 2, 2, 1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FORMATS)
def test_memory_formats_are_torchs(function, shape, backend):
    ours, torchs, weights_of = FORMATS[function]
    # The kernels' results are recorded, not computed: their values are the affair of the tests below.
    quick = segfast.kernels.record_launches if backend == "triton" else contextlib.nullcontext
    for sizes, last in itertools.product(weights_of(shape[1]), (False, True)):
        weights = [draw(*size, channels_last=last) for size in sizes]
        for layout, x in layouts(*shape):
            what = f"{layout} input, weights {sizes}, channels_last: {last}"
            expected = torchs(x, *weights)
            with segfast.backend(backend), quick():
                actual = ours(x, *weights)
            assert actual.stride() == expected.stride(), what
            assert backend == "triton" or torch.allclose(actual, expected, atol=1e-5), what


def view(form: str, shape) -> torch.Tensor:
    """Numbers in these strides, of a vector's a part that has some."""
    if len(shape) < 4:
        size = shape[0] if shape else 1
        stretched = draw(1).expand(size) if form.startswith("expanded") else draw(2 * size)[::2]
        return stretched if len(shape) == 1 else draw(*shape)
    n, c, h, w = shape
    return {
        "rows apart": lambda: draw(n, c, 2 * h, w, channels_last=True)[:, :, ::2],
        "columns apart": lambda: draw(n, c, h, 3 * w, channels_last=True)[..., ::3],
        "batch apart": lambda: draw(2 * n, c, h, w, channels_last=True)[1::2],
        "channel slice": lambda: draw(n, 2 * c, h, w, channels_last=True)[:, c:],
        "every other channel": lambda: draw(n, 2 * c, h, w, channels_last=True)[:, ::2],
        "spatial slice": lambda: draw(n, c, h + 3, w + 2, channels_last=True)[:, :, 1 : h + 1, 2:],
        "expanded": lambda: draw(1, 1, 1, 1).expand(n, c, h, w),
        "expanded images": lambda: draw(1, c, h, w, channels_last=True).expand(n, c, h, w),
        "expanded pixels": lambda: draw(n, c, 1, 1).expand(n, c, h, w),
        "nchw": lambda: draw(n, 2 * c, h, w)[:, ::2],
        "transposed": lambda: draw(n, c, w, h, channels_last=True).transpose(2, 3),
    }[form]()


VIEWS = [
    *("rows apart", "columns apart", "batch apart", "channel slice", "every other channel", "spatial slice"),
    *("expanded", "expanded images", "expanded pixels", "nchw", "transposed"),
]


def check_view(example, form, route):
    """Every operand, and the gradient that comes in, in the strides of `form`."""
    tensors = {name: view(form, shape) for name, shape in example.shapes(4).items()}
    if form not in ("nchw", "expanded", "spatial slice"):
        # Without vectors, with which it would be multiplied, the gradient comes to the kernels as it is.
        tensors = {n: t for n, t in tensors.items() if n in example.least(tensors) or n == "residual"}
    found = []
    for run, dtype, way in ((example.reference, torch.float64, "aten"), (example.run, torch.float32, route)):
        # Leaves that are views themselves: a clone would be dense.
        leaves = {n: t.detach().to(dtype, copy=dtype == torch.float64).detach() for n, t in tensors.items()}
        leaves = {n: t.requires_grad_() for n, t in leaves.items()}
        with on(way, example):
            y = run(leaves)[0]
            g = view(form, y.shape).to(dtype)
            gradients = torch.autograd.grad(y, list(leaves.values()), g) if example.differentiates else ()
        found.append({"output": y.detach()} | dict(zip(leaves, gradients, strict=bool(gradients))))
    assert_near(found[1], found[0], 2 * example.error, form)


@pytest.mark.parametrize("route", ON_ANY_CPU)
@over(lambda example: example.name != "upsample_argmax")
def test_operands_and_gradients_of_any_strides(example, route):
    for form in VIEWS:
        # Points in one place have no features to learn from.
        if example.family != "dense_crf" or not form.startswith("expanded"):
            check_view(example, form, route)


@pytest.mark.interpreter
@pytest.mark.parametrize("form", VIEWS)
@over(lambda example: example.family != "dense_crf" and example.name != "upsample_argmax")
def test_operands_and_gradients_of_any_strides_on_the_kernels(
    example, form, poisoned_empty, checked_hints, checked_launches
):
    check_view(example, form, "triton")


@pytest.mark.parametrize("route", ["registered", pytest.param("triton", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@over(lambda example: bool(example.activations))
def test_a_weights_gradient_has_the_weights_strides(example, channels_last, route):
    # What AccumulateGrad keeps and DDP expects of a gradient.
    leaves = leaves_of(example.least(example.tensors(channels_last=channels_last)))
    quick = segfast.kernels.record_launches if route == "triton" else contextlib.nullcontext
    with on(route, example), quick():
        gradients = torch.autograd.grad(example.run(leaves)[0].sum(), list(leaves.values()))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert name in example.batched or gradient.stride() == leaf.stride(), name
