"""`segfast.functional.conv2d` against torch's: its own samples, memory formats, gradients of any strides."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv2d
from tests.conv2d.reference import DENSE, DILATED, check_conv2d, launched, names, tiles
from tests.fused_conv import BACKENDS, draw, precisions_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


@pytest.fixture(autouse=True)
def small_tiles():
    """Few steps for the interpreter: all sizes here fit one tile."""
    with tiles(64, 16, 64):
        yield


def database():
    # The import freezes torch.backends' flags; undone on leaving, for the benchmarks that follow set them.
    with torch.backends.__allow_nonbracketed_mutation():
        entries = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    (info,) = [op for op in entries if op.name == "nn.functional.conv2d"]
    return info


def samples(dtype, requires_grad=False):
    """torch's own samples of the operator."""
    return list(database().sample_inputs("cpu", dtype, requires_grad=requires_grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_torchs_samples_on_aten(dtype):
    # Equal up to the taps that the CPU leaves out, gradients included.
    seen = 0
    for sample in samples(dtype, True):
        leaves = [sample.input, *[a for a in sample.args if a is not None]]
        expected = F.conv2d(sample.input, *sample.args, **sample.kwargs)
        with segfast.backend("aten"):
            actual = conv2d(sample.input, *sample.args, **sample.kwargs)
        grad = torch.ones_like(expected)
        results = [(y, *torch.autograd.grad(y, leaves, grad)) for y in (actual, expected)]
        torch.testing.assert_close(*results)
        seen += 1
    assert seen >= 10
    ones = torch.ones(1, 2, 3, 3).long()
    assert torch.equal(conv2d(ones, ones), F.conv2d(ones, ones))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_torchs_samples_on_our_kernels(dtype, poisoned_empty):
    ran = set()
    with segfast.backend("triton"), launched() as launches:
        for sample in samples(dtype)[:: 2 if dtype == torch.float32 else 5]:
            weight, *rest = sample.args
            bias = rest[0] if rest else sample.kwargs.pop("bias", None)
            input = sample.input if sample.input.dim() == 4 else sample.input[None]
            tensors = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
            tensors = {name: t.detach() for name, t in tensors.items()}
            options = dict(zip(("stride", "padding", "dilation", "groups"), rest[1:], strict=False))
            result = check_conv2d(tensors, **options, **sample.kwargs)["output"]
            if sample.input.dim() == 3:
                unbatched = conv2d(sample.input, *sample.args, **sample.kwargs)
                assert torch.equal(unbatched, result[0])
        ran = set(names(launches))
    assert DENSE in ran


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_dtypes_go_to_aten_under_auto(dtype):
    x, w = torch.randn(1, 3, 4, 4, dtype=dtype), torch.randn(2, 3, 3, 3, dtype=dtype)
    y = conv2d(x, w, dilation=2, padding=2, scale=torch.ones(2, dtype=dtype))
    torch.testing.assert_close(y, F.conv2d(x, w, dilation=2, padding=2))
    assert y.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 3, 2), (2, 3, 3, 2), (3, 3, 2)], ids=["empty", "batch", "unbatched"]
)
def test_batch_sizes(shape, backend):
    x, w, bias = draw(*shape).requires_grad_(), draw(4, 3, 2, 2).requires_grad_(), draw(4).requires_grad_()
    residual = draw(*shape[:-3], 4, 2, 1) if shape[0] else None
    expected = F.conv2d(x, w, bias)
    if residual is not None:
        expected = expected + residual
    options = {"residual": residual, "activation": "relu"}
    with segfast.backend(backend):
        y = conv2d(x, w, bias, **options)
        y.sum().backward()
    torch.testing.assert_close(y, F.relu(expected))
    assert y.stride() == expected.stride() and x.grad.shape == x.shape and w.grad.shape == w.shape
    others = tuple(i for i in range(y.dim()) if i != y.dim() - 3)
    torch.testing.assert_close(bias.grad, (expected > 0).sum(others).float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [1, 2, (2, 3), 4])
@pytest.mark.parametrize("dilation", [1, (3, 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_by_name(kernel, dilation, backend):
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    leaves, ours = ([t.requires_grad_() for t in (draw(1, 2, 10, 7), draw(2, 2, *size))] for _ in range(2))
    for padding in ("same", "valid"):
        expected = F.conv2d(*leaves, padding=padding, dilation=dilation)
        with segfast.backend(backend):
            y = conv2d(*ours, padding=padding, dilation=dilation)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        results = [torch.autograd.grad(t.square().sum(), w) for t, w in ((y, ours), (expected, leaves))]
        torch.testing.assert_close(*results, atol=1e-3, rtol=1e-4)


@pytest.mark.interpreter
def test_depthwise_layers_have_kernels_of_their_own():
    x, w = draw(1, 3, 4, 4), draw(6, 1, 3, 3)
    expected, residual = F.conv2d(x, w, groups=3), draw(1, 6, 2, 2)
    with segfast.backend("triton"):
        with launched() as launches:
            torch.testing.assert_close(conv2d(x, w, groups=3), expected, atol=1e-5, rtol=1e-5)
            # A residual is what they do not add.
            y = conv2d(x, w, groups=3, residual=residual)
        assert "depthwise" in names(launches)[0] and names(launches)[-1] == DENSE
        torch.testing.assert_close(y, expected + residual, atol=1e-5, rtol=1e-5)
        with launched() as launches:
            one = conv2d(x[:, :1], w[:, :1])  # one channel is no depthwise layer
        assert names(launches) == [DENSE]
    torch.testing.assert_close(one, F.conv2d(x[:, :1], w), atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
def test_large_rates_go_by_zones_from_the_functional(poisoned_empty):
    x, w = draw(1, 16, 4, 4).requires_grad_(), draw(16, 16, 3, 3).requires_grad_()
    g = draw(1, 16, 4, 4)
    with tiles(), segfast.backend("triton"), launched() as launches:
        y = conv2d(x, w, padding=6, dilation=6)
        grads = torch.autograd.grad(y, (x, w), g)
    assert names(launches)[:2] == [DILATED] * 2
    expected = F.conv2d(x, w, padding=6, dilation=6)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, (x, w), g), atol=1e-4, rtol=1e-4)


@pytest.mark.interpreter
def test_a_remembered_call_by_zones_computes_anew(poisoned_empty, checked_launches):
    # The second call of a layout goes straight to the launch: with other values, through another alignment.
    store = draw(600)
    with tiles(), segfast.backend("triton"), launched() as launches:
        for offset in (0, 0, 4, 1, 1, 0):
            x = store[offset : offset + 96].view(1, 3, 2, 16).permute(0, 3, 1, 2)
            w = store[100 + offset : 388 + offset].view(2, 3, 3, 16).permute(0, 3, 1, 2)
            bias = store[offset : offset + 2]
            for geometry in ({"padding": 1}, {"padding": 6, "dilation": 6}):
                y = conv2d(x, w, bias, **geometry, activation="relu")
                expected = F.relu(F.conv2d(x, w, bias, **geometry))
                torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    assert set(names(launches)) == {DENSE, DILATED}
    x, w = draw(1, 16, 3, 3, channels_last=True), draw(8, 16, 3, 3, channels_last=True)
    with tiles():
        found = precisions_of(lambda: conv2d(x, w, padding=9, dilation=9))
    assert found == [{"tf32x3"}, {"tf32"}, {"tf32x3"}]
