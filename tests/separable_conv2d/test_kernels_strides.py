"""The depthwise and separable kernels on any strides: values, promises of alignment, wide offsets."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from tests.fused_conv import draw
from tests.separable_conv2d.reference import (
    check_depthwise,
    define_separable,
    depthwise_operands,
    in_form,
    plain_depthwise,
    separable_operands,
)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned_empty", "checked_launches", "small_tiles"),
]


@pytest.mark.parametrize("channels", [16, 12])
@pytest.mark.parametrize(
    ("multiplier", "geometry"),
    [
        (1, {"padding": 1}),
        (1, {"stride": 2, "padding": 1}),
        (1, {"stride": 2, "padding": 2, "dilation": 2}),
        (2, {"padding": 1}),
    ],
    ids=["k3", "k3 s2", "k3 s2 d2", "two filters"],
)
def test_alignment_is_promised_and_kept(channels, multiplier, geometry, checked_hints):
    # Half precision, as the widest accesses have the most to promise: 16 bytes are 8 channels.
    tensors = depthwise_operands((2, channels, 3, 2), multiplier, dtype=torch.float16)
    check_depthwise(tensors, **geometry)
    assert checked_hints and max(checked_hints) >= math.gcd(channels, 8)


@pytest.mark.parametrize(
    ("form", "channels"),
    [("fused", (16, 24)), ("two kernels", (24, 16)), ("fused", (21, 20)), ("two kernels", (12, 20))],
)
def test_alignment_of_the_separable_kernels(form, channels, checked_hints):
    shapes = {"residual_shape": (2, channels[1], 3, 2), "dtype": torch.float16}
    tensors = separable_operands((2, channels[0], 3, 2), channels[1], **shapes)
    with in_form(form), segfast.backend("triton"):
        y = separable_conv2d(**tensors, padding=1)
    wide = define_separable(**{name: t.double() for name, t in tensors.items()}, padding=1)
    assert (y.double() - wide).abs().max() <= 2**-9 * wide.abs().max()
    assert checked_hints and max(checked_hints) >= math.gcd(*channels, 8)


def _view(form: str, shape: tuple[int, int, int, int]) -> torch.Tensor:
    n, c, h, w = shape
    last = {"dtype": torch.float32, "channels_last": True}
    return {
        "rows apart": lambda: draw(n, c, 2 * h, w, **last)[:, :, ::2],
        "columns apart": lambda: draw(n, c, h, 3 * w, **last)[..., ::3],
        "batch apart": lambda: draw(2 * n, c, h, w, **last)[1::2],
        "channel slice": lambda: draw(n, 2 * c, h, w, **last)[:, c:],
        "every other channel": lambda: draw(n, 2 * c, h, w, **last)[:, ::2],
        "spatial slice": lambda: draw(n, c, h + 3, w + 2, **last)[:, :, 1 : h + 1, 2:],
        "expanded": lambda: draw(1, 1, 1, 1).expand(n, c, h, w),
        "expanded images": lambda: draw(1, c, h, w, **last).expand(n, c, h, w),
        "expanded pixels": lambda: draw(n, c, 1, 1).expand(n, c, h, w),
        "nchw": lambda: draw(n, 2 * c, h, w)[:, ::2],
        "transposed": lambda: draw(n, c, w, h, **last).transpose(2, 3),
    }[form]()


VIEWS = [
    *("rows apart", "columns apart", "batch apart", "channel slice", "every other channel", "spatial slice"),
    *("expanded", "expanded images", "expanded pixels", "nchw", "transposed"),
]


# Of the kernels that go tap by tap, those that differ: pixels apart, no channel stride of 1, strides of zero.
@pytest.mark.parametrize(
    ("multiplier", "form"),
    [*[(1, form) for form in VIEWS], *[(2, form) for form in ("columns apart", "nchw", "expanded pixels")]],
)
def test_inputs_and_gradients_of_any_strides(multiplier, form, checked_hints):
    x, g = _view(form, (2, 6, 3, 2)), _view(form, (2, 6 * multiplier, 3, 2))
    weight = draw(6 * multiplier, 1, 3, 3)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    expected = plain_depthwise(*leaves, padding=1)
    expected_grads = torch.autograd.grad(expected, leaves, g)
    x.requires_grad_(), weight.requires_grad_()
    with segfast.backend("triton"):
        actual = depthwise_conv2d(x, weight, padding=1)
        grads = torch.autograd.grad(actual, (x, weight), g)
    for result, reference in zip((actual, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(result, reference, atol=2e-5, rtol=2e-5)


@pytest.mark.compat
@pytest.mark.parametrize("form", ["fused", "two kernels"])
@pytest.mark.parametrize("view", VIEWS)
def test_separable_inputs_and_residuals_of_any_strides(view, form, checked_hints):
    x, residual = _view(view, (2, 6, 4, 3)), _view(view, (2, 5, 4, 3))
    depthwise, pointwise = draw(6, 1, 3, 3), draw(5, 6, 1, 1)
    with in_form(form), segfast.backend("triton"):
        y = separable_conv2d(x, depthwise, pointwise, padding=1, residual=residual)
    expected = F.conv2d(plain_depthwise(x, depthwise, padding=1), pointwise) + residual
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=2e-5)


WEIGHTS = {
    "contiguous": lambda c, kh, kw: draw(c, 1, kh, kw),
    "channels_last": lambda c, kh, kw: draw(c, 1, kh, kw, channels_last=True),
    "taps-major": lambda c, kh, kw: draw(kh, kw, 1, c).permute(3, 2, 0, 1),
    "taps-major, kernel turned": lambda c, kh, kw: draw(kw, kh, 1, c).permute(3, 2, 1, 0),
    "taps-major slice": lambda c, kh, kw: draw(kh, kw, 1, 2 * c).permute(3, 2, 0, 1)[c:],
    "taps apart": lambda c, kh, kw: draw(kh, 2 * kw, 1, c).permute(3, 2, 0, 1)[..., ::2],
    "expanded filters": lambda c, kh, kw: draw(1, 1, kh, kw).expand(c, 1, kh, kw),
    "expanded taps": lambda c, kh, kw: draw(c, 1, 1, 1).expand(c, 1, kh, kw),
    "taps-major, expanded taps": lambda c, kh, kw: draw(c).as_strided((c, 1, kh, kw), (1, 7, 0, 0)),
    "slice": lambda c, kh, kw: draw(2 * c, 1, kh + 1, kw + 2)[::2, :, 1:, 1:-1],
    "transposed": lambda c, kh, kw: draw(c, 1, kw, kh).transpose(2, 3),
    "flipped": lambda c, kh, kw: draw(c, 1, kh, kw).flip(2, 3),
}


@pytest.mark.parametrize(
    ("multiplier", "layout"),
    [
        *[(1, w) for w in WEIGHTS],
        *[(2, w) for w in ("taps apart", "taps-major, kernel turned", "expanded taps")],
    ],
)
def test_weights_of_any_strides(multiplier, layout, checked_hints):
    x, weight = draw(1, 6, 4, 5), WEIGHTS[layout](6 * multiplier, 3, 2)
    g = draw(1, 6 * multiplier, 2, 4)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = plain_depthwise(*leaves)
    expected_grads = torch.autograd.grad(expected, leaves, g)
    weight = weight.detach().requires_grad_()
    x.requires_grad_()
    with segfast.backend("triton"):
        actual = depthwise_conv2d(x, weight)
        grads = torch.autograd.grad(actual, (x, weight), g)
        pointwise = draw(3, 6 * multiplier, 1, 1)
        for form in ("fused", "two kernels"):
            with in_form(form), torch.no_grad():
                y = separable_conv2d(x, weight, pointwise)
            torch.testing.assert_close(y, F.conv2d(expected, pointwise), atol=2e-5, rtol=2e-5)
    for result, reference in zip((actual, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(result, reference, atol=2e-5, rtol=2e-5)
    # In the weight's own strides, where it fills memory: what AccumulateGrad and DDP expect.
    assert grads[1].stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize(
    "layout",
    [
        lambda w: w,
        lambda w: w.contiguous(memory_format=torch.channels_last),
        lambda w: w.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
        lambda w: w[:1].expand(w.shape),
    ],
    ids=["contiguous", "channels_last", "transposed", "slice", "expanded"],
)
@pytest.mark.parametrize("form", ["fused", "two kernels"])
def test_pointwise_weights_of_any_strides(form, layout):
    x, depthwise, pointwise = draw(1, 6, 3, 4), draw(6, 1, 3, 3), layout(draw(5, 6, 1, 1))
    leaves = [t.clone().requires_grad_() for t in (x, depthwise, pointwise)]
    expected = F.conv2d(plain_depthwise(*leaves[:2], padding=1), leaves[2])
    ours = [t.detach().requires_grad_() for t in (x, depthwise, pointwise)]
    with in_form(form), segfast.backend("triton"):
        actual = separable_conv2d(*ours, padding=1)
        grads = torch.autograd.grad(actual.square().sum(), ours)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_vectors_may_be_strided():
    tensors = separable_operands((1, 4, 3, 3), 6)
    strided = {n: torch.stack([t, t], 1)[:, 0] if t.dim() == 1 else t for n, t in tensors.items()}
    same = {n: t[:1].expand(t.shape) if t.dim() == 1 else t for n, t in tensors.items()}
    with segfast.backend("triton"):
        assert torch.equal(separable_conv2d(**strided), separable_conv2d(**tensors))
        torch.testing.assert_close(
            separable_conv2d(**same), separable_conv2d(**{n: t.contiguous() for n, t in same.items()})
        )


# In a process of its own, where an offset that wraps kills nothing else. Linux gives memory only for pages
# that are touched, so that these tensors of 4 to 7 GB cost a few kilobytes.
_FAR_APART = textwrap.dedent("""
    import sys
    import torch
    import torch.nn.functional as F
    from segfast import kernels

    axis = int(sys.argv[1])

    def far_apart(dense):
        # The same values, neighbours along `axis` so far apart that the last begins past 2**31.
        n, c, h, w = dense.shape
        strides = [h * w * c, 1, w * c, c]
        strides[axis] = 2**31 // max(dense.shape[axis] - 1, 1) + 64
        numel = 1 + sum((size - 1) * step for size, step in zip(dense.shape, strides))
        return torch.empty(numel, dtype=dense.dtype).as_strided(dense.shape, strides).copy_(dense)

    def blank(like):
        return torch.full(like.shape, torch.nan, dtype=like.dtype).to(memory_format=torch.channels_last)

    def same(launch, inputs, like, spread=True):
        near = blank(like)
        far = far_apart(blank(like)) if spread else blank(like)
        launch(*inputs, near)
        launch(*[far_apart(t) for t in inputs], far)
        assert not near.isnan().any() and torch.equal(near, far), launch
        return near

    tile = kernels.Tile(4, 4, 4, 1, 1, 2)
    for operation in kernels._tiles.operations():
        if operation.startswith("depthwise"):
            kernels.override_tile(operation, tile).__enter__()

    def run(multiplier, stride):
        geometry = ((stride, stride), (1, 1), (1, 1))
        torch.manual_seed(0)
        last = {"memory_format": torch.channels_last}
        x = torch.randn(2, 2, 3, 3).half().contiguous(**last)
        w = torch.randn(3, 3, 1, 2 * multiplier).half().permute(3, 2, 0, 1)
        y = F.conv2d(x.double(), w.double(), None, *geometry, 2).half()
        g = torch.randn(y.shape).half().contiguous(**last)
        p = torch.randn(3, 2 * multiplier, 1, 1).half()
        z = F.conv2d(y.double(), p.double()).half()

        def forward(x, out):
            kernels.depthwise_conv2d_forward(x, w, None, None, None, out, None, *geometry, None, 0.0)

        def grad_input(g, out):
            kernels.depthwise_conv2d_grad_input(g, w, out, *geometry)

        def grad_weight(x, g, out):
            kernels.depthwise_conv2d_grad_weight(x, g, out, *geometry)

        def separable(x, residual, out):
            kernels.separable_conv2d_forward(
                x, w, None, None, None, p, None, None, None, residual, out, *geometry, None, None, 0.0
            )

        assert torch.allclose(same(forward, (x,), y), y, atol=1e-2)
        same(grad_input, (g,), x)
        same(grad_weight, (x, g), w, spread=False)
        residual = torch.zeros_like(z).contiguous(**last)
        for form in ("fused", "two kernels"):
            tile = kernels.Tile(16, 16, 16, 4, 1, form=form)
            with kernels.override_tile("separable_conv2d_forward", tile):
                assert torch.allclose(same(separable, (x, residual), z), z, atol=2e-2)

    for multiplier, stride in ((1, 1), (1, 2), (2, 2)):
        print(multiplier, stride, flush=True)
        run(multiplier, stride)
    print("same")
""")


@pytest.mark.parametrize("axis", [0, 2, 3], ids=["images", "rows", "columns"])
def test_offsets_past_two_to_the_31(axis):
    result = subprocess.run(
        [sys.executable, "-c", _FAR_APART, str(axis)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert "same" in result.stdout, f"exit code {result.returncode}: {result.stdout} {result.stderr[-2000:]}"
