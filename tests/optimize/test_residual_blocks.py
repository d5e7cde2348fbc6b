"""`segfast.optimize` fuses torchvision's residual blocks: one operator per convolution, with the addition."""

import copy

import pytest
import torch
from torch import nn

import segfast
from segfast.commands._load_model import import_torchvision
from segfast.nn._fused import eager
from segfast.nn._fused.residual_block import Block
from tests.fused_conv import draw
from tests.optimize.separable_networks import operations, reasons, same
from tests.separable_conv2d.test_module import trained

pytestmark = pytest.mark.usefixtures("fused_at_any_size")

C = 8
BOTTLENECK = "conv1 + bn1 + relu, conv2 + bn2 + relu, conv3 + bn3 + addition + relu"
SHORTCUT = "conv1 + bn1 + relu, conv2 + bn2 + relu, downsample, conv3 + bn3 + addition + relu"
BASIC = "conv1 + bn1 + relu, conv2 + bn2 + addition + relu"


@pytest.fixture
def x():
    return draw(2, C, 9, 8)


def shortcut(channels, stride=1):
    return nn.Sequential(nn.Conv2d(C, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def bottleneck(*args, **options):
    import_torchvision()
    from torchvision.models.resnet import Bottleneck

    return Bottleneck(C, *args, **options)


def basic(*args, **options):
    import_torchvision()
    from torchvision.models.resnet import BasicBlock

    return BasicBlock(C, *args, **options)


MAKERS = {
    "bottleneck": lambda: bottleneck(2),
    "bottleneck, shortcut": lambda: bottleneck(3, 2, shortcut(12, 2)),
    "bottleneck, dilated": lambda: bottleneck(2, dilation=2),
    "bottleneck, groups": lambda: bottleneck(2, groups=2, base_width=128),
    "basic": lambda: basic(C),
    "basic, shortcut": lambda: basic(6, 2, shortcut(6, 2)),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def block(request):
    return trained(nn.Sequential(request.param())).eval()


@pytest.fixture
def model():
    """A fused block and, for comparison, its layers."""
    return segfast.optimize(trained(bottleneck(3, 1, shortcut(12))).eval())


def plain(model):
    return segfast.restore(copy.deepcopy(model))


def is_fused(model, x, monkeypatch):
    """True if a block in `model` is computed as a whole; its outputs are its layers' either way."""
    ran, run = [], Block.run
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(Block, "run", lambda *args: ran.append(args) or run(*args))
        torch.testing.assert_close(model(x), plain(model)(x), atol=1e-5, rtol=1e-5)
    return bool(ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("example", [False, True], ids=["", "example"])
def test_same_result(block, dtype, example, monkeypatch):
    x = draw(2, C, 9, 8, dtype=dtype)
    block = block.to(dtype)
    model = segfast.optimize(block, x if example else None)
    for pixels in (x, x.contiguous(memory_format=torch.channels_last), x[:1, :, :1, :1]):
        with torch.no_grad():
            torch.testing.assert_close(model(pixels), block(pixels), atol=1e-5, rtol=1e-5)
    assert is_fused(model, x, monkeypatch)


def test_one_operator_for_each_convolution(block, x):
    model = segfast.optimize(block)
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        assert operations(model, x) == ["conv2d"] * len(convolutions)


def test_16_bits_are_as_exact_as_the_layers(block, x):
    x = x.bfloat16()
    model, layers = segfast.optimize(block).bfloat16(), copy.deepcopy(block).bfloat16()
    exact = copy.deepcopy(layers).double()
    with torch.no_grad():
        expected = exact(x.double())
        error, theirs = ((m(x).double() - expected).abs().max() for m in (model, layers))
        assert operations(model, x)
    assert error <= 1.5 * theirs
    # With gradients they are the layers themselves.
    torch.testing.assert_close(model(x), layers(x), atol=0, rtol=0)


def test_gradients_and_training(block, x):
    model = segfast.optimize(block)
    same(model, x)
    model.train()
    layers = plain(model)
    torch.testing.assert_close(model(x), layers(x), atol=0, rtol=0)
    torch.testing.assert_close(model.state_dict(), layers.state_dict(), atol=0, rtol=0)
    same(model.eval(), x)


def test_report_and_restore(x):
    model = trained(nn.Sequential(bottleneck(2), basic(C), bottleneck(3, 1, shortcut(12), dilation=2))).eval()
    before = reasons(model)
    assert before["1"] == "not yet: optimize would fuse its layers"
    segfast.optimize(model, inplace=True)
    for _ in range(2):
        assert reasons(model) == {
            "0": f"its layers fused: {BOTTLENECK}",
            "1": f"its layers fused: {BASIC}",
            "2": f"its layers fused: {SHORTCUT}",
            "2.conv2": "replaced",
        }
        assert segfast.report(model).fused == ["0", "1", "2"]
        segfast.optimize(model, x, inplace=True)
    segfast.restore(model)
    assert reasons(model) == before


def test_a_model_that_is_a_block(x):
    model = segfast.optimize(trained(bottleneck(2, dilation=2)).eval(), x)
    assert reasons(model) == {"": f"its layers fused: {BOTTLENECK}", "conv2": "replaced"}
    assert not any("not_fused" in vars(m).get("_segfast_optimize", {}) for m in model.modules())


@pytest.mark.parametrize("name", ["conv1", "bn2", "relu", "bn3", "downsample", "downsample.1"])
def test_hooks_inside_are_called(name, model, x, monkeypatch):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(y))
    assert not is_fused(model, x, monkeypatch)
    assert seen
    assert reasons(segfast.optimize(plain(model)))[""].startswith("not fused: a layer in it")
    handle.remove()
    assert is_fused(model, x, monkeypatch)


def test_hooks_on_the_block_itself_are_too(model, x, monkeypatch):
    seen = []
    model.register_forward_hook(lambda m, args, y: seen.append(y))
    assert is_fused(model, x, monkeypatch) and len(seen) == 2


class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("name", "layer", "fused"),
    [
        ("relu", nn.GELU(), True),
        ("relu", nn.LeakyReLU(0.2), True),
        ("relu", nn.Tanh(), False),
        ("conv2", nn.Conv2d(3, 3, 5, padding=2), True),
        ("conv2", segfast.nn.Conv2d(3, 3, 3, padding=1, activation="relu"), False),
        ("conv2", Twice(3, 3, 3, padding=1), False),
        ("conv2", nn.Identity(), False),
        ("bn1", nn.BatchNorm2d(3), True),
        ("bn1", nn.GroupNorm(3, 3), False),
        ("bn3", nn.BatchNorm2d(12, track_running_stats=False), False),
        ("downsample", nn.Conv2d(C, 12, 1), False),
        ("downsample", nn.Sequential(nn.Conv2d(C, 1, 1), nn.BatchNorm2d(1)), False),
    ],
    ids=lambda value: str(value).split("(")[0],
)
def test_a_layer_put_in_afterwards(name, layer, fused, model, x, monkeypatch):
    setattr(model, name, copy.deepcopy(layer).eval())
    assert is_fused(model, x, monkeypatch) is fused


def test_a_forward_of_the_instance_is_used(x, monkeypatch):
    model = trained(basic(C)).eval()
    model.forward = lambda x: -x
    model = segfast.optimize(model)
    assert segfast.report(model).fused == []
    torch.testing.assert_close(model(x), -x)


def test_a_block_of_a_subclass_is_left_alone(x):
    class Own(type(basic(C))):
        def forward(self, x):
            return -super().forward(x)

    layers = trained(Own(C, C)).eval()
    model = segfast.optimize(layers)
    assert segfast.report(model).fused == []
    torch.testing.assert_close(model(x), layers(x))


def test_a_norm_that_was_in_train_for_a_step(model, x, monkeypatch):
    with torch.no_grad():
        before = model(x)
        model.bn2.train()
        model(x + 1)
        model.bn2.eval()
        assert not torch.allclose(model(x), before, atol=1e-2)
    assert is_fused(model, x, monkeypatch)


def test_a_norm_in_train_keeps_its_batch_statistics(model, x, monkeypatch):
    model.bn1.train()
    assert not is_fused(model, x, monkeypatch)


def test_filter_fn_is_asked_about_the_block(x, monkeypatch):
    model = trained(nn.Sequential(basic(C), bottleneck(2), nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4))).eval()
    fast = segfast.optimize(model, x, filter_fn=lambda name, m: name != "0")
    assert segfast.report(fast).fused == ["0.conv1", "0.conv2", "1", "2"]
    assert reasons(fast)["0"] == "not fused: left out by filter_fn"
    same(fast, x)
    # Its sequences are given up when it is fused after all.
    fast = segfast.optimize(fast)
    assert segfast.report(fast).fused == ["0", "1", "2"]
    same(fast, x)


def test_a_replica_runs_its_layers(model, x, monkeypatch):
    model._is_replica = True
    assert not is_fused(model, x, monkeypatch)


def test_a_shortcut_that_is_broadcast(monkeypatch):
    model = trained(basic(4)).eval()
    model.conv1 = nn.Conv2d(1, 4, 3, padding=1)
    x = draw(2, 1, 5, 5)
    assert not is_fused(segfast.optimize(model), x, monkeypatch)


@pytest.mark.parametrize(("size", "fused"), [(63, False), (64, True)])
def test_small_images_on_a_cpu_run_layer_by_layer(size, fused, monkeypatch):
    monkeypatch.setattr(eager, "_LEAST_ELEMENTS", 2**15)
    model = segfast.optimize(trained(bottleneck(2)).eval())
    assert is_fused(model, draw(8, C, size, 64), monkeypatch) is fused


def test_a_whole_network(monkeypatch):
    import_torchvision()
    from torchvision.models import resnet18

    model = trained(resnet18(weights=None)).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.abs_()
    image = draw(1, 3, 64, 64)
    fast = segfast.optimize(model, image)
    assert segfast.report(fast).fused == ["conv1", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1))]
    with torch.no_grad():
        expected = model(image)
        assert expected.std() > 1e-3
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(fast(image), expected, atol=tolerance, rtol=1e-4)
        segfast.restore(fast)
        torch.testing.assert_close(fast(image), expected, atol=0, rtol=0)
