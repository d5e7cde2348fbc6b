"""`segfast.optimize` fuses what follows a depthwise convolution, and never computes something else for it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import segfast
from tests.fused_conv import draw
from tests.optimize.separable_networks import (
    ACTIVATION_MODULES,
    Block,
    C,
    Net,
    Path,
    Plain,
    depthwise,
    operations,
    optimized,
    reasons,
    same,
)
from tests.separable_conv2d.test_module import trained

pytestmark = pytest.mark.usefixtures("fused_at_any_size")


@pytest.fixture
def x():
    return draw(2, C, 8, 8)


def test_a_sequence_in_someones_forward():
    model, x = optimized(Net(), draw(2, 3, 8, 8)), draw(2, 3, 8, 8)
    assert reasons(model) == {
        "blocks.0.conv_dw": "replaced; fused with bn1, act, conv_pw, bn2",
        "blocks.1.conv_dw": "replaced; fused with bn1, act, conv_pw, bn2",
    }
    assert operations(model, x) == ["separable_conv2d"] * 2
    same(model, x)


def test_batch_norm_is_fused_in_eval_only(x):
    model = optimized(Block(), x)
    same(model.train(), x)
    assert operations(model, x) == ["depthwise_conv2d"]
    assert operations(model.eval(), x) == ["separable_conv2d"]


@pytest.mark.parametrize("activation", ACTIVATION_MODULES, ids=str)
def test_every_activation(activation, x):
    model = optimized(Block(copy.deepcopy(activation)), x)
    assert operations(model, x) == ["separable_conv2d"]
    same(model, 3 * x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_plain_pairs_are_fused_in_train_too(training, x):
    for model in (optimized(Plain(), x), optimized(nn.Sequential(depthwise(), nn.Conv2d(C, 4, 1)))):
        model.train(training)
        assert operations(model, x) == ["separable_conv2d"]
        same(model, x)


class SeparableConv(nn.Sequential):
    """segmentation_models_pytorch's: the pair in one Sequential, norm and activation in the next."""

    def __init__(self):
        super().__init__(depthwise(bias=False), nn.Conv2d(C, C, 1), nn.Identity())


def test_sequentials_need_no_example(x):
    model = optimized(nn.Sequential(nn.Conv2d(C, C, 1), SeparableConv(), nn.BatchNorm2d(C), nn.ReLU()))
    assert reasons(model) == {"1.0": "replaced; fused with 1, 2, 3"}
    assert operations(model, x) == ["separable_conv2d"]
    same(model, x)
    # In train the norm is by itself, the pair is still one.
    assert operations(model.train(), x) == ["separable_conv2d"]
    same(model, x)


def test_children_of_a_sequential_called_one_by_one(x):
    model = optimized(nn.Sequential(depthwise(), nn.ReLU(), nn.Conv2d(C, C, 1)))
    plain = segfast.restore(copy.deepcopy(model))
    y = x
    for ours, theirs in zip(model, plain, strict=True):
        expected = theirs(y)
        torch.testing.assert_close(ours(y), expected)
        y = expected
    assert operations(model[:1], x) == ["depthwise_conv2d"]


