"""Images in tiles: exactly the whole image's scores where a network's reach is finite, blended elsewhere."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segfast.models import UNet, create
from segfast.predict import NoReach, Reach, TiledPredictor, measure_reach, predict_tiled
from segfast.predict._windows import tiles
from segfast.train import predict_scores


class Coarse(nn.Module):
    """Strided convolutions and an enlargement to the image's size, as most networks end."""

    def __init__(self, align_corners=False, dilation=2):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 3, 3, 1, dilation, dilation),
        )
        self.align_corners = align_corners

    def forward(self, input):
        return F.interpolate(
            self.features(input), input.shape[2:], mode="bilinear", align_corners=self.align_corners
        )


class Pooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.local = nn.Conv2d(2, 3, 3, padding=1)
        self.image_pooling = nn.AdaptiveAvgPool2d(1)

    def forward(self, input):
        scores = self.local(input)
        return scores + self.image_pooling(scores)


def make(name):
    torch.manual_seed(0)
    if name == "coarse":
        return Coarse()
    if name == "pixels":
        return nn.Conv2d(2, 3, 1)
    if name == "fcn":
        model = create("fcn8s", in_channels=2, num_classes=3, width=2, dropout=0.0)
        for parameter in model.parameters():  # its last layers begin as zeros
            nn.init.normal_(parameter, std=0.3)
        return model
    options = {"unpadded": {"padded": False}, "upsample": {"up": "upsample"}}.get(name, {})
    return UNet(2, 3, width=2, depth=2, norm="batch", **options)


def mirrored_up(image, stride):
    """The image mirrored at its end to multiples of the stride."""
    pads = [(0, 0), *((0, -side % stride) for side in image.shape[1:])]
    return torch.from_numpy(np.pad(image.numpy(), pads, mode="symmetric"))


def scores_of(predictor, image):
    """The tiles put together, of which each pixel is in one, and how many there are."""
    parts = list(predictor(image))
    whole = torch.full((len(parts[0].scores), *image.shape[1:]), math.nan)
    for rows, columns, scores in parts:
        assert scores.shape[1:] == whole[0, rows, columns].shape and whole[:, rows, columns].isnan().all()
        whole[:, rows, columns] = scores
    assert not whole.isnan().any() and len(parts) == predictor.count(image)
    return whole


@pytest.fixture(scope="module")
def reaches():
    return {name: measure_reach(make(name), 2) for name in ("coarse", "pixels", "fcn", "padded", "unpadded")}


def test_the_measured_reach_is_that_of_the_layers(reaches):
    # Of "coarse": 2 at stride 1/4, 1 at stride 1/2, 1 at 1, and what bilinear enlargement looks further.
    assert reaches["coarse"].stride == 4 and 8 + 2 + 1 < reaches["coarse"].margin <= 24
    assert reaches["pixels"] == Reach(0, 1)
    assert reaches["fcn"].stride == 32 and not reaches["fcn"].rounded
    # Enlarged to the size of an image that is no multiple of the stride, features lie elsewhere.
    assert reaches["coarse"].rounded
    assert reaches["padded"] == Reach(24, 4) and reaches["unpadded"] == Reach(20, 4, shrinks=True)


def test_a_measured_unet_looks_no_further_than_it_says():
    class Hidden(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, input):
            return {"out": self.network(input)}

    for name in ("padded", "upsample"):
        model = make(name)
        measured, known = measure_reach(Hidden(model), 2), measure_reach(model, 2)
        assert measured.stride == known.stride and measured.margin <= known.margin and not measured.rounded


@pytest.mark.parametrize("name", ["coarse", "pixels", "fcn", "padded", "upsample", "unpadded"])
def test_exact_tiles_are_the_whole_image(name, reaches):
    model = make(name)
    tile = 96 if name == "fcn" else 32
    image = torch.rand(2, 101, 150) if tile == 32 else torch.rand(2, 97, 340)
    tiled = scores_of(TiledPredictor(model, tile, method="exact"), image)
    assert model.training
    rounded = name in reaches and reaches[name].rounded
    whole = predict_scores(model, mirrored_up(image, reaches[name].stride) if rounded else image)
    whole = whole[:, : image.shape[1], : image.shape[2]]
    largest = (tiled - whole).abs().max() / whole.abs().max()
    print(f"{name}: exact tiles differ from the whole image by {largest:.1e} of the largest score")
    assert largest <= 1e-4


