"""`segfast.functional.conv2d` goes to the kernels that suit the layer, remembered calls included."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv2d
from tests.conv2d.reference import DENSE, DILATED, launched, names, tiles
from tests.fused_conv import draw, precisions_of


@pytest.fixture(autouse=True)
def small_tiles():
    """Few steps for the interpreter: all sizes here fit one tile."""
    with tiles(64, 16, 64):
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_other_dtypes_go_to_aten_under_auto(dtype):
    x, w = torch.randn(1, 3, 4, 4, dtype=dtype), torch.randn(2, 3, 3, 3, dtype=dtype)
    y = conv2d(x, w, dilation=2, padding=2, scale=torch.ones(2, dtype=dtype))
    torch.testing.assert_close(y, F.conv2d(x, w, dilation=2, padding=2))
    assert y.dtype == dtype


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