class MixFFN(nn.Module):
    """SegFormer's: the depthwise convolution between linear layers."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, C), nn.Linear(C, C)
        self.dwconv, self.act = depthwise(), nn.GELU()

    def forward(self, x):
        x = self.fc1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.act(self.dwconv(x))
        return self.fc2(x.flatten(2).transpose(1, 2))


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_dw, self.norm = nn.Conv2d(C, C, 7, padding=3, groups=C), nn.LayerNorm(C)

    def forward(self, x):
        return self.norm(self.conv_dw(x).permute(0, 2, 3, 1))


def test_segformers_and_convnexts_depthwise(x):
    model = optimized(MixFFN(), x)
    assert reasons(model) == {"dwconv": "replaced; fused with act"}
    same(model, x)
    same(model.train(), x)
    model = optimized(ConvNeXt(), x)
    assert reasons(model) == {"conv_dw": "replaced; not fused: permute follows"}
    same(model, x)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.pw(F.relu(m.dw(x))), "not fused: relu follows"),
        (lambda m, x: (lambda d: d + m.bn(d))(m.dw(x)), "not fused: its result is used more than once"),
        (lambda m, x: m.dw(x), "not fused: it is a result of the model"),
        (lambda m, x: m.pw(m.bn(m.dw(m.dw(x)))), "not fused: it is not called exactly once"),
        (lambda m, x: m.bn(m.bn(m.dw(x))), "not fused: bn is not called exactly once"),
        (lambda m, x: m.pw(m.act(m.bn(m.dw(x)))) + m.bn(x), "not fused: bn is not called exactly once"),
        (lambda m, x: m.pw(x), "not fused: it is not called exactly once"),
        (lambda m, x: m.pw(m.bn(m.dw(x))) if x.sum() > -1e9 else x, "not fused: bool asks for values"),
    ],
)
def test_what_is_not_a_sequence_is_left_alone(run, reason, x):
    model = Path(run)
    plain = copy.deepcopy(trained(model).eval())
    segfast.optimize(model, x, inplace=True)
    assert reason in reasons(model)["dw"]
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize(
    ("run", "layers"),
    [
        (lambda m, x: F.relu(m.bn(m.dw(x))), "bn"),
        (lambda m, x: m.pw(F.gelu(m.act(m.bn(m.dw(x))))), "bn, act"),
        (lambda m, x: m.bn(m.act(m.dw(x))), "act"),
        (lambda m, x: (lambda y: y + F.relu(y))(m.pw(m.bn(m.dw(x)))), "bn, pw"),
    ],
)
def test_a_sequence_ends_where_the_operator_does(run, layers, x):
    model = trained(Path(run)).eval()
    plain = copy.deepcopy(model)
    segfast.optimize(model, x, inplace=True)
    assert reasons(model) == {"dw": f"replaced; fused with {layers}"}
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)


def test_two_slopes_are_two_operators(x):
    layers = [depthwise(), nn.LeakyReLU(0.1), nn.Conv2d(C, C, 1), nn.LeakyReLU(0.3)]
    model = optimized(nn.Sequential(*layers))
    assert reasons(model) == {"0": "replaced; fused with 1, 2"}
    same(model, x)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(C, C, 1, stride=2),
        nn.Conv2d(C, C, 1, groups=2),
        nn.Conv2d(C, C, 1, padding=1),
        nn.Conv2d(C, C, 3),
        nn.BatchNorm2d(C, track_running_stats=False),
        nn.InstanceNorm2d(C, track_running_stats=True),
        nn.PReLU(),
        type("Own", (nn.ReLU,), {})(),
        nn.Dropout(),
        parametrize.register_parametrization(nn.Conv2d(C, C, 1), "weight", nn.Identity()),
    ],
    ids=lambda m: str(m).splitlines()[0],
)
def test_other_layers_end_a_sequence(other, x):
    model = optimized(nn.Sequential(depthwise(), copy.deepcopy(other)), x)
    assert "not fused: 1 (" in reasons(model)["0"]
    same(model, x)


class Aside(nn.Module):
    """A forward that takes another path when told."""

    def __init__(self):
        super().__init__()
        self.block, self.path = Block(), "all"

    def forward(self, x):
        b = self.block
        d = b.conv_dw(x)
        if self.path == "stop":
            return d
        if self.path == "skip the norm":
            return b.conv_pw(d)
        if self.path == "another tensor":
            d = d + 0
        if self.path == "fail":
            raise LookupError("the model's own")
        if self.path == "interrupt":
            raise KeyboardInterrupt
        if self.path == "twice":
            b.conv_dw(x)
        return b.bn2(b.conv_pw(b.act(b.bn1(d))))


class TestBrokenSequences:
    @pytest.fixture
    def model(self, x):
        return optimized(Aside(), x)

    @pytest.mark.parametrize("path", ["stop", "skip the norm", "another tensor", "twice"])
    def test_another_path_is_an_error_that_names_the_layers(self, model, x, path):
        model.path = path
        with pytest.raises(RuntimeError, match=r"block\.conv_dw, block\.bn1.*block\.bn1 did not follow"):
            model(x)
        model.path = "all"
        same(model, x)
        model.path = path
        plain = segfast.restore(copy.deepcopy(model))
        assert torch.isfinite(plain(x)).all()

    def test_the_models_own_error_comes_through(self, model, x, recwarn):
        model.path = "fail"
        with pytest.raises(LookupError, match="the model's own"):
            model(x)
        assert not recwarn.list
        model.path = "all"
        same(model, x)

    def test_a_layer_called_after_an_interrupt_runs_by_itself(self, model, x):
        plain = segfast.restore(copy.deepcopy(model))
        model.path = "interrupt"
        with pytest.raises(KeyboardInterrupt):
            model(x)
        torch.testing.assert_close(model.block.conv_dw(x), plain.block.conv_dw(x))
        model.path = "all"
        same(model, x)

    def test_a_layer_put_in_afterwards_is_an_error(self, model, x):
        model.block.conv_pw = nn.Conv2d(C, C, 1)
        with pytest.raises(RuntimeError, match=r"block\.conv_pw did not follow block\.act"):
            model(x)

    def test_in_an_except_block_a_broken_sequence_is_seen_too(self, model, x):
        model.path = "stop"
        try:
            raise LookupError
        except LookupError:
            with pytest.raises(RuntimeError, match="did not follow"):
                model(x)
