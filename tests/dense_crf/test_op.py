"""Gaussian filtering and mean field against all pairs in float64, written out, and against pydensecrf."""

import numpy as np
import pytest
import torch

import segfast
from segfast.functional import gaussian_filter, mean_field
from segfast.ops import dense_crf
from segfast.ops.dense_crf import inference
from segfast.ops.dense_crf.lattice import Lattice

METHODS = ("lattice", "exact")


def photo(name: str, height: int, width: int) -> np.ndarray:
    """A crop of one of scikit-image's photographs, every second pixel: uint8 [height, width, 3]."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image's photographs")
    image = getattr(data, name)()[60 : 60 + 2 * height : 2, 80 : 80 + 2 * width : 2, :3]
    return np.ascontiguousarray(image)


def energies(labels: int, height: int, width: int, batch: int = 1, dtype=torch.float32) -> torch.Tensor:
    """Unary energies that vary slowly over the image, as a network's do: [batch, labels, height, width]."""
    coarse = torch.randn(batch, labels, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.nn.functional.interpolate(2 * coarse, (height, width), mode="bilinear")
    return -logits.log_softmax(1).to(dtype)


def kernel_matrix(features: torch.Tensor) -> torch.Tensor:
    """[N, N] of features [N, D]."""
    return torch.exp(-0.5 * (features[:, None] - features).square().sum(-1))


def normalized_matrix(features: torch.Tensor, normalization: str | None) -> torch.Tensor:
    kernel = kernel_matrix(features)
    sums = kernel.sum(1)
    match normalization:
        case "symmetric":
            return kernel / (sums[:, None] * sums).sqrt()
        case "before":
            return kernel / sums
        case "after":
            return kernel / sums[:, None]
    return kernel


def brute_force(
    unary, image, iterations, alpha, beta, gamma, bilateral, spatial, compatibility, normalization
):
    """Mean field of one image in float64; bilateral, spatial and compatibility as [L, L] matrices."""
    labels, height, width = unary.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    xy = torch.stack([x, y], -1).reshape(-1, 2).double()
    colors = image.flatten(1).T.double() / torch.tensor(beta, dtype=torch.float64)
    kernels = [
        (normalized_matrix(torch.cat([xy / torch.tensor(alpha), colors], 1), normalization), bilateral),
        (normalized_matrix(xy / torch.tensor(gamma), normalization), spatial),
    ]
    energy = unary.flatten(1).double()
    q = (-energy).softmax(0)
    for _ in range(iterations):
        message = sum(weight @ q @ kernel.T for kernel, weight in kernels)
        q = (-energy - compatibility @ message).softmax(0)
    return q.reshape(labels, height, width)


@pytest.mark.parametrize("normalization", ["symmetric", "before", "after", None])
def test_exact_filter_is_the_matrix(normalization):
    features, values = torch.randn(2, 3, 7, 9).double(), torch.randn(2, 4, 7, 9).double()
    actual = gaussian_filter(values, features, method="exact", normalization=normalization)
    for value, feature, result in zip(values, features, actual, strict=True):
        matrix = normalized_matrix(feature.flatten(1).T, normalization)
        torch.testing.assert_close(result.flatten(1).T, matrix @ value.flatten(1).T)
    single = gaussian_filter(values.float(), features.float(), method="exact", normalization=normalization)
    torch.testing.assert_close(single, actual.float(), rtol=1e-4, atol=1e-5)


def test_exact_filter_needs_no_more_than_a_chunk_of_the_matrix(monkeypatch):
    features, values = torch.randn(1, 3, 200).double(), torch.randn(1, 2, 200).double()
    whole = gaussian_filter(values, features, method="exact")
    monkeypatch.setattr("segfast.ops.dense_crf.exact._CHUNK", 450)
    torch.testing.assert_close(gaussian_filter(values, features, method="exact"), whole)


def test_far_points_are_strangers():
    features = torch.tensor([[[0.0, 1e3, 2e3]]])
    for method in METHODS:
        result = gaussian_filter(torch.eye(3)[None], features, method=method, normalization="after")
        torch.testing.assert_close(result, torch.eye(3)[None])


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_lattice_is_near_the_matrix(dim):
    """It errs by some percent: what is sharp is the comparison with pydensecrf."""
    generator = torch.Generator().manual_seed(dim)
    features = torch.rand(1, dim, 600, generator=generator).double() * 3 / dim**0.5
    values = torch.rand(1, 3, 600, generator=generator).double()
    lattice, exact = (
        gaussian_filter(values, features, method=method, normalization="symmetric") for method in METHODS
    )
    varies = (exact - exact.mean()).abs().mean()
    assert 0 < (lattice - exact).abs().mean() < 0.4 * varies


def test_lattice_weights_and_vertices():
    """Every point is the weighted mean of its vertices, and neighbors are mutual."""
    features = torch.randn(300, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    lattice = Lattice(features)
    assert lattice.weights.min() > -1e-12
    torch.testing.assert_close(lattice.weights.sum(1), torch.ones(300).double())
    vertices = lattice.slice.rows.reshape(300, 5).long()
    assert vertices.unique().numel() == lattice.vertices
    # The features are a linear function of the vertices, so that of all N x 5 they follow from the weights.
    spread = torch.zeros(300, lattice.vertices).double().scatter_(1, vertices, lattice.weights)
    places = torch.linalg.lstsq(spread, features, driver="gelsd").solution
    torch.testing.assert_close(spread @ places, features, atol=1e-8, rtol=1e-8)
    for blur in lattice.blurs:
        _, after, before = blur.rows.reshape(-1, 3).T.long()
        mutual = after < lattice.vertices
        assert torch.equal(before[after[mutual]], mutual.nonzero().flatten())
        assert mutual.any() and int((before < lattice.vertices).sum()) == int(mutual.sum())


def test_lattice_chunks_do_not_show(monkeypatch):
    features, values = torch.randn(1, 3, 500), torch.randn(1, 2, 500)
    whole = gaussian_filter(values, features, method="lattice")
    monkeypatch.setattr("segfast.ops.dense_crf.chunks._ROWS_AT_ONCE", 7)
    assert torch.equal(gaussian_filter(values, features, method="lattice"), whole)


def test_wide_lattices_take_wide_integers():
    """Shifted by a few thousand cells along every axis, half of the points keep to themselves."""
    near = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0)).double()
    values = torch.randn(1, 2, 100, generator=torch.Generator().manual_seed(1)).double()
    # A lattice vector: (d + 1) sqrt(2 / 3) / sqrt((i + 1) (i + 2)) scales feature i.
    features = torch.cat([near, near + 2e3], 2)
    actual = gaussian_filter(values, features, method="lattice", normalization="after")
    first = gaussian_filter(values[..., :50], near, method="lattice", normalization="after")
    torch.testing.assert_close(actual[..., :50], first)
    with pytest.raises(ValueError, match=r"features: they span 2\*\*\d+ lattice cells"):
        gaussian_filter(values, features * 1e6, method="lattice")


