"""Fused sequences beside hooks, copies, threads, compilers and published models."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import segfast
from segfast.nn import DepthwiseConv2d
from segfast.nn._fused import separable
from tests.fused_conv import draw
from tests.models import peers
from tests.optimize.coverage import pretrained
from tests.optimize.separable_networks import (
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


def test_layers_called_by_themselves(x):
    model = optimized(Block(), x)
    plain = segfast.restore(copy.deepcopy(model))
    for (name, ours), theirs in zip(model.named_children(), plain.children(), strict=True):
        torch.testing.assert_close(ours(x), theirs(x), msg=name)
    torch.testing.assert_close(model.forward(x), plain(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["blocks.0.conv_dw", "blocks.0.bn1", "blocks.0.act", "blocks.0.conv_pw"])
def test_hooks_see_what_they_always_saw(name, when):
    model, x, seen = trained(Net()).eval(), draw(2, 3, 8, 8), []
    model.blocks[0].act.inplace = False
    expected = []
    with model.get_submodule(name).register_forward_hook(lambda m, a, y: expected.append(y)):
        model(x)
    if when == "after":
        segfast.optimize(model, x, inplace=True)
    model.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
    if when == "before":
        segfast.optimize(model, x, inplace=True)
        assert "hooks" in reasons(model)["blocks.0.conv_dw"] or name != "blocks.0.conv_dw"
    seen.clear()
    model(x)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


def test_hooks_on_a_module_around_a_part_of_the_sequence(x):
    model = optimized(nn.Sequential(nn.Sequential(depthwise(), nn.BatchNorm2d(C)), nn.Conv2d(C, C, 1)), x)
    assert operations(model, x) == ["separable_conv2d"]
    expected = segfast.restore(copy.deepcopy(model))[0](x)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    torch.testing.assert_close(seen, [expected])


def test_the_module_whose_forward_calls_them_keeps_its_forward_and_gets_no_hooks(x):
    model = Block().eval()
    fused = optimized(model, x)
    assert operations(fused, x) == ["separable_conv2d"]
    assert inspect.signature(fused.forward) == inspect.signature(model.forward)
    assert not (fused._forward_hooks or fused._forward_pre_hooks)
    assert type(fused).forward is type(model).forward
    assert type(segfast.restore(fused)) is type(model)


def test_a_shared_layer_is_not_fused(x):
    act = nn.ReLU()
    model = optimized(nn.Sequential(depthwise(), act, nn.Conv2d(C, C, 1), act), x)
    assert "not fused: 1 is not called exactly once" in reasons(model)["0"] or "shared" in reasons(model)["0"]
    same(model, x)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_part_runs_by_itself(copied, x):
    part = copied(optimized(Block(), x).conv_dw)
    assert operations(part, x) == ["depthwise_conv2d"]


def test_restoring_a_part_undoes_its_sequence(x):
    model = optimized(Block(), x)
    plain = segfast.restore(copy.deepcopy(model))
    segfast.restore(model.bn1)
    torch.testing.assert_close(model(x), plain(x))
    assert operations(model, x) == ["depthwise_conv2d"]


def test_twice_is_once_and_an_example_adds(x):
    model = optimized(Block())
    assert "give example_inputs" in reasons(model)["conv_dw"]
    for _ in range(2):
        model = segfast.optimize(model, x)
        assert reasons(model) == {"conv_dw": "replaced; fused with bn1, act, conv_pw, bn2"}
    # Without an example what is fused stays so.
    assert operations(segfast.optimize(model), x) == ["separable_conv2d"]
    same(model, x)


def test_layers_built_as_ours_are_fused_and_stay_ours(x):
    layers = [
        DepthwiseConv2d(C, C, 3),
        nn.BatchNorm2d(C),
        DepthwiseConv2d(C, C, 3, activation="relu"),
        nn.ReLU(),
    ]
    model = optimized(nn.Sequential(*layers), x)
    assert reasons(model)["0"] == "segfast's own already; fused with 1"
    assert reasons(model)["2"] == "segfast's own already"
    same(model, x)
    assert type(segfast.restore(model)[0]) is DepthwiseConv2d


def test_our_own_blocks_are_left_to_themselves(x):
    model = nn.Sequential(segfast.nn.InvertedResidual(C, C), segfast.nn.SeparableConv2d(C, C))
    model = optimized(model, x)
    assert all(reason == "segfast's own already" for reason in reasons(model).values())
    assert operations(model, x) == ["conv2d", "separable_conv2d", "separable_conv2d"]
    same(model, x)


def test_filter_fn_leaves_sequences_out():
    example = draw(2, 3, 8, 8)
    model = optimized(Net(), example, filter_fn=lambda name, _: name.startswith("blocks.0"))
    assert reasons(model)["blocks.1.conv_dw"] == "left out by filter_fn"
    assert operations(model, example) == ["separable_conv2d"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_turned_on_for_training(reentrant, x, monkeypatch):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.checkpointing = Plain(), False

        def forward(self, x):
            return checkpoint(self.pair, x, use_reentrant=reentrant) if self.checkpointing else self.pair(x)

    model = optimized(Checkpointed(), x).train()
    assert operations(model, x) == ["separable_conv2d"]
    model.checkpointing = True
    same(model, x)
    # The backward computes the pair again outside of the model's forward, layer by layer: what the first time
    # keeps for it must be the same.
    fused = []
    monkeypatch.setattr(separable.F, "separable_conv2d", lambda *args, **kw: fused.append(args))
    if not reentrant:
        model(x.clone().requires_grad_()).sum().backward()
        assert fused == []


def test_layers_that_follow_in_eval_alone_are_fused_in_eval_alone(x):
    model = optimized(Path(lambda m, x: m.pw(2 * m.dw(x) if m.training else m.dw(x))), x)
    assert operations(model, x) == ["separable_conv2d"]
    same(model, x)
    assert operations(model.train(), x) == ["depthwise_conv2d"]
    same(model, x)


def test_threads_do_not_meet(x):
    model = optimized(Block(), x)
    plain = segfast.restore(copy.deepcopy(model))
    errors = []

    def work(seed):
        try:
            for i in range(20):
                y = draw(1, C, 6, 6, seed=seed + i)
                torch.testing.assert_close(model(y), plain(y), atol=1e-5, rtol=1e-5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_replica_of_data_parallel_runs_one_by_one(x):
    model = optimized(Block(), x)
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        setattr(replica, name, child._replicate_for_data_parallel())
        for key, parameter in child._parameters.items():
            if parameter is None:
                replica._modules[name]._parameters[key] = None
            else:
                setattr(replica._modules[name], key, parameter * 2)
    assert not torch.allclose(replica(x), model(x))
    assert operations(replica, x) == ["depthwise_conv2d"]


class Misled(nn.Module):
    """Reads the channels of a tensor that the fused operator makes another."""

    def __init__(self):
        super().__init__()
        self.dw, self.pw = depthwise(), nn.Conv2d(C, 2 * C, 1)

    def forward(self, x):
        d = self.dw(x)
        return self.pw(d) * d.shape[1]


def test_what_changes_the_output_is_undone(x):
    model = optimized(Misled(), x)
    assert "not fused: undone: an output changed" in reasons(model)["dw"]
    same(model, x)


def test_searching_changes_nothing(x):
    model = trained(nn.Sequential(Block(), Plain())).train()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    segfast.optimize(model, x, inplace=True)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), state, atol=0, rtol=0)


def test_bad_examples(x):
    with pytest.raises(TypeError, match="example_inputs must be a tensor or a tuple"):
        segfast.optimize(Block(), [x])
    model = Block()
    with pytest.raises(RuntimeError, match="channels"):
        segfast.optimize(model, draw(1, C + 1, 8, 8), inplace=True)
    assert type(model.conv_dw) is nn.Conv2d


class TestReport:
    def test_dense_convolutions_are_no_rows(self):
        model = nn.Sequential(
            nn.Conv2d(4, 4, 3), nn.Conv2d(1, 1, 3), nn.Conv2d(4, 4, 3, groups=2), depthwise()
        )
        assert [row.name for row in segfast.report(model)] == ["3"]
        assert segfast.report(segfast.optimize(model)).replaced == ["3"]

    def test_depthwise_ones_that_stay_tell_why(self):
        subclass = type("Same", (nn.Conv2d,), {})(C, C, 3, groups=C)
        other = nn.Conv1d(C, C, 3, groups=C), nn.Conv3d(C, C, 3, groups=C), nn.Conv1d(C, C, 3)
        model = segfast.optimize(nn.Sequential(subclass, depthwise(dtype=torch.float64), *other))
        found = reasons(model)
        assert list(found) == ["0", "1", "2", "3"]
        words = ("a subclass of Conv2d", "no kernels for float64", "one-dimensional", "three-dimensional")
        assert all(word in reason for word, reason in zip(words, found.values(), strict=True))


@pytest.mark.interpreter
def test_depthwise_weights_get_the_kernels_layout(monkeypatch, x):
    monkeypatch.setattr(segfast._optimize.layouts, "_LAYOUT_DEVICES", ("cpu",))
    model = trained(Block()).eval()
    expected = model(x)
    with segfast.backend("triton"):
        segfast.optimize(model, x, inplace=True)
    assert model.conv_dw.weight.stride(0) == 1
    assert model.conv_pw.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    segfast.restore(model)
    assert model.conv_dw.weight.is_contiguous()
    assert torch.equal(model(x), expected)


def check_published(model, fused, replaced):
    torch.manual_seed(0)
    image = draw(1, 3, 64, 64)
    ours = segfast.optimize(pretrained(model), image)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), model(image), atol=1e-5, rtol=1e-5)
    ran = [operation for operation in operations(ours, image) if operation != "conv2d"]
    assert (ran.count("separable_conv2d"), len(ran)) == (fused, replaced)
    assert len(segfast.report(ours).replaced) == replaced
    return ours


def test_torchvisions_mobilenet_v2():
    torchvision = peers.torchvision()
    model = torchvision.models.mobilenet_v2(num_classes=10)
    check_published(model, 17, 17)
    # The stem, the expansions but for the first block's, which has none, and the last layer.
    ran = operations(segfast.optimize(model), draw(1, 3, 64, 64))
    assert (ran.count("separable_conv2d"), ran.count("conv2d"), len(ran)) == (17, 18, 35)


@pytest.mark.parametrize(
    ("name", "fused", "replaced"),
    [
        ("mobilenetv2_100", 17, 17),
        ("efficientnet_b0", 0, 16),
        ("convnext_atto", 0, 12),
        ("xception65", 63, 63),
    ],
)
def test_timms_models(name, fused, replaced):
    timm = peers.timm()
    ours = check_published(timm.create_model(name, num_classes=10), fused, replaced)
    if name == "efficientnet_b0":
        depthwise = [r for r in reasons(ours).values() if r.startswith("replaced")]
        assert set(depthwise) == {"replaced; fused with bn1", "replaced; fused with bn2"}


def test_a_caller_within_another_sequence(x):
    inner = nn.Sequential(depthwise(), nn.ReLU(), nn.Conv2d(C, C, 1), depthwise())
    model = optimized(nn.Sequential(inner, nn.BatchNorm2d(C), nn.Conv2d(C, C, 1)))
    for again in (model, segfast.optimize(model), segfast.optimize(model, x)):
        assert reasons(again) == {
            "0.0": "replaced; fused with 1, 2",
            "0.3": "replaced; fused with 1, 2",
        }
        assert operations(again, x) == ["separable_conv2d"] * 2
        same(again, x)
    # By itself the inner one runs its own sequence, and only that.
    assert operations(model[0], x) == ["separable_conv2d", "depthwise_conv2d"]
