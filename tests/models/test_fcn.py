"""FCN: what every network must do, the paper's crops, any size, classifiers' weights, plain torch.nn."""

import pytest
import torch
from torch import nn

from benchmarks.plain_models import plain_model
from segfast.models import FCN, create, fcn8s, list_models, remap_state_dict
from segfast.nn import ConvTranspose2d
from tests.models import peers
from tests.models.tester import ModelTester

PAPER = "Long, Shelhamer, Darrell"
TINY = {"width": 2, "num_classes": 3}
# For torchvision's classifiers: without auxiliary heads, their weights left as they come.
BARE = {"alexnet": {}, "googlenet": {"aux_logits": False, "init_weights": False}}


def with_scores(model):
    """Scores begin as zero, which would make any two outputs equal."""
    for name, parameter in model.named_parameters():
        if name.startswith("score"):
            nn.init.normal_(parameter, std=0.3)
    return model


class FCNTester(ModelTester):
    paper = PAPER
    options = TINY
    example = (64, 96)
    ranged = False  # max_pool2d(ceil_mode=True) asks whether its last window begins inside

    def build(self, **overrides):
        return with_scores(super().build(**overrides))


class TestFCN8s(FCNTester):
    name = "fcn8s"
    parameters = 134_489_759


class TestFCN8sUnpadded(FCNTester):
    name = "fcn8s"
    options = {**TINY, "padded": False, "dropout": 0.1}  # noqa: RUF012
    parameters = 134_489_759
    test_compiles_into_one_graph = None  # seconds, and nothing new


class TestFCN16s(FCNTester):
    name = "fcn16s"
    parameters = 134_815_994
    test_compiles_into_one_graph = None
    test_exports_with_dynamic_sizes = None


class TestFCN32s(FCNTester):
    name = "fcn32s"
    parameters = 136_152_917
    test_compiles_into_one_graph = None
    test_exports_with_dynamic_sizes = None


class TestFCN8sAlexNet(FCNTester):
    name = "fcn8s_alexnet"
    parameters = 57_202_458
    test_compiles_into_one_graph = None
    test_exports_with_dynamic_sizes = None


class TestFCN16sAlexNetUnpadded(FCNTester):
    name = "fcn16s_alexnet"
    options = {**TINY, "padded": False}  # noqa: RUF012
    sizes = ((35, 35), (36, 67), (83, 50))
    parameters = 57_521_700

    def batch(self, model, size=(65, 67), count=2):
        return super().batch(model, size, count)

    test_empty_batch = None  # of 32x32
    test_compiles_into_one_graph = None
    test_exports_with_dynamic_sizes = None


class TestFCN8sGoogLeNet(FCNTester):
    name = "fcn8s_googlenet"
    options = {"width": 8, "num_classes": 3}  # noqa: RUF012
    sizes = ((15, 15), (32, 48), (37, 50))
    parameters = 5_745_833
    test_compiles_into_one_graph = None
    test_exports_with_dynamic_sizes = None

    def build(self, **overrides):
        model = super().build(**overrides)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(2.5)  # as much as keeps the signal's size over so many layers
        return model

    def batch(self, model, size=(65, 67), count=2):
        return super().batch(model, size, count)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("fcn32s_alexnet", 58_840_206), ("fcn32s_googlenet", 7_371_758), ("fcn16s_googlenet", 6_062_387)],
)
def test_parameters_are_the_classifiers_and_those_of_the_scores(name, parameters):
    """All of the classifier but its last layer; and a square kernel for each pair of classes."""
    with torch.device("meta"):
        model = create(name)
        theirs = getattr(peers.torchvision().models, model.backbone)(num_classes=21, **BARE[model.backbone])
    enlarging = sum(21**2 * step.kernel**2 for step in model.steps)
    skips = sum(p.numel() for key, p in model.named_parameters() if key.startswith("score_pool"))
    expected = sum(p.numel() for p in theirs.parameters()) + enlarging + skips
    assert sum(p.numel() for p in model.parameters()) == expected == parameters


