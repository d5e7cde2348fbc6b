"""Inputs at the limits of the dense CRF's number formats, sizes and threads, on both paths."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch

import segfast
from segfast.functional import gaussian_filter, mean_field
from segfast.kernels.dense_crf import lists
from segfast.ops import OPERATORS
from segfast.ops.dense_crf import backend, device, device_filters, operators
from segfast.ops.dense_crf.compute import Crf

from .test_op_far_features import huge


@pytest.mark.interpreter
def test_the_kernels_keys_have_62_bits_too():
    torch.manual_seed(0)
    points = torch.randn(1, 20, 5)
    for scale in (1300, 1500):
        broken = segfast.kernels.build_permutohedral(points * scale).weights.isnan()
        assert broken.all() if scale == 1500 else not broken.any()


@pytest.mark.interpreter
def test_features_that_span_too_much_are_nan_on_our_kernels(monkeypatch):
    """Where nothing may be read back: in the gradients too."""
    monkeypatch.setattr("segfast.ops.dense_crf.compute.check_finite", lambda *args: None)
    features = huge().requires_grad_()
    values = torch.rand(1, 2, 20, requires_grad=True)
    with segfast.backend("triton"):
        result = gaussian_filter(values, features, method="lattice")
    assert result.isnan().all()
    assert all(g.isnan().any() for g in torch.autograd.grad(result.sum(), (features, values)))


def test_lattice_of_a_cpu_s_tensors_whatever_the_default_device():
    values, features = torch.rand(1, 2, 30), torch.rand(1, 5, 30)
    expected = gaussian_filter(values, features, method="lattice")
    with torch.device("meta"):
        assert torch.equal(gaussian_filter(values, features, method="lattice"), expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("small", [1e-4, 1e-6, 1e-8])
def test_feature_gradients_of_channels_in_different_units(small):
    """As of a loss relative to each channel."""
    torch.manual_seed(0)
    features, values = torch.rand(1, 3, 40, requires_grad=True), torch.rand(1, 2, 40)
    values, weights = values * torch.tensor([1, small]).view(1, 2, 1), torch.rand(1, 2, 40)
    weights = weights / values.mean(2, keepdim=True)
    found = []
    for name in ("triton", "aten"):
        with segfast.backend(name):
            result = gaussian_filter(values, features, method="exact", tolerance=0.0)
            found += torch.autograd.grad((result * weights).sum(), features)
    torch.testing.assert_close(*found, atol=2e-3 * found[1].abs().max().item(), rtol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("far", [1e3, 1e5, 1e7])
def test_feature_gradients_of_a_point_far_away(far):
    torch.manual_seed(0)
    features, values = 3 * torch.rand(1, 3, 200), torch.rand(1, 2, 200)
    features[0, 0, 5] = far
    found = []
    for name, dtype in (("triton", torch.float32), ("aten", torch.float64)):
        points = features.to(dtype).requires_grad_()
        with segfast.backend(name):
            result = gaussian_filter(values.to(dtype), points, method="exact", tolerance=0.0)
            found += torch.autograd.grad(result.sum(), points)
    # Half precision tells features apart by the largest's share of 2**-22.
    allowed = max(5e-3 * found[1].abs().max().item(), far * 2.0**-22)
    torch.testing.assert_close(found[0].double(), found[1], atol=allowed, rtol=0)


@pytest.mark.interpreter
def test_backward_of_a_compiled_call_takes_the_forward_s_backend():
    """Of 400 points "auto" is exact on our kernels, on PyTorch's operations the lattice, on another scale."""
    torch.manual_seed(0)
    values, features = torch.rand(1, 2, 400), 3 * torch.rand(1, 5, 400)
    points = features.clone().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(gaussian_filter, backend="aot_eager", fullgraph=True)
    with segfast.backend("triton"):
        expected = torch.autograd.grad(gaussian_filter(values, points).sum(), points)[0]
        result = compiled(values, points)
    found = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(result.sum(), points)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


