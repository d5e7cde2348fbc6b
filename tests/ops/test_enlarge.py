"""Enlarging images one axis at a time, by itself and where an optimized model's forward asks torch for it."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import segfast
from segfast.nn._fused.whole_model import compute_as_given, keep_contiguous
from segfast.ops import _enlarge


@pytest.fixture
def enlarged(monkeypatch):
    """Sizes that were enlarged by our own algorithm, which takes the smallest images too."""
    monkeypatch.setattr(_enlarge, "_LEAST_RESULTS", 0)
    sizes, enlarge = [], _enlarge.enlarge
    monkeypatch.setattr(_enlarge, "enlarge", lambda input, size: sizes.append(size) or enlarge(input, size))
    return sizes


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 3, 5, 7), (20, 28)),
        ((1, 2, 3, 4), (15, 21)),
        ((1, 1, 2, 1), (18, 1)),
        ((3, 4, 9, 5), (63, 41)),
    ],
    ids=str,
)
def test_it_is_torchs_but_for_rounding(shape, size, channels_last):
    x = torch.randn(shape).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    expected = F.interpolate(x.double(), size, mode="bilinear", align_corners=False)
    actual = _enlarge.enlarge(x, size)
    assert actual.is_contiguous()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_what_is_not_finite_stays_where_torch_has_it():
    x = torch.randn(1, 1, 6, 6)
    x[0, 0, 2, 3], x[0, 0, 4, 0] = float("inf"), float("nan")
    expected = F.interpolate(x, (24, 24), mode="bilinear", align_corners=False)
    assert torch.equal(_enlarge.enlarge(x, (24, 24)).isfinite(), expected.isfinite())


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"size": (24, 20), "mode": "bilinear", "align_corners": True}, torch.float32),
        ({"size": (24, 20), "mode": "nearest"}, torch.float32),
        ({"size": (24, 20), "mode": "bilinear", "antialias": True}, torch.float32),
        ({"size": (25, 20), "mode": "bilinear"}, torch.float32),
        ({"size": (12, 20), "mode": "bilinear"}, torch.float32),
        ({"size": (3, 3), "mode": "bilinear"}, torch.float32),
        ({"scale_factor": 4.1, "mode": "bilinear"}, torch.float32),
        ({"size": (24, 20), "mode": "bilinear"}, torch.bfloat16),
    ],
    ids=str,
)
def test_other_interpolations_are_torchs(options, dtype, enlarged):
    x = torch.randn(1, 2, 6, 5).to(dtype)
    with torch.no_grad():
        assert torch.equal(_enlarge.interpolate(x, **options), F.interpolate(x, **options))
    assert not enlarged


@pytest.mark.parametrize("options", [{"size": (24, 20)}, {"size": [24, 20]}, {"scale_factor": 4}], ids=str)
def test_the_size_or_the_factor_is_given(options, enlarged):
    x = torch.randn(1, 2, 6, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = _enlarge.interpolate(x, **options, mode="bilinear")
    torch.testing.assert_close(y, F.interpolate(x, **options, mode="bilinear"))
    assert y.is_contiguous()
    assert enlarged == [(24, 20)]


def test_gradients_and_a_backend_asked_for_are_torchs(enlarged):
    x = torch.randn(1, 2, 6, 5, requires_grad=True)
    y = _enlarge.interpolate(x, (24, 20), mode="bilinear")
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad.sum(), torch.tensor(2 * 24 * 20.0))
    with torch.no_grad(), segfast.backend("aten"):
        _enlarge.interpolate(x, (24, 20), mode="bilinear")
    assert not enlarged


def test_forward_mode_is_torchs(enlarged):
    x, tangent = torch.randn(2, 1, 2, 6, 5)
    with torch.no_grad(), forward_ad.dual_level():
        y = _enlarge.interpolate(forward_ad.make_dual(x, tangent), (24, 20), mode="bilinear")
        got = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(got, F.interpolate(tangent, (24, 20), mode="bilinear"))
    assert not enlarged


class Scores(nn.Module):
    """Two branches whose sum is enlarged, as torchvision's LRASPP does."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.error, self.around = None, contextlib.nullcontext

    def forward(self, x):
        small = F.avg_pool2d(x, 4)
        with self.around():
            last = self.last(small)
        y = self.first(small) + last
        if self.error is not None:
            raise self.error
        return {"out": F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)}


@pytest.fixture
def model():
    """A model in channels_last whose outputs are to be contiguous."""
    model = Scores().eval().to(memory_format=torch.channels_last)
    keep_contiguous(model, model.last)
    return model


def test_a_models_own_call_of_torch_is_served(model, enlarged):
    x = torch.randn(2, 3, 32, 24)
    expected = F.interpolate
    with torch.no_grad():
        for each in (model, copy.deepcopy(model)):
            y = each(x)["out"]
            assert y.is_contiguous()
            compute_as_given(each)
            torch.testing.assert_close(y, each(x)["out"])
    assert enlarged == [(32, 24)] * 2
    assert F.interpolate is expected


def test_it_ends_with_the_models_forward(model, enlarged):
    x = torch.randn(1, 3, 32, 24)
    with torch.no_grad():
        model.error = KeyError("an error of the model's own")
        with pytest.raises(KeyError):
            model(x)
        assert torch._C._len_torch_function_stack() == 0
        F.interpolate(x, (128, 96), mode="bilinear")
        model.last(x)
        F.interpolate(x, (128, 96), mode="bilinear")
    assert not enlarged


@pytest.mark.parametrize("part", ["last", "first", "forward"])
def test_it_ends_where_a_part_is_compiled(part, model, enlarged):
    x = torch.randn(1, 3, 32, 24)
    with torch.no_grad():
        expected = model(x)["out"]
        assert len(enlarged) == 1
        setattr(model, part, torch.compile(getattr(model, part), backend="eager"))
        for _ in range(2):
            y = model(x)["out"]
            assert torch._C._len_torch_function_stack() == 0
            assert y.is_contiguous()
            torch.testing.assert_close(y, expected)


def test_not_with_gradients(model, enlarged):
    model(torch.randn(1, 3, 32, 24))["out"].sum().backward()
    assert model.last.weight.grad is not None
    assert not enlarged


def test_a_mode_that_ends_before_the_model_does_ends_in_its_turn(model, enlarged):
    model.around = lambda: torch.device("cpu")
    x = torch.randn(1, 3, 32, 24)
    with torch.no_grad():
        assert model(x)["out"].is_contiguous()
        assert not enlarged
        model.around = contextlib.nullcontext
        with torch.device("cpu"):  # and one around the model does not matter
            model(x)
            assert torch._C._len_torch_function_stack() == 1
    assert enlarged == [(32, 24)]


def test_channels_last_images_give_channels_last_scores(model, enlarged):
    x = torch.randn(1, 3, 32, 24).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert model(x)["out"].is_contiguous(memory_format=torch.channels_last)
    assert not enlarged