@pytest.mark.parametrize("method", METHODS)
def test_learning_and_inference_agree(method, monkeypatch):
    """Without gradients the iterations run by chunks, in place."""
    monkeypatch.setattr("segfast.ops.dense_crf.chunks._ROWS_AT_ONCE", 64)
    unary, image = energies(4, 20, 22, batch=2), torch.rand(2, 3, 20, 22) * 255
    options = {"iterations": 3, "bilateral_weight": torch.tensor([4.0, 5.0, 6.0, 7.0]), "method": method}
    plain = mean_field(unary, image, **options)
    learning = mean_field(unary.clone().requires_grad_(), image, **options)
    assert learning.requires_grad and not plain.requires_grad
    torch.testing.assert_close(learning.detach(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", ["symmetric", "before", "after", None])
def test_exact_mean_field_is_the_formula(normalization):
    image = torch.from_numpy(photo("astronaut", 11, 13)).permute(2, 0, 1)[None]
    unary, eye = energies(4, 11, 13, dtype=torch.float64), torch.eye(4).double()
    weight = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).double()
    actual = mean_field(
        unary,
        image,
        iterations=4,
        theta_alpha=(6, 4),
        theta_beta=(13, 20, 30),
        theta_gamma=(1, 2),
        bilateral_weight=weight,
        spatial_weight=0.25,
        compatibility=1.5,
        normalization=normalization,
        method="exact",
    )
    arguments = (4, (6, 4), (13, 20, 30), (1, 2), weight, 0.25 * eye, -1.5 * eye, normalization)
    expected = brute_force(unary[0], image[0], *arguments)
    torch.testing.assert_close(actual[0], expected, rtol=1e-9, atol=1e-9)
    assert (expected - (-unary[0]).softmax(0)).abs().max() > 0.1


def test_forms_of_weights_and_compatibility():
    unary, image = energies(3, 9, 8), torch.rand(1, 3, 9, 8) * 255

    def run(**options):
        return mean_field(unary, image, iterations=3, method="exact", **options)

    expected = run(compatibility=2.0, bilateral_weight=4.0, spatial_weight=1.5)
    eye, ones = torch.eye(3), torch.ones(3)
    for compatibility in (torch.tensor(2.0), -2.0 * ones, -2.0 * eye):
        for bilateral in (torch.tensor(4.0), 4.0 * ones, 4.0 * eye):
            actual = run(compatibility=compatibility, bilateral_weight=bilateral, spatial_weight=1.5 * ones)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    # 1 for each two different labels is Potts by another constant.
    torch.testing.assert_close(
        run(compatibility=2.0 * (1 - eye), bilateral_weight=4.0, spatial_weight=1.5), expected
    )
    rows = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    q = run(compatibility=rows)
    assert (q[:, 0] < run(compatibility=0.0)[:, 0] + 1e-6).all(), "label 0 pays for label 1, not the reverse"
    torch.testing.assert_close(run(bilateral_weight=0.0), mean_field(unary, iterations=3, method="exact"))


def test_the_compatibility_applies_to_what_the_weight_returns():
    filtered = torch.rand(6, 3)
    forms = torch.rand(2, 3, 3).unbind(0), torch.rand(2, 3).unbind(0)
    for compatibility, _ in forms:
        for _, weight in forms:
            both = [t if t.dim() == 2 else t.diag() for t in (weight, compatibility)]
            actual = inference.apply_compatibility(inference.compose(compatibility, weight), filtered)
            torch.testing.assert_close(actual, filtered @ both[0].T @ both[1].T)


def test_batch_layout_dtype_and_no_iterations():
    unary, image = energies(5, 12, 10, batch=3), torch.rand(3, 3, 12, 10) * 255
    whole = mean_field(unary, image)
    for i in range(3):
        torch.testing.assert_close(mean_field(unary[i], image[i]), whole[i])
    torch.testing.assert_close(whole.sum(1), torch.ones(3, 12, 10))
    last = mean_field(unary.contiguous(memory_format=torch.channels_last), image)
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, whole)
    assert whole.is_contiguous()
    for dtype in (torch.float16, torch.bfloat16):
        half = mean_field(unary.to(dtype), image.to(dtype))
        assert half.dtype == dtype
        full = mean_field(unary.to(dtype).float(), image.to(dtype).float())
        assert torch.equal(half, full.to(dtype))
    torch.testing.assert_close(mean_field(unary, image, iterations=0), (-unary).softmax(1))
    assert torch.equal(mean_field(unary, image), whole), "the same call gave another result"


