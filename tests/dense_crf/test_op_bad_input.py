"""Bad and odd input to the dense CRF: one error that names the argument, or the right answer; no hang."""

import math

import numpy as np
import pytest
import torch

import segfast
import segfast.crf as dcrf
from segfast.functional import gaussian_filter, mean_field
from segfast.ops.dense_crf import backend, choose_method
from segfast.ops.dense_crf.backend import choose_kernels_method

METHODS = ("lattice", "exact")
NAN, INFINITE = float("nan"), float("inf")


def scene(labels=3, size=(6, 7), batch=1):
    generator = torch.Generator().manual_seed(0)
    unary = 2 * torch.rand(batch, labels, *size, generator=generator)
    return unary, 255 * torch.rand(batch, 3, *size, generator=generator)


def gaussian(features):
    """The symmetrically normalized kernel of features [N, D], all pairs in float64."""
    kernel = torch.exp(-(features[:, None] - features).double().square().sum(2) / 2)
    sums = kernel.sum(1)
    return kernel / (sums[:, None] * sums).sqrt()


def places(size, theta):
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return torch.stack([x, y], 2).reshape(-1, 2).double() / theta


def refine(unary, kernel, iterations):
    """Mean field of one image [L, H, W] with the whole kernel [N, N], weights included."""
    energy = unary.double().flatten(1)
    q = (-energy).softmax(0)
    for _ in range(iterations):
        q = (q @ kernel.T - energy).softmax(0)
    return q.reshape(unary.shape)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


FUNCTION_MISTAKES = {
    "method must be one of 'auto', 'lattice', 'exact', got None": {"method": None},
    "normalization must be one of .* got False": {"normalization": False},
    "tolerance must be a number of at least 0 and less than 1, got '1e-2'": {"tolerance": "1e-2"},
    "tolerance must be .* got nan": {"tolerance": NAN},
    r"tolerance must be .* got 1\.5": {"tolerance": 1.5},
}


@pytest.mark.parametrize("message", FUNCTION_MISTAKES)
def test_wrong_options_of_both_functions(message):
    unary, image = scene()
    for function in (mean_field, gaussian_filter):
        with pytest.raises(ValueError, match=message):
            function(unary, image, **FUNCTION_MISTAKES[message])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": torch.rand(2, 3, 6, 7)}, r"image must be \[1, C, 6, 7\].* got \[2, 3, 6, 7\]"),
        ({"image": torch.rand(1, 0, 6, 7)}, r"image must be .* got \[1, 0, 6, 7\]"),
        ({"theta_alpha": INFINITE}, "theta_alpha must be one positive number .* got inf"),
        ({"theta_gamma": (2.0, -1.0)}, r"theta_gamma must be .* got \(2\.0, -1\.0\)"),
        ({"theta_beta": torch.tensor(INFINITE)}, "theta_beta must be positive and finite, got inf"),
        ({"theta_beta": torch.tensor(1j)}, r"theta_beta must be a number, .* got \[\], torch.complex64"),
        ({"iterations": True}, "iterations must be an int of at least 0, got True"),
        ({"bilateral_weight": NAN}, "bilateral_weight must be a finite number or a tensor, got nan"),
        ({"spatial_weight": -INFINITE}, "spatial_weight must be a finite number or a tensor, got -inf"),
        ({"theta_gamma": 1e-30, "method": "lattice"}, "one is .* standard deviations from zero"),
    ],
)
def test_more_mistakes_of_mean_field(options, message):
    unary, image = scene()
    with pytest.raises(ValueError, match=message):
        mean_field(unary, **{"image": image, **options})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_what_is_not_real_floating_point(dtype):
    unary, image = scene()
    with pytest.raises(ValueError, match=f"unary must be real floating point, got {dtype}"):
        mean_field(unary.to(dtype), image)
    with pytest.raises(ValueError, match=f"values must be real floating point, got {dtype}"):
        gaussian_filter(unary.to(dtype), image)
    if not dtype.is_complex:
        # Images may be anything real, masks too.
        assert torch.equal(mean_field(unary, image.to(dtype)), mean_field(unary, image.to(dtype).float()))


