"""Numbers at the edge of what can be computed: errors, warnings, or the limit's result, and never NaN."""

import re
import warnings

import numpy as np
import pytest
import torch

import segfast.crf
from segfast.crf import utils
from segfast.functional import gaussian_filter, mean_field

from .test_op import energies

INFINITE = float("inf")


def drop_in(height=6, width=7, labels=2, **options):
    return segfast.crf.DenseCRF2D(width, height, labels, **options)


@pytest.mark.parametrize("theta", [1e-13, 1e-20, 1e-22, 1e-25, 1e-30, 1e-38, 1e-42, 1e-60])
def test_standard_deviations_too_small_for_a_lattice(theta):
    unary, image = energies(2, 6, 7), 255 * torch.rand(1, 3, 6, 7)
    places = torch.rand(1, 5, 42)
    calls = [
        lambda: mean_field(unary, image, theta_beta=theta, method="lattice"),
        lambda: mean_field(unary, image, theta_alpha=theta, method="lattice"),
        lambda: drop_in().addPairwiseBilateral(3, theta, image[0].permute(1, 2, 0).numpy(), 3),
        lambda: mean_field(unary, theta_gamma=theta, method="lattice"),
        lambda: drop_in().addPairwiseGaussian(theta, 3),
        # All of them at one place far away.
        lambda: gaussian_filter(unary, torch.full((1, 2, 6, 7), min(1 / theta, 3e38)), method="lattice"),
    ]
    if theta > 1e-38:
        calls += [
            lambda: gaussian_filter(places, places / theta, method="lattice"),
            lambda: segfast.crf.DenseCRF(42, 2).addPairwiseEnergy(places[0].numpy() / theta, 3),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=r"standard deviations from zero|must be finite|positive"):
            call()


@pytest.mark.parametrize("theta", [1e-3, 1e-25, 1e-30, 1e-42, 1e-60])
def test_exact_filter_of_pixels_that_are_alone_gives_each_its_own(theta):
    unary = energies(3, 6, 7)
    alone = mean_field(unary, theta_gamma=theta, method="exact", spatial_weight=1.0, iterations=1)
    q = unary.neg().softmax(1)
    torch.testing.assert_close(alone, (q - unary).softmax(1))


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_a_pixel_that_can_be_no_label_is_an_error(method):
    unary, image = energies(3, 8, 9), 255 * torch.rand(1, 3, 8, 9)
    unary[0, :2, 4, 5] = INFINITE
    q = mean_field(unary, image, method=method)
    d = drop_in(8, 9, 3, method=method)
    d.setUnaryEnergy(unary[0].flatten(1).numpy())
    d.addPairwiseGaussian(3, 3)
    for found in (q, torch.from_numpy(d.inference(3)).view_as(q)):
        assert found.isfinite().all() and found[0, :, 4, 5].tolist() == [0, 0, 1]
    unary[0, 2, 4, 5] = INFINITE
    message = r"\+inf for all labels of a point"
    with pytest.raises(ValueError, match="unary is " + message):
        mean_field(unary, image, method=method)
    with pytest.raises(ValueError, match="unary is " + message):
        segfast.nn.DenseCRF(3, method=method)(-unary, image)
    with pytest.raises(ValueError, match="unary energy is " + message):
        d.setUnaryEnergy(unary[0].flatten(1).numpy())


@pytest.mark.parametrize("zero_unsure", [False, True])
def test_masks_are_labels(zero_unsure):
    mask = np.array([[True, False], [False, True]])
    expected = utils.unary_from_labels(mask.astype(int), 2, 0.7, zero_unsure)
    for given in (mask, mask.tolist(), torch.from_numpy(mask)):
        assert np.array_equal(utils.unary_from_labels(given, 2, 0.7, zero_unsure), expected)


TENSORS = {
    "requires grad": lambda shape: torch.zeros(shape, requires_grad=True),
    "is bfloat16, which NumPy does not have": lambda shape: torch.zeros(shape, dtype=torch.bfloat16),
    "is on meta, arrays come from the CPU": lambda shape: torch.zeros(shape, device="meta"),
}
TAKERS = {
    "u": lambda t: drop_in().setUnaryEnergy(t((2, 42))),
    "rgbim": lambda t: drop_in().addPairwiseBilateral(3, 3, t((6, 7, 3)), 3),
    "features": lambda t: drop_in().addPairwiseEnergy(t((4, 42)), 3),
    "compat": lambda t: drop_in().addPairwiseGaussian(3, t((2, 2))),
    "Q": lambda t: drop_in().klDivergence(t((2, 42))),
    "labels": lambda t: utils.unary_from_labels(t((6, 7)), 2, 0.7),
    "sm": lambda t: utils.unary_from_softmax(t((2, 6, 7))),
    "img": lambda t: utils.create_pairwise_bilateral((3, 3), 3, t((6, 7, 3)), chdim=2),
}