def test_operators_on_a_cpu_run_whatever_backend_they_were_made_with():
    """An exported program keeps the name of the backend."""
    values, features = torch.rand(1, 2, 30), torch.rand(1, 5, 30)
    reference = OPERATORS["gaussian_filter"].reference
    results = [reference(values, features, "exact", None, 0.0, name) for name in ("triton", "aten")]
    assert torch.equal(*results)


@pytest.mark.interpreter
def test_operators_run_on_the_backend_they_are_given(monkeypatch):
    seen = []
    monkeypatch.setattr(device, "can_use_kernels", lambda *args: seen.append(segfast.get_backend()))
    with segfast.backend("aten"):
        OPERATORS["gaussian_filter"](torch.rand(1, 2, 9), torch.rand(1, 3, 9), "exact", None, 0.0, "auto")
    assert seen == ["auto"]


def test_operators_hand_on_all_of_a_crf(monkeypatch):
    crf = Crf(None, None, None, (3.0, 2.0), 4, "after", "exact", 0.25, True, ((80.0, 70.0), (13.0, 1.0, 2.0)))
    seen = []
    monkeypatch.setattr(operators.compute, "mean_field", lambda unary, crf: seen.append(crf) or unary.clone())
    operators.mean_field(torch.rand(1, 2, 3, 4), crf)
    assert [tuple(found.gamma) for found in seen] == [crf.gamma]
    assert seen[0][4:] == crf[4:]


