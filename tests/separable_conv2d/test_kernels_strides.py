"""The depthwise and separable kernels on any strides: values, promises of alignment, wide offsets."""

import math
import textwrap

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from tests import far_apart
from tests.conformance.test_strides import view
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


@pytest.mark.compat
@pytest.mark.parametrize(
    "form", ["columns apart", "every other channel", "spatial slice", "nchw", "expanded"]
)
def test_two_kernels_read_any_strides(form, checked_hints):
    x, residual = view(form, (2, 6, 4, 3)), view(form, (2, 5, 4, 3))
    depthwise, pointwise = draw(6, 1, 3, 3), draw(5, 6, 1, 1)
    with in_form("two kernels"), segfast.backend("triton"):
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
def test_pointwise_weights_of_any_strides_for_two_kernels(layout):
    x, depthwise, pointwise = draw(1, 6, 3, 4), draw(6, 1, 3, 3), layout(draw(5, 6, 1, 1))
    leaves = [t.clone().requires_grad_() for t in (x, depthwise, pointwise)]
    expected = F.conv2d(plain_depthwise(*leaves[:2], padding=1), leaves[2])
    ours = [t.detach().requires_grad_() for t in (x, depthwise, pointwise)]
    with in_form("two kernels"), segfast.backend("triton"):
        actual = separable_conv2d(*ours, padding=1)
        grads = torch.autograd.grad(actual.square().sum(), ours)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


_FAR_APART = textwrap.dedent("""
    import sys
    import torch
    import torch.nn.functional as F
    from segfast import kernels
    from tests.far_apart import same

    axis = int(sys.argv[1])

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

        assert torch.allclose(same(axis, forward, (x,), y)[0], y, atol=1e-2)
        same(axis, grad_input, (g,), x)
        same(axis, grad_weight, (x, g), w, spread=False)
        residual = torch.zeros_like(z).contiguous(**last)
        for form in ("fused", "two kernels"):
            tile = kernels.Tile(16, 16, 16, 4, 1, form=form)
            with kernels.override_tile("separable_conv2d_forward", tile):
                assert torch.allclose(same(axis, separable, (x, residual), z)[0], z, atol=2e-2)

    for multiplier, stride in ((1, 1), (1, 2), (2, 2)):
        print(multiplier, stride, flush=True)
        run(multiplier, stride)
    print("same")
""")


@pytest.mark.parametrize("axis", [0, 2, 3], ids=["images", "rows", "columns"])
def test_offsets_past_two_to_the_31(axis):
    far_apart.run_script(_FAR_APART, axis)