def test_256_labels_of_an_image_with_one_channel():
    assert mean_field(energies(256, 3, 4), torch.rand(1, 1, 3, 4), theta_beta=[0.1]).isfinite().all()


def test_more_pairs_than_32_bits_count():
    points = 46400
    features = torch.linspace(0, 3, points)[None, None]
    sums = gaussian_filter(torch.ones_like(features), features, method="exact").flatten()
    integral = torch.erf(torch.tensor(3 / 2**0.5)) * (torch.pi / 2) ** 0.5
    torch.testing.assert_close(sums[[0, -1]], (points / 3 * integral).expand(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_theta_tensors_are_their_numbers(method):
    unary, image = energies(3, 7, 8, batch=2), torch.rand(2, 3, 7, 8) * 255

    def run(*thetas):
        names = ("theta_alpha", "theta_beta", "theta_gamma")
        return mean_field(unary, image, iterations=3, method=method, **dict(zip(names, thetas, strict=True)))

    tensors = torch.tensor(20), torch.tensor([30.0, 40, 50]), torch.tensor([2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(run(*tensors), run(20, (30, 40, 50), (2.0, 3.0)))


def test_tolerance_skips_nothing_on_a_cpu():
    values, features = torch.randn(2, 3, 5, 6), 9 * torch.randn(2, 4, 5, 6)
    every, some = (gaussian_filter(values, features, method="exact", tolerance=t) for t in (0, 0.9))
    assert torch.equal(every, some)
    share = segfast.functional.skipped_share(features.double().requires_grad_(), tolerance=0.5)
    assert share.shape == (2, 5, 6) and share.dtype == torch.float64
    assert torch.equal(share, torch.zeros_like(share)) and not share.requires_grad
    assert segfast.functional.skipped_share(features.half()[:0]).shape == (0, 5, 6)
    for mistake in (features[0, 0], features[:, :0]):
        with pytest.raises(ValueError, match=r"features must be \[B, D, \.\.\.\]"):
            segfast.functional.skipped_share(mistake)
    with pytest.raises(ValueError, match="features must be finite"):
        segfast.functional.skipped_share(features / 0)
    with pytest.raises(ValueError, match=r"tolerance must be .* got 1\.5"):
        segfast.functional.skipped_share(features, 1.5)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta_alpha": 0}, "theta_alpha must be one positive number or 2 of them, got 0"),
        ({"theta_beta": -1.0}, r"theta_beta must be one positive number or 3 of them, got -1\.0"),
        ({"theta_beta": (1, 2)}, r"theta_beta must be .*3 of them, got \(1, 2\)"),
        ({"theta_gamma": NAN}, "theta_gamma must be .* got nan"),
        ({"iterations": -1}, "iterations must be an int of at least 0, got -1"),
        ({"iterations": 1.5}, "iterations must be an int"),
        ({"method": "fast"}, "method must be one of 'auto', 'lattice', 'exact', got 'fast'"),
        ({"normalization": "none"}, "normalization must be one of .* got 'none'"),
        ({"image": torch.rand(1, 3, 5, 4)}, r"image must be \[1, C, 4, 4\].* got \[1, 3, 5, 4\]"),
        ({"image": torch.full((1, 3, 4, 4), NAN)}, "image must be finite"),
        ({"image": torch.full((1, 3, 4, 4), INFINITE)}, "image must be finite"),
        (
            {"image": torch.rand(1, 3, 4, 4) * 1e30, "theta_beta": 1e-10},
            "image must be finite, and be so divided",
        ),
        ({"image": torch.rand(1, 3, 4, 4, dtype=torch.complex64)}, "image must be real"),
        ({"theta_alpha": torch.tensor(0.0)}, r"theta_alpha must be positive and finite, got 0\.0"),
        (
            {"theta_beta": torch.tensor([1.0, -2, 3])},
            r"theta_beta must be positive .* got \[1\.0, -2\.0, 3\.0\]",
        ),
        ({"theta_gamma": torch.tensor([1.0, NAN])}, "theta_gamma must be positive and finite"),
        ({"theta_gamma": torch.ones(3)}, r"theta_gamma must be a number, \[\] or \[2\] on cpu, got \[3\]"),
        ({"theta_beta": torch.ones(1, 3)}, r"theta_beta must be a number, \[\] or \[3\]"),
        ({"tolerance": 1.0}, r"tolerance must be .* got 1\.0"),
        ({"tolerance": -1e-3}, r"tolerance must be a number of at least 0 and less than 1, got -0\.001"),
        ({"tolerance": NAN}, "tolerance must be .* got nan"),
        ({"tolerance": True}, "tolerance must be .* got True"),
        ({"unary": torch.rand(4, 4)}, r"unary must be \[B, L, H, W\]"),
        ({"unary": torch.rand(1, 0, 4, 4)}, "unary must be"),
        ({"unary": torch.full((1, 2, 4, 4), NAN)}, "unary holds NaN"),
        ({"unary": torch.ones(1, 2, 4, 4, dtype=torch.int64)}, "unary must be real floating point"),
        ({"compatibility": torch.rand(3)}, r"compatibility must be a number, \[2\] or \[2, 2\]"),
        ({"bilateral_weight": torch.rand(2, 3)}, r"bilateral_weight must be .* got \[2, 3\]"),
        ({"spatial_weight": "3"}, "spatial_weight must be a finite number or a tensor, got '3'"),
    ],
)
def test_mistakes_of_mean_field(options, message):
    arguments = {"unary": torch.rand(1, 2, 4, 4), "image": torch.rand(1, 3, 4, 4), **options}
    with pytest.raises(ValueError, match=message):
        mean_field(arguments.pop("unary"), arguments.pop("image"), **arguments)


@pytest.mark.parametrize(
    ("values", "features", "message"),
    [
        (torch.rand(2, 4), torch.rand(2, 4), "values must be"),
        (torch.rand(1, 2, 4), torch.rand(1, 2, 5), "features must be"),
        (torch.rand(1, 2, 4), torch.rand(2, 2, 4), "features must be"),
        (torch.rand(1, 2, 4), torch.rand(1, 0, 4), "features must be"),
        (torch.rand(1, 2, 4), torch.full((1, 2, 4), NAN), "features must be finite"),
        (torch.rand(1, 2, 4), torch.rand(1, 2, 4, dtype=torch.complex64), "features must be real"),
    ],
)
def test_mistakes_of_gaussian_filter(values, features, message):
    with pytest.raises(ValueError, match=message):
        gaussian_filter(values, features)


def test_auto_takes_the_cheaper():
    assert dense_crf.choose_method("auto", 64, 5) == "exact"
    assert dense_crf.choose_method("auto", 321 * 321, 5) == "lattice"
    assert dense_crf.choose_grid_method("auto", (16, 16)) == "exact"
    assert dense_crf.choose_grid_method("auto", (512, 512)) == "lattice"
    assert dense_crf.choose_grid_method("exact", (512, 512)) == "exact"
    small, image = energies(2, 6, 6), torch.rand(1, 3, 6, 6)
    assert torch.equal(mean_field(small, image), mean_field(small, image, method="exact"))
    assert "mean_field" in segfast.functional.__all__ and "gaussian_filter" in segfast.functional.__all__