@pytest.mark.parametrize("method", METHODS)
def test_empty_batches_and_images(method):
    for batch, size in ((0, (4, 5)), (2, (0, 0)), (1, (3, 0))):
        unary, image = torch.rand(batch, 2, *size), torch.rand(batch, 3, *size)
        assert mean_field(unary, image, method=method).shape == unary.shape
        assert segfast.nn.DenseCRF(2, method=method)(unary, image).shape == unary.shape
        assert gaussian_filter(unary, image, method=method).shape == unary.shape
    assert mean_field(torch.rand(2, 0, 0), torch.rand(3, 0, 0), method=method).shape == (2, 0, 0)


def check_one_label_and_no_iterations(method):
    unary, image = scene()
    one = mean_field(unary[:, :1], image, method=method, iterations=1)
    assert torch.equal(one, torch.ones(1, 1, 6, 7))
    close(mean_field(unary, image, method=method, iterations=0), (-unary).softmax(1), 1e-6)
    layer = segfast.nn.DenseCRF(3, eval_iterations=0, method=method).eval()
    close(layer(-unary, image), (-unary).log_softmax(1), 1e-5)
    assert (segfast.nn.DenseCRF(1, eval_iterations=1, method=method).eval()(-unary[:, :1], image) == 0).all()
    d = dcrf.DenseCRF2D(7, 6, 1, method=method)
    d.setUnaryEnergy(unary[0, 0].reshape(1, -1).numpy())
    d.addPairwiseGaussian(2, 3)
    assert (d.inference(2) == 1).all() and (d.map(2) == 0).all()


def check_one_pixel(method):
    """Each of the normalized kernels is the number 1."""
    unary, image = scene(size=(1, 1), batch=2)
    actual = mean_field(unary, image, method=method, iterations=3, bilateral_weight=1.5, spatial_weight=0.5)
    for found, energy in zip(actual, unary, strict=True):
        close(found, refine(energy, torch.full((1, 1), 2.0).double(), 3), 1e-3)


def check_one_color(method):
    """The bilateral kernel is one of the places; of the lattice, which is some percent off, loosely so."""
    size = (6, 7)
    unary, _ = scene(size=size)
    # On either side of the image another label is the likelier.
    unary[:, 0, :, :3] -= 1.5
    unary[:, 1, :, 3:] -= 1.5
    image = torch.tensor([200, 7, 90], dtype=torch.uint8)[None, :, None, None].expand(1, 3, *size)
    thetas = {"theta_alpha": 3.0, "theta_gamma": 1.5}
    actual = mean_field(
        unary, image, method=method, iterations=2, bilateral_weight=3.0, spatial_weight=2.0, **thetas
    )
    expected = refine(unary[0], 3 * gaussian(places(size, 3.0)) + 2 * gaussian(places(size, 1.5)), 2)
    difference = (actual[0] - expected).abs()
    change = (expected - (-unary[0].double()).softmax(0)).abs()
    assert change.max() > 0.2
    assert difference.max() < 1e-3 if method == "exact" else difference.mean() < 0.2 * change.mean()


CHECKS = [check_one_label_and_no_iterations, check_one_pixel, check_one_color]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", CHECKS)
def test_odd_images_are_computed_right(check, method):
    check(method)


@pytest.mark.interpreter
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", CHECKS)
def test_odd_images_are_computed_right_on_our_kernels(check, method, poisoned_empty):
    with segfast.backend("triton"):
        check(method)


@pytest.mark.parametrize("method", METHODS)
def test_a_label_that_cannot_be_stays_out(method):
    unary, image = scene()
    unary[:, 0], unary[0, 1, 2, 3] = INFINITE, INFINITE
    q = mean_field(unary, image, method=method)
    assert (q[:, 0] == 0).all() and q[0, 1, 2, 3] == 0
    close(q.sum(1), torch.ones(1, 6, 7), 1e-6)


def test_more_labels_than_the_kernels_take():
    unary, image = scene(labels=300, size=(4, 5))
    unary[:, :5] -= 4
    thetas = {"theta_alpha": 4.0, "theta_beta": 90.0, "theta_gamma": 2.0}
    actual = mean_field(unary, image, method="exact", iterations=2, **thetas)
    colors = torch.cat([places((4, 5), 4.0), image[0].flatten(1).T / 90.0], 1)
    expected = refine(unary[0], 10 * gaussian(colors) + 3 * gaussian(places((4, 5), 2.0)), 2)
    close(actual[0], expected, 1e-5)
    assert (expected - (-unary[0].double()).softmax(0)).abs().max() > 0.05


