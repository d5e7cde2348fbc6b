"""Hypercolumns: what every network must do, equality with the concatenation, points, checkpoints."""

import pytest
import torch
import torch.nn.functional as F

from segfast.models import create, list_models, remap_state_dict
from segfast.models.hypercolumns import draw_points
from tests.models import peers
from tests.models.tester import ModelTester

PAPER = "Hariharan, Arbelaez, Girshick, Malik"
TINY = {"width_mult": 0.125, "num_classes": 3}
NAMES = list_models("hypercolumns_*")


class TestVGG16(ModelTester):
    name = "hypercolumns_vgg16"
    paper = PAPER
    options = TINY
    parameters = 14_714_688 + 1408 * 21 + 21
    ranged = False  # max_pool2d(ceil_mode=True) asks whether its last window begins inside
    lr = 1e-3  # it has no norms


class TestResNet50(ModelTester):
    name = "hypercolumns_resnet50"
    paper = PAPER
    options = {**TINY, "levels": [0, 2, 4]}  # noqa: RUF012
    parameters = 23_508_032 + 3840 * 21 + 21
    test_compiles_into_one_graph = None  # seconds, and nothing new
    test_exports_with_dynamic_sizes = None


def small(name, **options):
    torch.manual_seed(0)
    return peers.randomize_norms(create(name, **{**TINY, **options})).eval().double()


def images(height=65, width=50):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("levels", [(1, 2, 3, 4), (4,), (3, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_concatenated_features(name, levels):
    """And the gradients: products are summed instead, which is the same for a linear classifier."""
    model = small(name, levels=levels)
    features = model.encoder(images())
    columns = [
        F.interpolate(features[level], size=(65, 50), mode="bilinear", align_corners=False)
        for level in levels
    ]
    expected, found = model.classifier(torch.cat(columns, 1)), model(images())
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected)
    weights = list(model.parameters())
    grads = [
        torch.autograd.grad(scores.square().mean(), weights, allow_unused=True)
        for scores in (found, expected)
    ]
    torch.testing.assert_close(*grads)


def test_the_concatenation_never_exists(monkeypatch):
    model = small("hypercolumns_vgg16")
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("features were concatenated"))
    enlarged = []
    interpolate = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda x, **options: enlarged.append(x.shape[1]) or interpolate(x, **options)
    )
    model(images())
    assert enlarged == [3, 3, 3, 3]


@pytest.mark.parametrize("name", NAMES)
def test_points_have_the_scores_of_their_pixels(name):
    """Those in the corners too; and the gradients of a loss over points alone."""
    model = small(name)
    points, _ = draw_points(torch.zeros(2, 65, 50), 40, torch.Generator().manual_seed(2))
    corners = torch.tensor([[0, 0], [0, 49], [64, 0], [64, 49]]).expand(2, 4, 2)
    points = torch.cat((points, corners), 1)
    full = model(images())
    rows = [scores[:, at[:, 0], at[:, 1]] for scores, at in zip(full, points, strict=True)]
    expected, found = torch.stack(rows), model(images(), points=points)
    assert found.shape == (2, 3, 44)
    torch.testing.assert_close(found, expected)
    weights = list(model.parameters())
    grads = [
        torch.autograd.grad(scores.square().mean(), weights, allow_unused=True)
        for scores in (found, expected)
    ]
    torch.testing.assert_close(*grads)


def test_points_in_bfloat16():
    """As near to the full scores as these are to those in fp32: places are not rounded to 8 bits."""
    model = small("hypercolumns_vgg16").float()
    points, _ = draw_points(torch.zeros(2, 165, 250), 200, torch.Generator().manual_seed(2))
    data = images(165, 250).float()
    with torch.autocast("cpu", torch.bfloat16):
        full, found = model(data), model(data, points=points)
    assert found.dtype is full.dtype is torch.bfloat16
    rows = [scores[:, at[:, 0], at[:, 1]] for scores, at in zip(full, points, strict=True)]
    assert (found - torch.stack(rows)).abs().max() < 0.02 * full.abs().max()


def test_training_on_points_lowers_the_loss_of_all_pixels():
    torch.manual_seed(0)
    model = create("hypercolumns_resnet50", **TINY).train()
    data, targets = TestResNet50().batch(model, (64, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    generator = torch.Generator().manual_seed(0)
    before = F.cross_entropy(model(data), targets).item()
    for _ in range(20):
        points, classes = draw_points(targets, 200, generator)
        loss = F.cross_entropy(model(data, points=points), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.cross_entropy(model(data), targets).item() < 0.8 * before


def test_points_are_drawn_over_all_of_each_image():
    targets = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    points, classes = draw_points(targets, 400, torch.Generator().manual_seed(0))
    for image in range(2):
        assert torch.equal(targets[image][points[image, :, 0], points[image, :, 1]], classes[image])
        assert torch.equal(classes[image].unique(), targets[image].flatten())
    torch.manual_seed(5)
    again = draw_points(targets, 7)
    torch.manual_seed(5)
    assert torch.equal(draw_points(targets, 7)[0], again[0])


@pytest.mark.parametrize("name", NAMES)
def test_published_classifiers(name):
    with torch.device("meta"):
        model = create(name)
        classifier = getattr(peers.torchvision().models, name.rpartition("_")[2])()
        other = peers.torchvision().models.mobilenet_v2()
    state = classifier.state_dict()
    found = remap_state_dict(state, model)
    assert {key for key in found if key.startswith("encoder.")} == {
        f"encoder.{key}" for key in state if not key.startswith(("classifier.", "fc."))
    }
    assert all(found[f"encoder.{key}"] is state[key] for key in state if f"encoder.{key}" in found)
    with pytest.raises(ValueError, match="the checkpoint has a key that"):
        remap_state_dict(other.state_dict(), model)


@pytest.mark.parametrize("levels", [(), (1, 1), (5,), (-1,)])
@pytest.mark.parametrize("name", NAMES)
def test_bad_levels(name, levels):
    with pytest.raises(ValueError, match=r"levels must be different numbers from 0 to 4, got \["):
        create(name, levels=levels)


def test_bad_points():
    model = small("hypercolumns_vgg16")
    for points in (torch.zeros(2, 5, 3).long(), torch.zeros(1, 5, 2).long(), torch.zeros(2, 5, 2)):
        with pytest.raises(ValueError, match=r"points must be int64 \[2, P, 2\], got torch"):
            model(images(), points=points)
    for row, column in ((65, 0), (0, 50), (-1, 3)):
        with pytest.raises(ValueError, match="points must lie in the image of 65x50"):
            model(images(), points=torch.tensor([row, column]).expand(2, 1, 2))
    with pytest.raises(ValueError, match=r"targets must be \[N, H, W\]"):
        draw_points(torch.zeros(5, 5), 3)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        draw_points(torch.zeros(1, 5, 5), 0)