def test_operators_know_no_autocast():
    """An exported program may be run under it."""
    unary, energies = torch.rand(1, 2, 5, 6), -torch.eye(2)
    args = (
        unary,
        None,
        None,
        energies,
        None,
        [2.0, 2.0],
        1,
        "symmetric",
        "exact",
        0.0,
        False,
        None,
        None,
        "aten",
    )
    forward, backward = (OPERATORS[name].reference for name in ("mean_field", "mean_field_backward"))
    needs = [True, False, False, True, False]
    results = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append([forward(*args), *backward(unary, *args, needs)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("count, sigma", [(1, 3.0), (7, 0.4), (700, 30.0), (90, 1e-30), (90, 1e6)])
def test_row_sums_of_the_spatial_term(count, sigma):
    places = torch.arange(count, dtype=torch.float64)
    expected = (-((places[:, None] - places) / sigma).square() / 2).exp().sum(1)
    actual = device_filters._row_sums(count, sigma, places.device)
    torch.testing.assert_close(actual, expected, atol=0, rtol=1e-10)


@pytest.mark.interpreter
def test_spatial_kernel_narrower_than_its_number_format():
    unary = torch.rand(1, 2, 5, 6)
    with segfast.backend("triton"):
        actual = mean_field(unary, theta_gamma=1e-200, iterations=2, method="exact")
    torch.testing.assert_close(actual, mean_field(unary, theta_gamma=1e-3, iterations=2, method="exact"))


@pytest.mark.interpreter
@pytest.mark.usefixtures("checked_launches")
def test_launches_are_for_the_factors_that_there_are():
    kernels, factors, scale = segfast.kernels, torch.rand(1, 20), torch.rand(1, 3)
    features, values, unary = torch.rand(1, 20, 2), torch.rand(1, 20, 3), torch.rand(1, 3, 4, 5)
    lattice = kernels.build_permutohedral(features)
    for bounded in (False, True):
        pairs = kernels.build_exact(features, 0.0, bounded)
        for factor in (None, factors):
            for size in (None, scale):
                packed = kernels.exact_pack(pairs, values, factor, size)
                kernels.exact_unpack(pairs, kernels.exact_filter(pairs, packed), 3, factor, size)
            kernels.mean_field_update(unary, packed=kernels.Packed(packed, pairs.rows, factor))
    for factor, axes in ((None, (None, None)), (factors, (torch.rand(5), torch.rand(4)))):
        kernels.permutohedral_slice(lattice, kernels.permutohedral_blur(lattice, values, factor), factor)
        for after in ((None, None), (torch.rand(5), torch.rand(4))):
            kernels.spatial_gaussian(values, (4, 5), (2.0, 2.0), axes, after)


def test_lists_without_an_entry_are_units_of_nothing():
    """They write zeros, instead of leaving memory as it was."""
    table, cuts = lists.make_units(torch.tensor([3, 0, 5]))
    owners = table[0].tolist()
    assert sorted(o for o in owners if o >= 0) == [0, 1, 2]
    assert table[1:3, owners.index(1)].tolist() == [0, 0] and (cuts[2] <= 1).all()


@pytest.mark.parametrize(
    "shape, dim, reason",
    [
        ((70000, 2, 4, 4), 5, "70000 images, the kernels take up to 65535"),
        ((16, 1, 4096, 4096), 3, "268435456 points of 3 features"),
        ((16, 1, 5000, 5000), 0, "400000000 points of 0 features"),
    ],
)
def test_more_than_the_kernels_count(monkeypatch, shape, dim, reason):
    monkeypatch.setattr(backend, "kernel_reason_not", lambda choice, tensor: None)
    unary = torch.empty(1).expand(shape)
    assert backend.reason_not("triton", unary, shape[1], dim).startswith(reason)
    assert backend.reason_not("triton", unary[:1], shape[1], dim) is None


def test_auto_keeps_the_lists_of_tiles_small():
    narrow = (5.0, 5.0), (1.0, 1.0, 1.0)
    assert backend.choose_kernels_method("auto", 2**20, narrow) == "exact"
    assert backend.choose_kernels_method("auto", 2**20 + 1, narrow) == "lattice"


def test_features_are_known_to_fit_by_sizes_and_thetas_alone():
    crf = Crf(None, None, None, (3.0, 3.0), 1, None, "exact", 0.0, True, ((80.0, 80.0), (13.0,) * 3))
    assert crf.is_bounded((512, 512)) and not crf.is_bounded((80, 8000))
    assert not crf._replace(eight_bit=False).is_bounded((4, 4))
    assert not crf._replace(thetas=None).is_bounded((4, 4))
    assert not crf._replace(thetas=((80.0, 80.0), (1.0,) * 3)).is_bounded((4, 4))
    wide = crf._replace(thetas=((800.0, 8.0), (13.0,) * 3))
    assert wide.is_bounded((80, 8000)) and not wide.is_bounded((8000, 80))


@pytest.mark.interpreter
def test_tolerance_and_thetas_reach_the_kernels_from_every_function(monkeypatch):
    tolerances, thetas = [], []
    build, choose = segfast.kernels.build_exact, device_filters.choose_kernels_method

    def built(features, tolerance, bounded=False):
        tolerances.append(tolerance)
        return build(features, tolerance, bounded)

    def chosen(method, points, *given):
        thetas.extend(given)
        return choose(method, points, *given)

    monkeypatch.setattr(segfast.kernels, "build_exact", built)
    for module in (device, device_filters):
        monkeypatch.setattr(module, "choose_kernels_method", chosen)
    unary, image = torch.rand(1, 2, 2, 3), torch.rand(1, 3, 2, 3)
    layer = segfast.nn.DenseCRF(2, 1, 1, tolerance=0.5, method="exact", theta_alpha=(160.0, 80.0))
    points = segfast.crf.DenseCRF(6, 2, method="exact")
    options = {"iterations": 1, "method": "exact", "theta_alpha": (4.0, 5.0), "theta_beta": (1.0, 2.0, 3.0)}
    with segfast.backend("triton"):
        gaussian_filter(unary, image, method="exact", tolerance=0.125)
        mean_field(unary, image, tolerance=0.25, **options)
        mean_field(unary.requires_grad_(), image, tolerance=0.375, **options)
        with torch.no_grad():
            layer(unary, image)
        points.addPairwiseEnergy(np.zeros((2, 6), np.float32), 1.0)
        segfast.functional.skipped_share(image, 0.75)
    assert tolerances == [0.125, 0.25, 0.375, 0.5, 1e-2, 0.75, 0.0]
    given = (4.0, 5.0), (1.0, 2.0, 3.0)
    assert [t for t in thetas if t] == [given, given, ((160.0, 80.0), (3.0,) * 3)]


@pytest.mark.parametrize("batch, labels", [(0, 3), (2, 3)])
def test_nothing_to_compute_gives_zero_gradients(batch, labels):
    height = 4 if batch == 0 else 0
    unary, image = torch.rand(batch, labels, height, 5), torch.rand(batch, 3, height, 5)
    weight, theta = torch.ones(labels, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    image.requires_grad_()
    q = mean_field(unary, image, bilateral_weight=weight, theta_gamma=theta)
    assert q.shape == unary.shape
    gradients = torch.autograd.grad(q.sum(), (image, weight, theta))
    assert [g.abs().sum() for g in gradients] == [0, 0, 0]
    features = torch.rand(batch, 2, height, requires_grad=True)
    gradient = torch.autograd.grad(gaussian_filter(torch.rand(batch, 3, height), features).sum(), features)[0]
    assert gradient.shape == features.shape and (gradient == 0).all()


@pytest.mark.parametrize("far", [1e5, 1e6])
def test_all_pairs_in_float32_where_half_norms_cancel(far):
    features = torch.tensor([[[0.0, 1.0, 2.0, far]]], requires_grad=True)
    values = torch.tensor([[[1.0, 0.5, 2.0, 1.0]]])
    actual = gaussian_filter(values, features, method="exact")
    gradient = torch.autograd.grad(actual.square().sum(), features)[0]
    wide = features.detach().double().requires_grad_()
    expected = gaussian_filter(values.double(), wide, method="exact")
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-6)
    expected_gradient = torch.autograd.grad(expected.square().sum(), wide)[0]
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-5, rtol=1e-5)


def test_all_pairs_far_from_the_origin():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1, 2, 30, generator=generator, dtype=torch.float64)
    features = torch.randint(24, (1, 3, 30), generator=generator).double() / 8
    found = []
    for shift in (0.0, 2.0**28):
        places = (features + shift).requires_grad_()
        result = gaussian_filter(values, places, method="exact")
        (first,) = torch.autograd.grad(result.square().sum(), places, create_graph=True)
        found.append([result, first, *torch.autograd.grad(first.square().sum(), places)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_layer_s_logits_and_labels():
    crf = segfast.nn.DenseCRF(2)
    for logits in (torch.ones(1, 2, 3, 4).long(), torch.ones(1, 2, 3, 4) > 0, torch.ones(1, 2, 3, 4) + 0j):
        with pytest.raises(ValueError, match=f"logits must be floating point, got {logits.dtype}"):
            crf(logits, torch.rand(1, 3, 3, 4))
    for count in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_labels must be an int of at least 1"):
            segfast.nn.DenseCRF(count)


def test_a_sigma_without_dimensions_is_a_number():
    unary, image = torch.rand(1, 2, 5, 6), 255 * torch.rand(1, 3, 5, 6)
    expected = mean_field(unary, image, theta_gamma=2.0, theta_alpha=30.0)
    actual = mean_field(unary, image, theta_gamma=np.array(2.0), theta_alpha=np.float32(30))
    assert torch.equal(actual, expected)
    layer = segfast.nn.DenseCRF(2, theta_alpha=torch.tensor(30.0), theta_beta=np.array(9.0))
    assert torch.equal(
        layer(-unary, image), segfast.nn.DenseCRF(2, theta_alpha=30, theta_beta=9)(-unary, image)
    )
    crf = segfast.crf.DenseCRF2D(6, 5, 2)
    crf.addPairwiseGaussian(torch.tensor(3.0), np.array(3))
    assert np.isfinite(crf.inference(2)).all()


def test_errors_name_what_the_caller_gave():
    crf = segfast.crf.DenseCRF2D(6, 5, 2)
    for compat, message in (
        (np.full((2, 2), np.nan), "compat must be finite"),
        (None, "compat must be a finite number or a tensor, got None"),
        ("a", "compat must be a finite number or a tensor, got 'a'"),
        (np.ones(2) + 0j, "compat must be real"),
    ):
        with pytest.raises(ValueError, match=message):
            crf.addPairwiseGaussian(1, compat)
    with pytest.raises(ValueError, match="u must be real"):
        crf.setUnaryEnergy(np.ones((2, 30)) + 0j)
    unary = torch.rand(2, 3, 4)
    with pytest.raises(
        ValueError, match=r"image must be \[C, H, W\] beside a unary \[L, H, W\], got \[1, 3, 3, 4\]"
    ):
        mean_field(unary, torch.rand(1, 3, 3, 4))
    with pytest.raises(ValueError, match="theta_gamma must be one positive number or 2"):
        mean_field(unary, theta_gamma=None)
    with pytest.raises(ValueError, match=r"spatial_weight must be a number, .*complex64"):
        mean_field(unary, spatial_weight=torch.ones(2) + 0j)


def test_minus_infinity_is_named_where_nan_is():
    unary = torch.rand(2, 3, 4)
    unary[0, 1, 2] = -float("inf")
    with pytest.raises(ValueError, match="unary holds NaN or -inf"):
        mean_field(unary)
    with pytest.raises(ValueError, match="the unary energy holds NaN or -inf"):
        segfast.crf.DenseCRF2D(4, 3, 2).setUnaryEnergy(unary.flatten(1).numpy())
    unary[0, 1, 2] = float("inf")
    assert mean_field(unary, iterations=2)[0, 1, 2] == 0


def test_a_drop_in_takes_whole_floats_and_is_copied():
    crf = segfast.crf.DenseCRF2D(24.0, 17, 5.0, method="lattice", tolerance=0.0)
    crf.addPairwiseGaussian(3, 3)
    crf.setUnaryEnergy(np.random.default_rng(0).random((5, 24 * 17)))
    expected = crf.inference(2.0)
    for other in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
        assert np.array_equal(other.inference(2), expected)
    for wrong in (24.5, "24"):
        with pytest.raises(ValueError, match="w must be an int"):
            segfast.crf.DenseCRF2D(wrong, 17, 5)
    with pytest.raises(ValueError, match="tolerance must be a number"):
        segfast.crf.DenseCRF2D(24, 17, 5, tolerance=1)


def test_a_drop_in_chooses_as_mean_field_does(monkeypatch):
    """By how many pairs the thetas let count."""
    chosen = []

    def choose(method, points, thetas=None):
        chosen.append(thetas)
        return "exact"

    monkeypatch.setattr(segfast.crf, "choose_kernels_method", choose)
    monkeypatch.setattr(segfast.crf.DenseCRF, "_on_kernels", lambda self, dim: True)
    monkeypatch.setattr(segfast.crf, "feature_filters", lambda rows, *options: lambda values: values)
    monkeypatch.setattr(segfast.crf, "_OfOne", lambda batched, padding: batched)
    monkeypatch.setattr(segfast.crf, "normalized", lambda found, points, name: found)
    crf = segfast.crf.DenseCRF2D(6, 5, 2)
    crf.addPairwiseBilateral(80, (13, 12, 11), np.zeros((5, 6, 3)), 10)
    crf.addPairwiseEnergy(np.zeros((2, 30)), 10)
    assert chosen == [((80.0, 80.0), (13.0, 12.0, 11.0)), None]


def test_a_layer_without_an_image_and_its_repr():
    logits = torch.rand(1, 2, 5, 6)
    layer = segfast.nn.DenseCRF(2, normalization="after", tolerance=0.0)
    assert layer(logits, None).shape == logits.shape
    assert "normalization='after', tolerance=0" in repr(layer)
    assert "normalization" not in repr(segfast.nn.DenseCRF(2))