def test_a_smaller_margin_is_not_exact(reaches):
    """As a reach that is measured too small would be seen."""
    model = make("coarse").eval()
    image = torch.rand(2, 96, 96)
    with torch.no_grad():
        ((whole, *_),) = ([t.scores for t in tiles(model, image, 96, 0, Reach(0, 4))],)
        for margin, exact in ((reaches["coarse"].margin, True), (8, False)):
            error = max(
                (part.scores - whole[:, part.rows, part.columns]).abs().max().item()
                for part in tiles(model, image, 32, 0, Reach(margin, 4))
            )
            assert (error <= 1e-5) == exact, (margin, error)


def test_blending_covers_and_fades(reaches):
    """Where all tiles agree the blend is theirs; elsewhere seams are small, and smaller the more overlaps."""
    image = torch.rand(2, 101, 150)
    assert torch.allclose(
        scores_of(TiledPredictor(make("pixels"), 32, method="blend", overlap=8), image),
        predict_scores(make("pixels"), image),
        atol=1e-5,
    )
    model = make("padded")
    whole = predict_scores(model, image)
    errors = []
    for overlap in (0, 16):
        found = scores_of(TiledPredictor(model, 32, method="blend", overlap=overlap), image)
        errors.append((found - whole).abs().max().item() / whole.abs().max().item())
    print("blended tiles differ from the whole image by", *(f"{e:.1e}" for e in errors), "(overlap 0, 16)")
    assert 1e-3 < errors[1] < errors[0]


def test_a_seam_is_no_step():
    """Tiles that disagree, each constant: the blend goes from one to the other slowly."""

    class Constant(nn.Module):
        calls = 0

        def forward(self, input):
            self.calls += 1
            return torch.full_like(input, self.calls % 3)

    found = scores_of(TiledPredictor(Constant(), 32, method="blend", overlap=16), torch.rand(1, 80, 80))[0]
    assert found.min() >= 0 and found.max() <= 2
    ramp = math.pi / 16 / 2
    for dim in (0, 1):
        assert 0.05 < found.diff(dim=dim).abs().max() <= 2 * ramp + 1e-5


@pytest.mark.parametrize("method", ["exact", "blend"])
def test_flips_and_scales_are_averaged(method):
    image = torch.rand(2, 40, 72)
    model = make("padded")
    options = {"tile": 32, "method": method, "flips": "both", "average": "probabilities"}
    found = scores_of(TiledPredictor(model, **options), image)
    assert torch.allclose(found.sum(0), torch.ones(40, 72), atol=1e-5)
    expected = sum(
        predict_scores(model, image.flip(dims)).flip(dims).softmax(0) for dims in ((), (1,), (2,), (1, 2))
    )
    assert ((found - expected / 4).abs().max() < 1e-4) == (method == "exact")


def test_scales_of_the_whole_image():
    image, model = torch.rand(2, 40, 72), make("padded")
    found = scores_of(TiledPredictor(model, 96, scales=(1, 0.5)), image)
    small = F.interpolate(image[None], (20, 36), mode="bilinear", antialias=True)[0]
    large = F.interpolate(predict_scores(model, small)[None], (40, 72), mode="bilinear")[0]
    torch.testing.assert_close(found, (predict_scores(model, image) + large) / 2, rtol=1e-4, atol=1e-5)


def test_flips_of_an_exact_image_of_any_size():
    """No multiple of the stride: as the image mirrored up to one."""
    image, model = torch.rand(2, 41, 70), make("padded")
    found = scores_of(TiledPredictor(model, 32, method="exact", flips="horizontal"), image)
    whole = mirrored_up(image, 4)
    expected = (predict_scores(model, whole) + predict_scores(model, whole.flip(2)).flip(2)) / 2
    torch.testing.assert_close(found, expected[:, :41, :70], rtol=1e-4, atol=1e-5)


