"""Rules that every fusion of `segfast.optimize` keeps: tested once, for each kind of layers it fuses."""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segfast
from tests.fused_conv import draw
from tests.optimize import test_aspp, test_conv, test_residual_blocks
from tests.optimize.separable_networks import Block, same
from tests.separable_conv2d.test_module import trained

pytestmark = pytest.mark.usefixtures("fused_at_any_size")

KINDS = {
    "separable": Block,
    "convolution": lambda: test_conv.block(test_conv.CONVOLUTIONS["dilated"](), nn.ReLU()),
    "transposed": lambda: test_conv.block(test_conv.TRANSPOSED["groups"](), nn.ReLU()),
    **{f"ASPP, {name}": make for name, make in test_aspp.MAKERS.items()},
    **test_residual_blocks.MAKERS,
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def plain(kind):
    """The layers before they are fused."""
    model = trained(nn.Sequential(KINDS[kind]())).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def x(kind):
    return image_for(kind)


def image_for(kind, height=9, width=8):
    channels = (test_residual_blocks if kind in test_residual_blocks.MAKERS else test_aspp).C
    return draw(2, channels, height, width, channels_last=True)


def is_fused(model, x):
    """True where no batch norm runs by itself."""
    with torch.no_grad(), mock.patch.object(F, "batch_norm", side_effect=F.batch_norm) as norm:
        model(x)
    return not norm.called


def assert_computes(model, layers, x):
    with torch.no_grad():
        torch.testing.assert_close(model(x), layers(x), atol=1e-5, rtol=1e-5)


def look(model):
    """All that a fusion may change of a model."""
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    layers = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    tensors = [(name, id(p), p.stride()) for name, p in model.named_parameters()]
    return layers, hooks, tensors, list(model.state_dict()), dict(model._forward_hooks_always_called)


def test_restore_leaves_nothing_behind(plain, x):
    before, names = look(plain), list(plain.state_dict())
    parameters = list(plain.parameters())
    segfast.optimize(plain, x, inplace=True)
    assert is_fused(plain, x) and look(plain) != before
    assert list(plain.state_dict()) == names
    assert all(a is b for a, b in zip(plain.parameters(), parameters, strict=True))
    segfast.restore(plain)
    assert look(plain) == before and not is_fused(plain, x)


def test_a_second_time_changes_nothing(plain, x):
    model = segfast.optimize(plain, x)
    found = [type(m) for m in model.modules()], str(segfast.report(model))
    for again in (segfast.optimize(model), segfast.optimize(model, x)):
        assert ([type(m) for m in again.modules()], str(segfast.report(again))) == found
        assert is_fused(again, x)
        assert_computes(again, plain, x)


def test_copies_and_pickles_fuse_their_own_layers(kind, plain, x):
    model = segfast.optimize(plain, x)
    # The class of mmseg's stand-in is not where its name says.
    pickled = [] if "mmseg" in kind else [pickle.loads(pickle.dumps(model))]
    for twin in (copy.deepcopy(model), *pickled):
        with torch.no_grad():
            next(twin.parameters()).mul_(2)
            next(m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)).bias.add_(1)
        assert is_fused(twin, x)
        assert_computes(twin, segfast.restore(copy.deepcopy(twin)), x)
    assert_computes(model, plain, x)


def test_gradients_and_training_are_the_layers_own(plain, x):
    model = segfast.optimize(plain, x)
    same(model, x)
    same(model.train(), x)
    assert is_fused(model.eval(), x)


# Of alike blocks one: each takes seconds.
@pytest.mark.parametrize(
    "kind", ["separable", "convolution", *(n for n in KINDS if "ASPP" in n), "bottleneck, shortcut"]
)
def test_compiled_exported_traced_and_mapped_models_are_not_fused(kind, plain, x):
    torch._dynamo.reset()
    model = segfast.optimize(plain, x)
    others = [
        torch.compile(model, backend="aot_eager", fullgraph="ASPP" not in kind),
        torch.export.export(model, (x,), strict=False).module(),
        torch.jit.trace(model, x),
        lambda x: torch.vmap(model)(x[None])[0],
    ]
    if "ASPP" not in kind:
        others.append(torch.fx.symbolic_trace(model))
    for other in others:
        assert_computes(other, plain, x)


def test_autocast_and_inference_mode(plain, x):
    model, before = segfast.optimize(plain, x), x.clone()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(x)
        torch.testing.assert_close(model(x), expected, atol=0.02 * expected.abs().max().item(), rtol=0.05)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(x, before)


def test_hooks_inside_are_called(plain, x):
    model, seen, expected = segfast.optimize(plain, x), [], []
    name = next(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    plain.get_submodule(name).register_forward_hook(lambda m, args, y: expected.append(y.clone()))
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(y.clone()))
    assert_computes(model, plain, x)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert len(seen) == 1 and not is_fused(model, x)
    handle.remove()
    assert is_fused(model, x)


@pytest.mark.interpreter
def test_our_kernels(kind, plain, poisoned_empty, small_tiles):
    x = image_for(kind, 5, 6)
    model = segfast.optimize(plain, x)
    with torch.no_grad(), segfast.backend("triton"):
        y = model(x)
        explanations = segfast.explain(model, x)
        assert is_fused(model, x)
        torch.testing.assert_close(y, plain(x), atol=1e-5, rtol=1e-5)
    assert {explanation.backend for explanation in explanations} == {"triton"}