@pytest.mark.parametrize("message", TENSORS)
@pytest.mark.parametrize("name", TAKERS)
def test_tensors_that_numpy_cannot_take(name, message):
    with pytest.raises(ValueError, match=f"^{name} {re.escape(message)}"):
        TAKERS[name](TENSORS[message])


def test_colors_in_0_to_1_beside_a_deviation_for_0_to_255():
    unary, image = energies(2, 6, 7), torch.rand(1, 3, 6, 7)
    pixels = image[0].permute(1, 2, 0).numpy()
    calls = {
        "image is in 0..1, where theta_beta 13 sees": lambda: mean_field(unary, image),
        "image is in 0..1, where theta_beta 3 sees": lambda: segfast.nn.DenseCRF(2)(-unary, image),
        "rgbim is in 0..1, where srgb 13 sees": lambda: drop_in().addPairwiseBilateral(80, 13, pixels, 10),
    }
    for message, call in calls.items():
        with pytest.warns(UserWarning, match=re.escape(message)):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean_field(unary, 255 * image)
        mean_field(unary, image, theta_beta=0.05)
        mean_field(unary, (image > 0.5).int())
        mean_field(unary, torch.zeros_like(image))
        drop_in().addPairwiseBilateral(80, 0.05, pixels, 10)
        drop_in().addPairwiseBilateral(80, 13, (255 * pixels).astype(np.uint8), 10)
        drop_in().addPairwiseBilateral(80, 13, (pixels > 0.5).astype(np.uint8), 10)


def test_one_label_is_a_warning():
    calls = [
        lambda: mean_field(energies(1, 6, 7)),
        lambda: segfast.nn.DenseCRF(1)(torch.zeros(1, 1, 6, 7), None),
        lambda: segfast.crf.DenseCRF(42, 1),
        lambda: drop_in(labels=1),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="one label"):
            call()


@pytest.mark.parametrize("method", ["lattice", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_features_far_from_zero(method, dtype):
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(0, 8, (2, 3, 200), generator=generator).to(dtype)
    if dtype == torch.float64:
        features = features / 2 + torch.rand(2, 3, 200, generator=generator, dtype=dtype)
    values = torch.rand(2, 4, 200, generator=generator)
    far = features + torch.tensor([1e9, -3e8, 5e7]).to(dtype)[:, None]
    assert (far.float().double() - far).abs().max() > 0.9
    options = {"method": method, "normalization": "after"}
    near = features.double()
    expected = gaussian_filter(values, (near - near.mean(2, keepdim=True)).float(), **options)
    found = gaussian_filter(values, far, **options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 if method == "lattice" else 1e-5)
    if method == "lattice":
        with pytest.raises(ValueError, match="standard deviations from zero"):
            gaussian_filter(values, far.float(), **options)
    else:
        rounded = gaussian_filter(values, far.float(), **options)
        assert not (rounded - expected).abs().max() <= 0.02


def test_ordinary_features_in_float64_are_taken_as_they_are():
    """Features near zero are moved nowhere: their place in the lattice decides the result."""
    features, values = 255 * torch.rand(1, 3, 200, dtype=torch.float64), torch.rand(1, 4, 200)
    options = {"method": "lattice", "normalization": "after"}
    assert torch.equal(
        gaussian_filter(values, features, **options), gaussian_filter(values, features.float(), **options)
    )


def test_images_and_coordinates_far_from_zero():
    unary, image = energies(3, 12, 13), torch.randint(256, (1, 3, 12, 13)).double()
    pixels, far = image[0].permute(1, 2, 0).numpy(), 2.0**33
    probabilities = []
    for offset in (-image.mean((2, 3), keepdim=True), far):
        moved = image + offset
        found = [
            mean_field(unary, moved, theta_alpha=20, theta_beta=13, method="exact")[0].flatten(1).numpy()
        ]
        for features in (
            None,
            utils.create_pairwise_bilateral((20, 20), 13, moved[0].permute(1, 2, 0).numpy(), 2),
            np.concatenate([moved[0].flatten(1).numpy() / 13, np.indices((12, 13)).reshape(2, -1) / 20.0]),
        ):
            d = drop_in(12, 13, 3, method="exact")
            d.setUnaryEnergy(unary[0].flatten(1).numpy())
            if features is None:
                d.addPairwiseBilateral(20, 13, moved[0].permute(1, 2, 0).numpy(), 10)
            else:
                d.addPairwiseEnergy(features, 10)
            found.append(d.inference(5))
        probabilities.append(np.stack(found))
    assert pixels.std() > 50 and np.abs(probabilities[0] - probabilities[1]).max() < 1e-3
