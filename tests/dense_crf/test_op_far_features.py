"""Features so far from zero, or from each other, that their number format has few digits left."""

import itertools
import re

import pytest
import torch

import segfast
import segfast.crf
from segfast.functional import gaussian_filter, mean_field
from segfast.ops.dense_crf.lattice import Lattice
from segfast.ops.dense_crf.simplices import check_digits, simplices

from .test_op import energies

TOO_FAR = r"features: one is \S+ standard deviations from zero, and torch.float"


def huge(dim=5, points=20):
    torch.manual_seed(0)
    features = 3 * torch.rand(1, dim, points)
    features[0, :, 5] = torch.randn(dim) * 1e9
    return features


@pytest.fixture
def poisoned_memory(monkeypatch):
    """All memory that torch allocates holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def farthest(dim, dtype):
    """The bound that the error names."""
    with pytest.raises(ValueError, match=TOO_FAR) as caught:
        check_digits(torch.full((1, dim), 1e30, dtype=dtype))
    return float(re.search(r"all are less than (\S+) from it", str(caught.value)).group(1))


def at_the_bound(dim, dtype):
    """[N, D]: the corners of the cube of features that are not refused, its faces, and points within."""
    generator = torch.Generator().manual_seed(dim)
    corners = torch.tensor([*itertools.islice(itertools.product((-1.0, 1.0), repeat=dim), 512)])
    within = 2 * torch.rand(2000, dim, generator=generator) - 1
    face = torch.where(torch.rand(2000, dim, generator=generator) < 0.5, within.sign(), within)
    # The message rounds the bound to three digits.
    return torch.cat([corners, face, within, torch.eye(dim)]).to(dtype) * (0.995 * farthest(dim, dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [1, 2])
def test_the_kernels_take_what_is_not_refused(dim, poisoned_empty):
    """In few dimensions: more would span more cells than a key tells apart."""
    points = at_the_bound(dim, torch.float32)
    lattice = segfast.kernels.build_permutohedral(points[None])
    torch.testing.assert_close(lattice.weights[0] * (1 + 2.0**-dim), simplices(points)[2])
    assert segfast.kernels.build_permutohedral(4 * points[None]).weights.isnan().all()


@pytest.mark.parametrize("scale", [1e8, 1e30, float("inf")])
def test_simplices_of_features_too_large_have_ranks_that_are_indices(scale):
    _, rank, _ = simplices(torch.randn(1000, 5) * scale)
    assert rank.min() >= 0 and rank.max() <= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 30])
def test_up_to_the_bound_ranks_are_permutations_and_weights_are_shares(dim, dtype, poisoned_memory):
    points = at_the_bound(dim, dtype)
    check_digits(points)
    _, rank, weights = simplices(points)
    assert (rank.sort(0).values == torch.arange(dim + 1)[:, None]).all()
    # A coordinate is off by a quarter, of dim + 1 that a cell spans.
    assert (weights.sum(1) - 1).abs().max() < 1e-5
    assert weights.min() >= -0.5 and weights.max() <= 1.5


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_far_beyond_it_ranks_are_no_permutation(dim):
    """It leaves places of a point's weights, and of its vertices, unwritten."""
    points = 64 * at_the_bound(dim, torch.float32)
    _, rank, _ = simplices(points)
    assert (rank.sort(0).values != torch.arange(dim + 1)[:, None]).any()


@pytest.mark.parametrize("far", [1e6, 1e9, 1e18, 1e30])
@pytest.mark.parametrize("alone", [True, False])
def test_features_without_digits_are_an_error_of_the_lattice(far, alone, poisoned_memory):
    values, features = torch.rand(1, 2, 20), 3 * torch.rand(1, 5, 20)
    if alone:
        features[0, 2, 7] = far
    else:
        features += far
    crf = segfast.crf.DenseCRF(20, 2)
    for call in (
        lambda: gaussian_filter(values, features, method="lattice"),
        lambda: gaussian_filter(values, features.clone().requires_grad_(), method="lattice"),
        lambda: gaussian_filter(values.double(), features.double() * 2.0**29, method="lattice"),
        lambda: mean_field(energies(2, 4, 5), features.view(1, 5, 4, 5), theta_beta=1.0, method="lattice"),
        lambda: crf.addPairwiseEnergy(features[0].numpy(), 3) if alone else Lattice(features[0].T),
    ):
        with pytest.raises(ValueError, match=TOO_FAR):
            call()


def test_features_that_span_too_much_are_an_error_on_a_cpu():
    torch.manual_seed(0)
    points = torch.randn(20, 5)
    # From 62 bits on, not from some more.
    with pytest.raises(ValueError, match=r"they span 2\*\*62 lattice cells"):
        for scale in range(1300, 1500, 10):
            Lattice(points * scale)


def groups(far, dtype):
    """Features of 300 points at six places, values, and of each point the sum of those at its place."""
    generator = torch.Generator().manual_seed(0)
    places = far * torch.randn(6, 3, generator=generator, dtype=dtype)
    group = torch.randint(6, (300,), generator=generator)
    values = torch.rand(1, 2, 300, generator=generator, dtype=dtype)
    return places[group].T[None], values, values @ (group[:, None] == group).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e4, 1e6, 1e9, 1e20, 1e30])
def test_exact_filter_of_groups_far_apart(far, dtype, poisoned_memory):
    features, values, expected = groups(far, dtype)
    found = gaussian_filter(values, features, method="exact")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN)")  # NumPy's, of squares of features
@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
@pytest.mark.parametrize("far", [1e4, 1e9, 1e20, 1e30])
def test_exact_kernels_of_groups_far_apart(far, tolerance, poisoned_empty):
    features, values, expected = groups(far, torch.float32)
    with segfast.backend("triton"):
        found = gaussian_filter(values, features, method="exact", tolerance=tolerance)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_exact_filter_and_its_gradients_beside_a_point_far_away():
    """Those of the others alone."""
    features, values = huge(3), torch.rand(1, 2, 20)
    others = torch.arange(20) != 5
    results = []
    for kept in (torch.ones(20, dtype=torch.bool), others):
        points, rows = (t[..., kept].clone().requires_grad_() for t in (features, values))
        out = gaussian_filter(rows, points, method="exact", normalization="symmetric")
        gradients = torch.autograd.grad(out.square().sum(), (points, rows))
        results.append([t[..., others[kept]] for t in (out, *gradients)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