@pytest.mark.parametrize(
    ("name", "kernels", "offsets"),
    [
        ("fcn32s", [64], [19]),
        ("fcn16s", [4, 32], [-5, 27]),
        ("fcn8s", [4, 4, 16], [-5, -9, 31]),
        ("fcn32s_alexnet", [63], [18]),
    ],
)
def test_kernels_and_crops_are_the_papers(name, kernels, offsets):
    """Of the published voc-fcn32s, -16s, -8s and -alexnet: those of the skips, then that of the image."""
    with torch.device("meta"):
        steps = create(name).steps
    assert [step.kernel for step in steps] == kernels and [step.offset for step in steps] == offsets


# Of each network, padded and not: where in the image the first of its coarse scores stands, and how many of
# them there are more than features. 32 pixels are pooled into one.
PLACES = {
    ("vgg16", True): (15.5 + 3 * 32 - 99, -6),
    ("vgg16", False): (15.5, 0),
    ("alexnet", True): (31 + 2.5 * 32 - 98, -5),
    ("alexnet", False): (31 - 0.5 * 32, 1),
    ("googlenet", False): (22.0, 0),
}
BACKBONES = pytest.mark.parametrize(("backbone", "padded"), PLACES, ids=str)
STRIDES = pytest.mark.parametrize("stride", [32, 16, 8])


@BACKBONES
@STRIDES
def test_every_size(backbone, padded, stride):
    """Enlarged scores cover skips and image at every remainder of the five poolings."""
    model = FCN(1, backbone=backbone, stride=stride, padded=padded, width=1).eval()
    nn.init.ones_(model.score_fr.bias)  # all else that makes scores is zero
    with torch.no_grad():
        for height in range(model.smallest, model.smallest + 67):
            width = 2 * model.smallest + 67 - height
            scores = model(torch.zeros(1, 3, height, width))
            assert scores.shape == (1, 1, height, width) and scores.is_contiguous()
            assert scores.min() > 0


@BACKBONES
@STRIDES
def test_scores_stay_where_they_belong(backbone, padded, stride, monkeypatch):
    """Coarse scores that say where their pixels stand in the image become each pixel's own row."""
    model = FCN(1, backbone=backbone, stride=stride, padded=padded, width=1).eval()
    first, more = PLACES[backbone, padded]

    def rows(self, pool):
        n = [side + more for side in pool.shape[2:]]
        return (first + 32 * torch.arange(n[0])[None, None, :, None]).expand(1, 1, *n)

    monkeypatch.setattr(FCN, "_scores", rows)
    with torch.no_grad():
        scores = model(torch.zeros(1, 3, 201, 197))[0, 0, 48:152, 48:152]
    torch.testing.assert_close(scores, torch.arange(48.0, 152.0)[:, None].expand_as(scores))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", [name for name in list_models("fcn*s_*") if name.endswith("net")])
def test_images_that_are_too_small(name, axis):
    """One that is not, by a pixel, and one that is."""
    options = {"padded": False} if "alexnet" in name else {}
    model = create(name, width=8, **options).eval()
    assert model.smallest == (35 if options else 15)
    side = model.smallest
    model(torch.zeros(1, 3, side, side))
    size = [64, 64]
    size[axis] = side - 1
    message = f"input is {size[0]}x{size[1]}; {name} needs at least {side}x{side} for its poolings"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 51)])
def test_computes_what_plain_torch_computes(height, width):
    torch.manual_seed(0)
    plain, _ = plain_model("fcn8s_vgg16", small=True)
    model = fcn8s(width=16)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            ours.copy_(theirs)
    images = torch.randn(1, 3, height, width)
    results = []
    for network in (model.eval(), plain.eval()):
        scores = network(images)
        weights = list(network.parameters())
        results.append((scores, torch.autograd.grad(scores.square().mean(), weights)))
    (ours, our_grads), (theirs, their_grads) = results
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    for (name, _), grad, expected in zip(model.named_parameters(), our_grads, their_grads, strict=True):
        assert (grad - expected).abs().max() <= 1e-3 * expected.abs().max(), name


