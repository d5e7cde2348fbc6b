"""The convolution kernels on any strides, what they promise of alignment, what they execute, wide offsets."""

import itertools
import math
import textwrap

import pytest
import torch
import torch.nn.functional as F
from triton.runtime.interpreter import InterpreterBuilder

import segfast
from segfast.functional import conv2d
from segfast.kernels.conv2d._zones import executed_taps
from segfast.kernels.conv2d.dilated import branch_of
from tests import far_apart
from tests.conformance.test_strides import view
from tests.conv2d.reference import DENSE, DILATED, check_conv2d, launched, names, operands, tiles
from tests.fused_conv import draw

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_empty", "checked_launches")]


@pytest.mark.parametrize("channels", [(16, 24), (12, 20), (21, 5)], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel": 1},
        {"padding": 1},
        {"kernel": 2, "stride": 2},
        {"padding": 4, "dilation": 4},
        {"stride": 2, "padding": 1},
    ],
    ids=["1x1", "3x3", "2x2 s2", "r4", "3x3 s2"],
)
def test_alignment_is_promised_and_kept(channels, geometry, checked_hints):
    # Half precision, as the widest accesses have the most to promise: 16 bytes are 8 channels.
    options = {name: value for name, value in geometry.items() if name != "kernel"}
    side = 4 if "stride" in geometry else 2
    tensors = operands(
        (2, channels[0], side, side), channels[1], geometry.get("kernel", 3), dtype=torch.float16
    )
    with tiles(), segfast.backend("triton"):
        leaves = [t.requires_grad_() for t in tensors.values()]
        y = conv2d(*leaves, **options)
        torch.autograd.grad(y, leaves, draw(*y.shape, dtype=torch.float16, channels_last=True))
    expected = F.conv2d(*(t.double() for t in leaves), **options)
    assert (y.double() - expected).abs().max() <= 2**-9 * expected.abs().max()
    assert checked_hints and max(checked_hints) >= math.gcd(*channels, 16)