def test_memory_is_that_of_a_tile():
    """No window is larger than a tile and its margins, however large the image."""

    class Endless:
        shape = (2, 320, 6400)
        largest = 0

        def __getitem__(self, place):
            rows, columns = (part.stop - part.start for part in place[1:])
            self.largest = max(self.largest, rows * columns)
            return torch.ones(2, rows, columns)

    image, model = Endless(), make("padded")
    sizes = {part.scores.numel() for part in TiledPredictor(model, 64, method="exact")(image)}
    assert image.largest == (64 + 2 * 24) ** 2 and max(sizes) == 3 * 64**2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Pooling(), r"image_pooling \(AdaptiveAvgPool2d\) looks at the whole image"),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(1, 4)), r"1 \(GroupNorm\) looks at the whole image"),
        (Coarse(align_corners=True), "depend on the image's size.*align_corners=True"),
    ],
)
def test_a_network_that_sees_the_whole_image_is_refused_and_blended(model, message):
    image = torch.rand(2, 64, 64)
    with pytest.raises(NoReach, match=message):
        next(TiledPredictor(model, 32, method="exact")(image))
    auto, blended = (TiledPredictor(model, 32, method=name) for name in ("auto", "blend"))
    torch.testing.assert_close(scores_of(auto, image), scores_of(blended, image))
    # An image of one tile is the whole image.
    torch.testing.assert_close(
        scores_of(TiledPredictor(model, 64, method="exact"), image), predict_scores(model, image)
    )


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
def test_our_networks_with_global_pooling_are_refused(name):
    model = create(name, in_channels=2, num_classes=3, width_mult=0.125)
    with pytest.raises(NoReach, match=r"(AdaptiveAvgPool2d|SqueezeExcite)\) looks at the whole image"):
        measure_reach(model, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile must be at least 1, got 0"),
        ({"tile": 30}, "tile must be a multiple of the network's stride, 4, got 30; the nearest is 32"),
        ({"tile": 2}, "tile must be a multiple of the network's stride, 4, got 2; the nearest is 4"),
        ({"tile": 32, "overlap": 32}, "overlap must be from 0 to half of tile=32, 16; got 32"),
        ({"tile": 32, "overlap": -1}, "overlap must be from 0"),
        (
            {"tile": 32, "overlap": 6},
            "overlap must be a multiple of the network's stride, 4, got 6; the near",
        ),
        ({"tile": 32, "overlap": 8, "method": "exact"}, "overlap is of method='blend', got 8"),
        ({"method": "best"}, "method must be one of .*'best'"),
        ({"flips": "up"}, "flips must be one of .*'up'"),
        ({"average": "votes"}, "average must be one of .*'votes'"),
        ({"scales": ()}, "scales must be positive numbers, at least one"),
        ({"scales": (1, math.nan)}, "scales must be positive numbers"),
        ({"scales": (1, 2), "method": "exact"}, "scales other than 1 are not for method='exact'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        predict_tiled(make("padded"), torch.rand(2, 64, 64), **options)


def test_images_and_networks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"image must be \[C, H, W\] and not empty, got shape \[64, 64\]"):
        predict_tiled(make("padded"), torch.rand(64, 64))
    with pytest.raises(ValueError, match=r"expected scores \[1, K, 64, 256\], got shape \[1, 3, 32, 128\]"):
        predict_tiled(nn.Conv2d(2, 3, 2, 2), torch.rand(2, 64, 64), tile=32)
    with pytest.raises(ValueError, match="cannot be measured on an image of 64x256: RuntimeError"):
        predict_tiled(nn.Conv2d(1, 3, 1), torch.rand(2, 64, 64), tile=32)
    with pytest.raises(ValueError, match="scales other than 1 are for padded networks"):
        predict_tiled(make("unpadded"), torch.rand(2, 64, 64), tile=32, scales=(1, 2))


def test_classes_of_one_score_are_those_above_a_half():
    model = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        model.weight.fill_(1)
        model.bias.fill_(-0.25)
    image = torch.linspace(0, 1, 64).reshape(1, 8, 8)
    for average in ("scores", "probabilities"):
        labels = predict_tiled(model, image, average=average)
        assert torch.equal(labels, (image[0] > 0.25).byte())


def test_nothing_of_the_callers_changes():
    model, image = make("padded"), torch.rand(2, 64, 64)
    model.encoder[0].eval()
    modes, state = [m.training for m in model.modules()], torch.random.get_rng_state()
    before = image.clone()
    predict_tiled(model, image, 32, flips="both")
    measure_reach(nn.Sequential(model), 2)
    assert [m.training for m in model.modules()] == modes and torch.equal(image, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.modules())
