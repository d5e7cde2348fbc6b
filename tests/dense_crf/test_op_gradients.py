"""Gradients of Gaussian filtering and mean field in all they depend on, against differences in float64."""

import pytest
import torch

import segfast
from segfast.functional import gaussian_filter, mean_field, skipped_share
from segfast.ops.dense_crf.filters import feature_filter, grid_filter

from .test_op import energies

METHODS = ("lattice", "exact")
NORMALIZATIONS = ("symmetric", "before", "after", None)


def draw(*shape, seed=0, scale=1.0):
    """Normal numbers in float64 that ask for a gradient: at random, no point lies on a seam."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def all_pairs(values, features, normalization):
    """The definition, in operations that autograd knows: [N, C] and [N, D]."""
    kernel = torch.exp(-0.5 * (features[:, None] - features).square().sum(-1))
    sums = kernel.sum(1)
    left = {"symmetric": sums.rsqrt(), "after": 1 / sums}.get(normalization, torch.ones_like(sums))
    right = {"symmetric": sums.rsqrt(), "before": 1 / sums}.get(normalization, torch.ones_like(sums))
    return left[:, None] * (kernel @ (right[:, None] * values))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_filter_gradients(method, normalization):
    values, features = draw(2, 2, 3, 2), draw(2, 3, 3, 2, seed=1)

    def function(values, features):
        return gaussian_filter(values, features, method=method, normalization=normalization)

    assert torch.autograd.gradcheck(function, (values, features))
    grad_values, grad_features = torch.autograd.grad(
        function(values, features).square().sum(), (values, features)
    )
    assert grad_values.abs().max() > 1e-2 and grad_features.abs().max() > 1e-2


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_exact_gradients_are_the_matrix_s(normalization, monkeypatch):
    """With more points than a chunk takes rows."""
    monkeypatch.setattr("segfast.ops.dense_crf.exact._CHUNK", 450)
    values, features = draw(200, 3), draw(200, 4, seed=1)
    loss = draw(200, 3, seed=2).detach()
    expected = torch.autograd.grad(
        (loss * all_pairs(values, features, normalization)).sum(), (values, features)
    )
    with torch.enable_grad():
        ours = feature_filter(features, "exact", normalization)(values)
    torch.testing.assert_close(torch.autograd.grad((loss * ours).sum(), (values, features)), expected)


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_lattice_gradients_in_many_dimensions(dim):
    values, features = draw(1, 2, 40), draw(1, dim, 40, seed=dim, scale=2.0)
    assert torch.autograd.gradcheck(
        lambda f: gaussian_filter(values.detach(), f, method="lattice", normalization="after"),
        features,
        fast_mode=True,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_mean_field_gradients_in_image_and_thetas(method, normalization):
    unary, image = draw(2, 3, 3, 4), draw(2, 2, 3, 4, seed=1, scale=30.0)
    alpha, beta, gamma = (
        torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        for theta in ([2.0, 3.1], [40.0, 55.0], 1.3)
    )

    def function(unary, image, alpha, beta, gamma):
        return mean_field(
            unary,
            image,
            iterations=2,
            theta_alpha=alpha,
            theta_beta=beta,
            theta_gamma=gamma,
            bilateral_weight=2.0,
            normalization=normalization,
            method=method,
        )

    inputs = unary, image, alpha, beta, gamma
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    gradients = torch.autograd.grad(function(*inputs)[:, 0].square().sum(), inputs)
    assert [g.shape for g in gradients] == [t.shape for t in inputs]
    assert all(g.abs().max() > 1e-6 for g in gradients)


@pytest.mark.parametrize("method", METHODS)
def test_spatial_theta_gets_its_gradient(method):
    values = draw(20, 2).detach()
    theta = torch.tensor([1.7, 2.3], dtype=torch.float64, requires_grad=True)

    def function(theta):
        return grid_filter((4, 5), theta, method, "symmetric", values[:0, 0])(values)

    assert torch.autograd.gradcheck(function, theta)


@pytest.mark.parametrize("method", METHODS)
def test_learning_features_changes_no_result(method):
    values, features = draw(1, 3, 300).detach(), draw(1, 4, 300, seed=1)
    for normalization in NORMALIZATIONS:
        plain, learning = (
            gaussian_filter(values, f, method=method, normalization=normalization)
            for f in (features.detach(), features)
        )
        assert learning.requires_grad and not plain.requires_grad
        torch.testing.assert_close(learning.detach(), plain, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not gaussian_filter(values, features, method=method).requires_grad


def test_memory_of_gradients_is_linear():
    """Nothing that autograd keeps has an element for each pair of points."""
    values, features = draw(1, 2, 600), draw(1, 3, 600, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        for method in METHODS:
            gaussian_filter(values, features, method=method, normalization="symmetric")
    assert 600 <= max(kept) <= 600 * 8


def test_gradients_arrive_in_the_dtypes_given():
    unary = torch.rand(1, 2, 4, 5, dtype=torch.float16, requires_grad=True)
    image = (255 * torch.rand(1, 3, 4, 5)).to(torch.bfloat16).requires_grad_()
    theta = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    q = mean_field(unary, image, theta_beta=theta, iterations=2)
    q[:, 0].square().sum().backward()
    for tensor in (unary, image, theta):
        assert (
            tensor.grad.dtype == tensor.dtype and tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_mean_field_gradients_in_unary_and_weights(method, normalization):
    unary = energies(3, 4, 5, batch=2, dtype=torch.float64).requires_grad_()
    image = torch.randint(256, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    bilateral, compatibility = torch.rand(3, 3, generator=generator), torch.rand(3, 3, generator=generator)
    spatial = torch.rand(3, generator=generator)
    weights = [t.double().requires_grad_() for t in (bilateral, spatial, compatibility)]

    def function(unary, bilateral, spatial, compatibility):
        return mean_field(
            unary,
            image,
            iterations=2,
            theta_alpha=3,
            theta_beta=60,
            theta_gamma=1.5,
            bilateral_weight=bilateral,
            spatial_weight=spatial,
            compatibility=compatibility,
            normalization=normalization,
            method=method,
        )

    assert torch.autograd.gradcheck(function, (unary, *weights), fast_mode=True)
    grads = torch.autograd.grad(function(unary, *weights)[:, 0].sum(), (unary, *weights))
    assert all(grad.abs().max() > 1e-4 for grad in grads)


@pytest.mark.interpreter
@pytest.mark.parametrize("method", METHODS)
def test_the_kernels_way_has_the_same_gradients(method):
    """From the public functions, eager and as one operator; thetas that are tensors too."""
    unary, image = draw(1, 3, 3, 4).float(), draw(1, 2, 3, 4, seed=1, scale=30.0).float()
    thetas = [torch.tensor(theta) for theta in ([2.0, 3.1], [40.0, 55.0], 1.3)]
    inputs = [t.detach().requires_grad_() for t in (unary, image, *thetas)]

    def function(unary, image, alpha, beta, gamma):
        options = {"iterations": 1, "bilateral_weight": 2.0, "method": method, "tolerance": 0.0}
        return mean_field(
            unary, image, theta_alpha=alpha, theta_beta=beta, theta_gamma=gamma, **options
        ).square()

    expected = function(*inputs), torch.autograd.grad(function(*inputs).sum(), inputs)
    with segfast.backend("triton"):
        explanations = segfast.explain(mean_field, unary, iterations=0)
        actual = function(*inputs), torch.autograd.grad(function(*inputs).sum(), inputs)
        transformed = torch.func.grad(lambda *args: function(*args).sum(), tuple(range(5)))(*inputs)
        torch.testing.assert_close(skipped_share(image, 0.0), torch.zeros(1, 3, 4))
    assert [str(d) for d in explanations] == ["mean_field: triton (asked for by name)"]
    for ours, theirs in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        # All pairs are weighed in float16, of relative error 2^-11, and sums of either sign cancel.
        assert (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()
    torch.testing.assert_close(transformed, actual[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_odd_images(method):
    """One color, where all points lie on a seam; one label; one pixel; nothing."""
    for shape, color in (((1, 3, 4, 5), 9.0), ((1, 1, 4, 5), 0.0), ((2, 2, 1, 1), 1.0), ((0, 2, 4, 5), 1.0)):
        unary = torch.rand(shape).requires_grad_()
        image = torch.full((shape[0], 3, *shape[2:]), color).requires_grad_()
        theta = torch.tensor(13.0).requires_grad_()
        q = mean_field(unary, image, theta_beta=theta, iterations=2, method=method)
        gradients = torch.autograd.grad(q[:, :1].square().sum(), (unary, image, theta), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)
        assert shape[0] == 0 or (gradients[0] is not None and gradients[2] is not None)