def test_initial_weights_are_the_papers():
    torch.manual_seed(0)
    model = fcn8s(width=16)
    for name, module in model.named_children():
        if isinstance(module, ConvTranspose2d):
            assert module.kernel_size[0] == 2 * module.stride[0] and module.bias is None
            assert torch.equal(module.weight[0, 0], module.weight[20, 20]) and not module.weight[0, 1].any()
            assert module.weight[0, 0].sum().item() == pytest.approx(module.stride[0] ** 2)
            assert module.weight.requires_grad
        elif name.startswith("score"):
            assert not module.weight.any() and not module.bias.any()
    assert not model.eval()(torch.randn(1, 3, 40, 40)).any()
    assert model.conv3_2.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("name", ["fcn16s", "fcn8s_alexnet", "fcn32s_googlenet"])
def test_class_scores_are_the_classifiers(name):
    """At 224x224 the pixel in the middle of the coarse map sees what the linear layers see."""
    with torch.device("meta"):
        options = {"transform_input": True} if "google" in name else {"padded": False}
        model = create(name, **options).eval()
    torch.manual_seed(0)
    bare = {"init_weights": False, "transform_input": True} if "google" in name else {}
    classifier = getattr(peers.torchvision().models, model.backbone)(num_classes=21, **bare)
    peers.randomize_norms(classifier).eval()
    state = remap_state_dict(classifier.state_dict(), model)
    kept = {key: torch.zeros(value.shape) for key, value in state.items() if value.is_meta}
    assert all(key.startswith(("score_pool", "upscore")) for key in kept)
    model.load_state_dict(state | kept, assign=True)
    first = next(iter(classifier.state_dict().values()))
    assert next(iter(state.values())).data_ptr() == first.data_ptr()  # not copied
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = classifier(image), model.heat_map(image)
    assert found.shape == (1, 21, 7, 7) and expected.std() > 1e-3
    found = found.mean((2, 3)) if "google" in name else found[:, :, 3, 3]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("name", "other"), [("fcn8s", "alexnet"), ("fcn8s_googlenet", "vgg16")])
def test_another_classifiers_weights(name, other):
    with torch.device("meta"):
        state = getattr(peers.torchvision().models, other)().state_dict()
        model = create(name)
    with pytest.raises(ValueError, match=r"the checkpoint has (a key that is neither FCN's|\[)"):
        remap_state_dict(state, model)


class TestVGG16:
    """torchvision's classifier, its linear layers turned into convolutions."""

    def test_other_classes_are_left(self):
        """ImageNet's thousand classes are not read; scores and enlarging layers stay as they are."""
        with torch.device("meta"):
            state = peers.torchvision().models.vgg16().state_dict()
            model = fcn8s()
        found = remap_state_dict({"module." + key: value for key, value in state.items()}, model)
        theirs = {id(value) for value in state.values()}
        taken = {key for key, value in found.items() if id(value) in theirs}
        # The two that are reshaped, and by that other tensors.
        taken |= {"fc6.weight", "fc7.weight"}
        assert taken == {key for key in model.state_dict() if not key.startswith(("score", "upscore"))}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("classifier.3.bias"), "the checkpoint has nothing for fc7.bias"),
            (
                lambda state: state.update({"features.1.weight": torch.zeros(64)}),
                r"neither FCN's own nor VGG16's: features\.1\.weight",
            ),
            (
                lambda state: state.update({"classifier.0.weight": torch.zeros(8, 9)}),
                r"fc6.weight: the checkpoint has \[8, 9\], the model \[4096, 512, 7, 7\]",
            ),
        ],
    )
    def test_damaged_checkpoints(self, change, message):
        with torch.device("meta"):
            state = dict(peers.torchvision().models.vgg16().state_dict())
            model = fcn8s()
        change(state)
        with pytest.raises(ValueError, match=message):
            remap_state_dict(state, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": -1}, "in_channels must be at least 1, got -1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"stride": 4}, r"stride must be one of \(8, 16, 32\), got 4"),
        ({"backbone": "vgg19"}, r"backbone must be one of \('vgg16', 'alexnet', 'googlenet'\), got 'vgg19'"),
        ({"backbone": "googlenet", "padded": True}, "padded is for a backbone with an fc6"),
        ({"transform_input": True}, "transform_input is for 'googlenet' with 3 input channels, got 'vgg16'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        FCN(**options)
