"""The lattice's integers and its vertices of no point, and the softmax over labels."""

import numpy as np
import pytest
import torch

import segfast.crf
from segfast.ops.dense_crf import inference, lattice
from segfast.ops.dense_crf.lattice import Lattice, LatticeFilter

from .test_op import energies, photo


def same(a: Lattice, b: Lattice) -> bool:
    rows = [[x.splat.rows, x.slice.rows, x.order, *(blur.rows for blur in x.blurs)] for x in (a, b)]
    return a.vertices == b.vertices and all(map(torch.equal, *rows))


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_sorted_by_numpy_or_by_torch(monkeypatch, dim, scale):
    features = scale * torch.randn(300, dim, generator=torch.Generator().manual_seed(0))
    packed, widths = Lattice(features), []

    def spy(keys, most):
        widths.append((most - 1).bit_length() + (keys.numel() - 1).bit_length())
        return keys.sort(stable=True)

    monkeypatch.setattr(lattice, "sorted_keys", spy)
    assert same(Lattice(features), packed) and widths


def test_keys_too_wide_to_carry_their_places_are_sorted_by_torch():
    for offset, most in ((0, 2**62), (2**61, 2**62), (0, 32)):
        keys, places = lattice.sorted_keys(torch.tensor([7, 5, 5, 9]) + offset, most)
        assert (keys - offset).tolist() == [5, 5, 7, 9] and places.tolist() == [1, 2, 0, 3]


def test_origin_s_vertices_are_those_of_a_point_there_of_no_weight():
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) / 4 + torch.tensor(
        [1.5, 0.4, -0.2]
    )
    values = torch.randn(50, 4)
    own, with_origin = Lattice(features), Lattice(features, with_origin=True)
    points = torch.cat([features, torch.zeros(1, 3)])
    expected = LatticeFilter(Lattice(points))(torch.cat([values, torch.zeros(1, 4)]))[:-1]
    actual = LatticeFilter(with_origin)(values)
    assert own.vertices < with_origin.vertices == Lattice(points).vertices
    torch.testing.assert_close(actual, expected)
    assert (LatticeFilter(own)(values) - actual).abs().max() > 1e-3
    # Of a point at the origin, all are there already; far away there is nothing to be changed.
    assert same(Lattice(points, with_origin=True), Lattice(points))
    far = LatticeFilter(Lattice(features + 40, with_origin=True))(values)
    torch.testing.assert_close(far, LatticeFilter(Lattice(features + 40))(values))
    # No vertex of a point is taken for one of the origin's.
    line = torch.linspace(0, 6, 50)[:, None]
    for shift in range(-20, 14):
        points = torch.cat([line + shift, torch.zeros(1, 1)])
        assert Lattice(line + shift, with_origin=True).vertices == Lattice(points).vertices, shift


@pytest.mark.parametrize("height", [70, 71, 73])
def test_odd_numbers_of_pixels_are_pydensecrf_s(monkeypatch, height):
    """It takes pixels by fours."""
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="needs pydensecrf (pydensecrf2 on PyPI)")
    width = 61
    assert height * width % 4
    image = photo("chelsea", height, width)
    unary = energies(21, height, width)[0].flatten(1).numpy()

    def probabilities(module, **options):
        crf = module.DenseCRF2D(width, height, 21, **options)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(sxy=3, compat=3)
        crf.addPairwiseBilateral(sxy=40, srgb=13, rgbim=image, compat=10)
        return np.array(crf.inference(10))

    theirs = probabilities(densecrf)
    assert np.abs(probabilities(segfast.crf, method="lattice") - theirs).max() < 1e-4
    # Without the vertices that its padding makes, they would be apart.
    monkeypatch.setattr(
        "segfast.ops.dense_crf.filters.Lattice", lambda features, with_origin: Lattice(features)
    )
    assert np.abs(probabilities(segfast.crf, method="lattice") - theirs).max() > 1e-3


@pytest.mark.parametrize("shift", [0.0, 90.0, -90.0, 1e4])
def test_softmax_without_maxima(shift):
    logits = 5 * torch.randn(50, 7) + shift
    logits[3] -= 150
    out = torch.empty_like(logits)
    inference._softmax(logits.clone(), out)
    torch.testing.assert_close(out, logits.softmax(1), rtol=1e-5, atol=1e-7)
    narrow = 5 * torch.randn(50, 7)
    inference._softmax(narrow.clone(), out)
    torch.testing.assert_close(out, narrow.softmax(1), rtol=1e-5, atol=0)
    for lone in (-60.0, 60.0):
        unlikely = torch.tensor([[lone, lone - 45.0]])
        small = torch.empty_like(unlikely)
        inference._softmax(unlikely.clone(), small)
        torch.testing.assert_close(small, unlikely.softmax(1), rtol=1e-5, atol=0)
    narrow[0, 0] = torch.nan
    inference._softmax(narrow.clone(), out)
    assert out[0].isnan().all() and out[1:].isfinite().all()
