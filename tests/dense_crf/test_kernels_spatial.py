"""The spatial Gaussian in Triton's interpreter, against its matrices in fp64."""

import math

import pytest
import torch

from segfast.kernels import Tile, override_tile
from segfast.kernels.dense_crf import spatial, spatial_gaussian

pytestmark = pytest.mark.interpreter


def matrix(count, theta):
    places = torch.arange(count, dtype=torch.float64)
    return torch.exp(-((places[:, None] - places) ** 2) / (2 * theta * theta))


def expected(values, size, theta, before=(None, None), after=(None, None)):
    down, across = matrix(size[0], theta[1]), matrix(size[1], theta[0])
    for axis, m in ((1, down), (0, across)):
        if before[axis] is not None:
            m *= before[axis].double()
        if after[axis] is not None:
            m *= after[axis].double()[:, None]
    image = values.double().unflatten(1, size)
    return torch.einsum("yv,xu,bvuc->byxc", down, across, image).flatten(1, 2)


def check(values, size, theta, *factors):
    actual = spatial_gaussian(values, size, theta, *factors)
    reference = expected(values, size, theta, *factors)
    magnitude = expected(values.abs(), size, theta, *factors)
    assert actual.dtype == torch.float32
    assert ((actual - reference).abs() <= 2e-6 * magnitude.amax()).all()


@pytest.mark.compat
@pytest.mark.parametrize("channels", [1, 2, 5, 21, 33])
def test_channels(channels, poisoned_empty):
    check(torch.randn(2, 6 * 11, channels), (6, 11), (3.0, 1.5))


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (9, 67)])
@pytest.mark.parametrize("theta", [(0.05, 0.3), (3.0, 3.0), (80.0, 40.0)])
def test_sizes_and_thetas(size, theta, poisoned_empty):
    check(torch.randn(1, size[0] * size[1], 3), size, theta)


@pytest.mark.parametrize("tile", [Tile(16, 16, 16, 4, 1), Tile(32, 64, 16, 4, 1), Tile(64, 32, 32, 4, 1)])
def test_factors_and_tiles(tile, poisoned_empty):
    size = (20, 35)
    before, after = ([torch.rand(n) + 0.5 for n in reversed(size)] for _ in range(2))
    values = torch.randn(2, size[0] * size[1], 4)
    with override_tile("spatial_gaussian", tile):
        check(values, size, (2.0, 1.0), tuple(before), tuple(after))
        check(values, size, (2.0, 1.0), (None, None), tuple(after))
        check(values, size, (2.0, 1.0), tuple(before))


def test_what_is_cut_off_is_less_than_rounding():
    # Values far away only: what arrives there from beyond the radius, beside what arrives from everywhere.
    theta, length = 2.0, 64
    radius = math.ceil(spatial.REACH * theta)
    row = matrix(length, theta)[0]
    assert row[radius + 1 :].sum() < 2**-24 * row.sum()
    assert math.erfc(spatial.REACH / math.sqrt(2)) < 2**-24
    # And no more is cut off than that, but for what fills a step.
    values = torch.zeros(1, length, 1)
    values[0, radius - 1] = 1.0
    with override_tile("spatial_gaussian", Tile(16, 16, 16, 4, 1)):
        actual = spatial_gaussian(values, (1, length), (theta, theta))
    torch.testing.assert_close(actual[0, 0, 0].double(), row[radius - 1], atol=0, rtol=2e-5)


@pytest.mark.parametrize("theta", [2.0, 2.4])
def test_the_last_pixel_of_the_radius_counts(theta):
    # Where a block of pixels and its first step begin.
    radius = math.ceil(spatial.REACH * theta)
    values = torch.zeros(1, 64, 1)
    values[0, 16 - radius] = 1.0
    with override_tile("spatial_gaussian", Tile(16, 16, 16, 4, 1)):
        actual = spatial_gaussian(values, (1, 64), (theta, theta))
    torch.testing.assert_close(actual[0, 16, 0].double(), matrix(64, theta)[0, radius], atol=0, rtol=2e-5)


def test_nan_stays_within_its_reach():
    values = torch.ones(1, 256, 1)
    values[0, 0] = float("nan")
    out = spatial_gaussian(values, (1, 256), (1.0, 1.0))
    assert out[0, 0].isnan() and out[0, 200:].isfinite().all()


def test_the_result_may_be_given(poisoned_empty):
    values, out = torch.randn(1, 15, 2), torch.empty(1, 15, 2)
    assert spatial_gaussian(values, (3, 5), (1.0, 1.0), out=out) is out
    assert torch.equal(out, spatial_gaussian(values, (3, 5), (1.0, 1.0)))