def test_more_features_than_the_kernels_take():
    generator = torch.Generator().manual_seed(0)
    features = 0.7 * torch.randn(1, 12, 60, generator=generator)
    values = torch.rand(1, 4, 60, generator=generator)
    exact = gaussian_filter(values, features, method="exact", normalization="symmetric")
    close(exact[0].T, gaussian(features[0].T) @ values[0].T.double(), 1e-5)
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="needs pydensecrf2")
    results = []
    for module, options in ((densecrf, {}), (dcrf, {"method": "lattice"})):
        d = module.DenseCRF(60, 4, **options)
        d.setUnaryEnergy(values[0].numpy())
        d.addPairwiseEnergy(features[0].numpy(), 3)
        results.append(torch.from_numpy(np.array(d.inference(3))))
    close(*results, 1e-3)


@pytest.mark.interpreter
def test_the_kernels_say_what_they_do_not_take():
    unary, image = scene(labels=257, size=(2, 3))
    with segfast.backend("triton"):
        with pytest.raises(NotImplementedError, match="257 labels, the kernels take up to 256"):
            segfast.nn.DenseCRF(257)(unary, image)
        with pytest.raises(NotImplementedError, match="257 labels, the kernels take up to 256"):
            dcrf.DenseCRF2D(3, 2, 257).addPairwiseGaussian(3, 3)
        with pytest.raises(NotImplementedError, match="features of 9 dimensions"):
            dcrf.DenseCRF(6, 2).addPairwiseEnergy(np.zeros((9, 6)), 3)
        with pytest.raises(NotImplementedError, match="features of 10 dimensions"):
            mean_field(unary[:, :2], torch.rand(1, 8, 2, 3))
    # Of its own accord it takes PyTorch's operations.
    assert torch.equal(mean_field(unary, image), mean_field(unary.clone(), image))
    assert "257 labels" in backend.reason_not("triton", unary, 257, 5)


@pytest.mark.interpreter
def test_counts_that_the_kernels_integers_do_not_hold():
    def reason(points, labels, dim, batch=1):
        tensor = torch.zeros(1).expand(batch, labels, points, 1)
        return backend.reason_not("triton", tensor, labels, dim)

    assert reason(2**20, 21, 5) is None and reason(47000, 256, 8) is None
    most = (2**30 - 1) // 6
    assert reason(most, 2, 5) is None
    for points, batch in ((2**31, 1), (most + 1, 1), (2**15, 2**13)):
        assert "the kernels count below" in reason(points, 2, 5, batch)
    # The lattice would refuse more by itself.
    with pytest.raises(ValueError, match=r"B N \(D \+ 1\) < 2\*\*30"):
        segfast.kernels.dense_crf.build_permutohedral(torch.empty(1, most + 1, 5, device="meta"))
    assert "70000 images" in reason(4, 2, 5, 70000)
    # More labels make no more points.
    assert reason(2**20, 256, 5) is None


def test_more_pairs_than_32_bits_count_on_the_lattice():
    points = 47000
    assert points**2 > 2**31
    x = torch.linspace(0, 40, points, dtype=torch.float64)
    values = torch.stack([torch.ones_like(x), x.cos()])[None].float()
    one, wave = gaussian_filter(values, x[None, None].float(), method="lattice", normalization="after")[0]
    close(one, torch.ones(points), 1e-5)
    # A standard deviation of 1 damps cos(x) by exp(-1/2), where both sides are there to be seen.
    inside = slice(points // 8, -points // 8)
    close(wave[inside], math.exp(-0.5) * x.cos()[inside], 0.05)


def test_auto_counts_pairs_of_any_number():
    assert choose_method("auto", 2**40, 5) == choose_kernels_method("auto", 2**40) == "lattice"
    assert choose_kernels_method("exact", 2**40) == "exact"
    # An image of more than 2**31 pairs that the kernels still compute all of.
    assert choose_kernels_method("auto", 47000) == "exact"