@pytest.mark.parametrize(
    ("path", "form"),
    [("fold", form) for form in ("rows apart", "spatial slice", "nchw")]
    + [("dilated", form) for form in ("rows apart", "channel slice", "spatial slice", "transposed")],
)
def test_images_residuals_and_gradients_of_any_strides(form, path, monkeypatch):
    channels = {"fold": 3, "dilated": 16}[path]
    if path == "dilated":
        monkeypatch.setattr("segfast.kernels.conv2d.forward._WORTHWHILE", float("inf"))
    geometry = {"padding": 1, "stride": 2} if path == "fold" else {"padding": 1}
    x = view(form, (2, channels, 2, 3))
    size = F.conv2d(x, draw(1, channels, 3, 3), **geometry).shape[2:]
    residual, g = (view(form, (2, 6, *size)) for _ in range(2))
    weight = draw(6, channels, 3, 3)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    expected = F.conv2d(*leaves, **geometry) + residual
    expected_grads = torch.autograd.grad(expected, leaves, g)
    ours = [t.detach().requires_grad_() for t in (x, weight)]
    with tiles(), segfast.backend("triton"), launched() as launches:
        actual = conv2d(*ours, **geometry, residual=residual)
        grads = torch.autograd.grad(actual, ours, g)
    assert names(launches)[0] == (DILATED if path == "dilated" else DENSE)
    for result, reference in zip((actual, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(result, reference, atol=5e-5, rtol=2e-5)


WEIGHTS = {
    "channel slice": lambda o, i, k: draw(o, 2 * i, k, k, channels_last=True)[:, i:],
    "nchw slice": lambda o, i, k: draw(2 * o, 2 * i, k, k)[::2, :i],
    "filters apart": lambda o, i, k: draw(2 * o, i, k, k, channels_last=True)[::2],
    "transposed": lambda o, i, k: draw(i, o, k, k).transpose(0, 1),
    "flipped": lambda o, i, k: draw(o, i, k, k, channels_last=True).flip(2, 3),
    "cut out": lambda o, i, k: draw(o, i, k + 2, k + 1, channels_last=True)[:, :, 1 : k + 1, 1:],
    "expanded": lambda o, i, k: draw(1, i, 1, 1).expand(o, i, k, k),
}


@pytest.mark.parametrize("layout", WEIGHTS)
@pytest.mark.parametrize(("kernel", "padding", "images"), [(1, 0, 1), (1, 0, 2), (1, 2, 1)])
def test_weights_of_any_strides(layout, kernel, padding, images):
    # 1x1 filters may lie apart, as columns of a larger matrix do, and are read there; all others are copied.
    x, weight = draw(1, 16, 2, 2, channels_last=True), WEIGHTS[layout](5, 16, kernel)
    parts = [x] if images == 1 else [x[:, :4], x[:, 4:]]
    expected = F.conv2d(x, weight, padding=padding)
    g = draw(*expected.shape)
    leaf = weight.clone().requires_grad_()
    (expected_grad,) = torch.autograd.grad(F.conv2d(x, leaf, padding=padding), leaf, g)
    weight = weight.detach().requires_grad_()
    with tiles(), segfast.backend("triton"):
        with segfast.kernels.record_launches() as recorded, torch.no_grad():
            conv2d(parts, weight, padding=padding)
        actual = conv2d(parts, weight, padding=padding)
        (grad,) = torch.autograd.grad(actual, weight, g)
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=2e-5)
    torch.testing.assert_close(grad, expected_grad, atol=5e-5, rtol=2e-5)
    read = any(p is not None and p.data_ptr() == weight.data_ptr() for p in recorded[0][1])
    assert read or kernel * images > 1 or layout not in ("channel slice", "filters apart")


def test_strided_columns_in_every_step_of_a_split(checked_hints):
    weight = draw(18, 40, 1, 1, dtype=torch.float16, channels_last=True)
    x = draw(2, 24, 1, 3, dtype=torch.float16, channels_last=True)
    for start, split in itertools.product((0, 5, 16), (1, 2)):
        columns = weight[:, start : start + 24]
        with tiles(split=split):
            check_conv2d({"input": x, "weight": columns}, "relu")
    assert max(checked_hints) >= 8


@pytest.fixture
def dots(monkeypatch):
    """How many tiles are multiplied, each of them counted where the interpreter does it."""
    count, create_dot = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, *args: count.append(1) or create_dot(self, *args)
    )
    return count


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(
    ("size", "kernel", "padding", "dilation", "stride"),
    [((7, 6), 3, 3, 3, 1), ((5, 4), 3, 6, 6, 1), ((6, 9), 3, 4, 4, 2), ((2, 3), 2, 4, 1, 1)],
    ids=str,
)
def test_grad_weight_multiplies_only_pixels_that_meet_the_image(
    size, kernel, padding, dilation, stride, split, dots
):
    # Two images, 16 channels to 16: a tap is one tile, its pixels in steps of 16.
    x = draw(2, 16, *size, channels_last=True)
    w = draw(16, 16, kernel, kernel, channels_last=True).requires_grad_()
    geometry = {"padding": padding, "dilation": dilation, "stride": stride}
    with tiles(split=split), segfast.backend("triton"):
        y = conv2d(x, w, **geometry)
        g = draw(*y.shape, channels_last=True)
        dots.clear()
        (grad,) = torch.autograd.grad(y, w, g)
    expected = 0
    for tap in itertools.product(range(kernel), repeat=2):
        sides = [
            sum(0 <= o * stride - padding + k * dilation < n for o in range(m))
            for k, n, m in zip(tap, size, y.shape[2:], strict=True)
        ]
        pixels = 2 * math.prod(sides)
        steps, chunk = math.ceil(pixels / 16), math.ceil(math.ceil(pixels / split) / 16)
        expected += sum(max(0, min(chunk, steps - part * chunk)) for part in range(split))
    assert len(dots) == expected
    (reference,) = torch.autograd.grad(F.conv2d(x, w, **geometry), w, g)
    torch.testing.assert_close(grad, reference, atol=1e-4, rtol=1e-4)


