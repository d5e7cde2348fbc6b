"""The dense CRF on a device: its filters, its update and all gradients, exact and on the lattice."""

import random

import pytest
import torch

import segfast
import segfast.functional as SF
from segfast.kernels._launch import _LAUNCHES

from .tester import DTYPES, place

pytestmark = pytest.mark.device
DTYPE = pytest.mark.parametrize("arithmetic", ["bfloat16", "float16", "float32"])

# Points, features, channels: blocks of pairs that are full and that are not, one point, one channel.
POINTS = {
    "blocks": (2, 150, 5, 21),
    "many channels": (1, 70, 2, 65),
    "one point": (3, 1, 3, 2),
    "one channel": (1, 65, 1, 1),
}
# Unaries, their layout and other options than these.
OPTIONS = {"theta_alpha": 6.0, "theta_beta": 0.3, "theta_gamma": (2.0, 1.5), "iterations": 2}
IMAGES = {
    "21 labels": ((2, 21, 9, 11), "", {}),
    "width 1": ((1, 3, 37, 1), "NCHW", {}),
    "one pixel": ((2, 5, 1, 1), "", {}),
    "2 labels": ((1, 2, 8, 16), "NCHW", {}),
}


def random_points(rng: random.Random):
    return rng.choice([1, 1, 2]), rng.randrange(1, 90), rng.randrange(1, 7), rng.choice([1, 2, 8, 17, 40])


def random_image(rng: random.Random):
    shape = (rng.choice([1, 1, 2]), rng.choice([2, 3, 5, 8]), rng.randrange(3, 8), rng.randrange(3, 8))
    options = {
        "theta_alpha": (rng.uniform(1, 9), rng.uniform(1, 9)),
        "theta_beta": rng.uniform(0.1, 1),
        "theta_gamma": (rng.uniform(0.5, 2), rng.uniform(0.5, 2)),
        "spatial_weight": rng.uniform(1, 4),
        "normalization": rng.choice(["symmetric", "before", "after"]),
        "iterations": rng.choice([1, 2]),
    }
    return shape, rng.choice(["", "NCHW", "wide", "crop", "off16"]), options


POINTS |= {f"random {seed}": random_points(random.Random(seed)) for seed in range(2)}
IMAGES |= {f"random {seed}": random_image(random.Random(seed)) for seed in range(2)}


@pytest.fixture(autouse=True)
def one_processor(monkeypatch):
    """Few programs: each has several tiles, and one without work takes as long as another."""
    monkeypatch.setattr(segfast.kernels.dense_crf.lists, "processors", lambda device: 2)


def close(what, actual, expected, share):
    """Within `share` of the largest, and one rounding of the result's dtype."""
    actual = actual.detach().cpu()
    largest = expected.abs().amax().item()
    error = (actual.double() - expected).abs().amax().item()
    allowed = (share + torch.finfo(actual.dtype).eps) * largest + 2**-20
    assert actual.shape == expected.shape and error <= allowed, f"{what}: {error:.3g}, allowed {allowed:.3g}"


def run(function, tensors, device, dtype):
    """The result and all gradients, of numbers that `dtype` has; the same again from what is remembered."""

    def once():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        result = function(*leaves)
        wanted = [t for t in leaves if t.requires_grad]
        weights = torch.linspace(-1, 1, result.numel()).view(result.shape).to(dtype).to(result)
        return result.detach(), *torch.autograd.grad(result, wanted, weights)

    first = once()
    if device.type == "cuda":
        launches = dict(_LAUNCHES)
        second = once()
        assert launches and launches == _LAUNCHES
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "not the same twice"
    return first


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("method", ["exact", "lattice"])
@DTYPE
def test_gaussian_filter(name, method, arithmetic, device):
    batch, points, dim, channels = POINTS[name]
    generator = torch.Generator().manual_seed(points)
    values = torch.rand(batch, channels, points, generator=generator).to(DTYPES[arithmetic])
    features = 2 * torch.randn(batch, dim, points, generator=generator)

    def gaussian(values, features):
        return SF.gaussian_filter(values, features, method=method, tolerance=0.0)

    wide = torch.float64 if method == "exact" else torch.float32  # a lattice's vertices are float32's
    with segfast.backend("aten"):
        expected = run(
            gaussian, [values.to(wide), features.to(wide)], torch.device("cpu"), DTYPES[arithmetic]
        )
    with segfast.backend("triton"):
        actual = run(
            gaussian, [place(values.to(device), ""), features.to(device)], device, DTYPES[arithmetic]
        )
    # The exact kernel's values and weights are half precision's.
    for what, a, e in zip(
        ("output", "gradient of values", "gradient of features"), actual, expected, strict=True
    ):
        close(what, a, e.double(), 4e-3 if method == "exact" else 1e-4)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("method", ["exact", "lattice"])
@DTYPE
def test_mean_field(name, method, arithmetic, device):
    shape, layout, options = IMAGES[name]
    generator = torch.Generator().manual_seed(shape[1])
    unary = (2 * torch.rand(shape, generator=generator)).to(DTYPES[arithmetic])
    image = torch.rand(shape[0], 3, *shape[2:], generator=generator)
    weights = torch.rand(shape[1], generator=generator) + 0.5

    def crf(unary, image, weights):
        return SF.mean_field(
            unary, image, bilateral_weight=weights, method=method, tolerance=0.0, **OPTIONS | options
        )  # fmt: skip

    wide = torch.float64 if method == "exact" else torch.float32
    with segfast.backend("aten"):
        expected = run(
            crf, [t.to(wide) for t in (unary, image, weights)], torch.device("cpu"), DTYPES[arithmetic]
        )
    given = [place(unary.to(device), layout), place(image.to(device), layout), weights.to(device)]
    with segfast.backend("triton"):
        actual = run(crf, given, device, DTYPES[arithmetic])
        with torch.no_grad():  # the fused update
            inferred = crf(*given)
    names = ("probabilities", "gradient of the unary", "gradient of the image", "gradient of the weights")
    for what, a, e in zip(names, actual, expected, strict=True):
        close(what, a, e.double(), 1e-2 if "gradient" in what else 2e-3)
    close("inference", inferred, expected[0].double(), 2e-3)