def test_the_dilated_kernel_multiplies_what_the_table_says(dots):
    tensors = operands((2, 32, 6, 5), 20, vectors=())
    geometry = {"padding": 4, "dilation": 4}
    branch = branch_of((6, 5), (6, 5), (3, 3), (1, 1), (4, 4), (4, 4))
    for split in (1, 2):
        dots.clear()
        with tiles(split=split), segfast.backend("triton"), launched() as launches:
            conv2d(**tensors, **geometry)
        assert names(launches)[0] == DILATED
        # Two blocks of channels come in, two of filters go out.
        assert 16 * len(dots) == executed_taps(branch, 2, 16) * 2 * 2


_FAR_APART = textwrap.dedent("""
    import contextlib
    import sys
    import torch
    import torch.nn.functional as F
    from segfast import kernels
    from tests.far_apart import same

    def wide(launcher, *rest, **options):
        result, launches = same(axis, launcher, *rest, **options)
        assert launches[0].constants["WIDE_INDEX"]
        return result, launches[0].kernel.__name__

    last = {"memory_format": torch.channels_last}

    def run(channels, size, kernel, stride, rate, split, expected):
        geometry = ((stride, stride), (rate, rate), (rate, rate))
        x = torch.randn(2, channels, *size).half().contiguous(**last)
        w = (torch.randn(5, channels, kernel, kernel) / 8).half().contiguous(**last)
        y = F.conv2d(x.double(), w.double(), None, *geometry).half()
        g = torch.randn(y.shape).half().contiguous(**last)

        def forward(x, residual, out):
            kernels.conv2d_forward((x,), w, None, None, None, residual, out, *geometry, 1, None, 0.0)

        def images(x, other, out):
            kernels.conv2d_forward(
                (x[:, :1], other[:, 1:]), w, None, None, None, None, out, *geometry, 1, None, 0.0
            )

        def grad_input(g, out):
            kernels.conv2d_grad_input(g, w, out, *geometry, 1)

        def grad_weight(x, g, out):
            kernels.conv2d_grad_weight(x, g, out, *geometry, 1)

        def parallel(x, out):
            kernels.parallel_conv2d_forward(
                x, [w, w[:, :, :1, :1].contiguous(**last)], None, None, out, [(rate, rate), (1, 1)], None, 0.0
            )

        tile = kernels.Tile(16, 16, 16, 4, 2, split_k=split)
        with contextlib.ExitStack() as stack:
            for operation in ("forward", "grad_input", "grad_weight"):
                stack.enter_context(kernels.override_tile("conv2d_" + operation, tile))
            stack.enter_context(kernels.override_tile("parallel_conv2d_forward", tile))
            result, name = wide(forward, (x, torch.zeros_like(g)), y)
            assert torch.allclose(result, y, atol=2e-2) and name == expected, name
            assert torch.allclose(wide(images, (x, x), y)[0], y, atol=2e-2)
            wide(grad_input, (g,), x)
            wide(grad_weight, (x, g), w, spread=False)
            if stride == 1 and kernel == 3:
                wide(parallel, (x,), torch.cat([y, y], 1))

    torch.manual_seed(0)
    for axis in (0, 2, 3):  # images, rows, columns
        print("axis", axis, flush=True)
        run(4, (4, 3), 3, 2, 1, 1, "_conv2d_dense_kernel")
        run(16, (4, 3), 2, 1, 1, 3, "_conv2d_dense_kernel")
        run(16, (4, 3), 3, 1, 3, 1, "_conv2d_dilated_kernel")
        run(16, (2, 3), 3, 1, 2, 2, "_conv2d_dilated_kernel")
    print("same")
""")


def test_offsets_past_two_to_the_31():
    far_apart.run_script(_FAR_APART)
