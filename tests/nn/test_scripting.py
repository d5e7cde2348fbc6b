"""`torch.jit.script` says what to do about layers that it cannot compile; the other ways are open."""

import copy
import pickle

import pytest
import torch
from torch import nn

import segfast
from segfast.models import SegmentationModel
from segfast.nn._fused.whole_model import keep_contiguous
from segfast.nn._rules import all_rules
from segfast.nn._scripting import Unscriptable
from segfast.ops._choice import Choice, choices, could_choose
from tests.ops.test_choice_candidates import CONV2D

REPLACED = {
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
    "dilated": lambda: nn.Conv2d(4, 4, 3, dilation=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
}
RESTORE = r"a layer that segfast\.optimize replaced cannot be scripted; call segfast\.restore\(model\) first"
OURS = r"segfast's own layers and networks cannot be scripted; use torch\.export\.export or torch\.jit\.trace"
PUBLIC = [kind for name in segfast.nn.__all__ if isinstance(kind := getattr(segfast.nn, name), type)]


@pytest.fixture
def image():
    return torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0))


def unchanged(model):
    return model


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("passed_on", [unchanged, copy.deepcopy, pickled])
@pytest.mark.parametrize("layer", REPLACED)
def test_a_replaced_layer_is_to_be_restored(image, layer, passed_on):
    # Two blocks, for the message must come however deep the layer is.
    model = nn.Sequential(nn.ReLU(), nn.Sequential(REPLACED[layer](), nn.Sigmoid()))
    plain = model(image)
    fast = passed_on(segfast.optimize(model))
    with pytest.raises(RuntimeError, match=RESTORE):
        torch.jit.script(fast)
    torch.testing.assert_close(torch.jit.trace(fast, image)(image), plain)
    torch.testing.assert_close(torch.export.export(fast, (image,)).module()(image), plain)
    torch.testing.assert_close(torch.jit.script(segfast.restore(fast))(image), plain)


@pytest.mark.parametrize("layer", REPLACED)
def test_a_replaced_layer_is_traced_alike_with_gradients_and_without(image, layer):
    # `torch.jit.trace` compares what it traced with gradients to a second trace without any.
    choices().add(CONV2D, Choice("aten", {}))
    fast = segfast.optimize(nn.Sequential(REPLACED[layer](), nn.Sigmoid()).eval())
    with torch.no_grad():
        assert could_choose(image)
    torch.testing.assert_close(torch.jit.trace(fast, image)(image), fast(image))


def test_a_model_that_returns_contiguous_images_is_traced_alike_with_gradients_and_without(image):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)).eval().to(memory_format=torch.channels_last)
    plain = model(image)
    keep_contiguous(model, model[1])
    torch.testing.assert_close(torch.jit.trace(model, image)(image), plain)


def test_every_rule_has_its_layer_here():
    replaced = {type(segfast.optimize(make())) for make in REPLACED.values()}
    assert replaced == {rule.target for rule in all_rules()}


@pytest.mark.parametrize("make", REPLACED.values(), ids=REPLACED)
def test_a_layer_that_was_built_as_ours_cannot_be_restored(image, make):
    kind = type(segfast.optimize(make()))
    model = nn.Sequential(kind(4, 4, 3))
    plain = model(image)
    for fast in (model, segfast.optimize(model, image)):
        with pytest.raises(RuntimeError, match=f"{kind.__name__}: {OURS}"):
            torch.jit.script(fast)
        torch.testing.assert_close(torch.jit.trace(fast, image)(image), plain)


def test_fusion_does_not_hide_that_a_layer_is_ours():
    """To restore it first would lead nowhere."""
    model = nn.Sequential(segfast.nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    fast = segfast.optimize(model)
    assert type(fast[0]) is not segfast.nn.Conv2d
    with pytest.raises(RuntimeError, match=OURS):
        torch.jit.script(fast)
    replaced = segfast.optimize(nn.Sequential(nn.Conv2d(4, 4, 3, dilation=2), nn.BatchNorm2d(4)).eval())
    assert type(replaced[0]) is not segfast.nn.Conv2d
    with pytest.raises(RuntimeError, match=RESTORE):
        torch.jit.script(replaced)


@pytest.mark.parametrize("kind", [*PUBLIC, SegmentationModel], ids=lambda kind: kind.__name__)
def test_all_of_ours_say_it(kind):
    assert issubclass(kind, Unscriptable) and len(PUBLIC) > 10
    assert kind.__prepare_scriptable__ is Unscriptable.__prepare_scriptable__


def test_a_network():
    with pytest.raises(RuntimeError, match=f"UNet: {OURS}"):
        torch.jit.script(segfast.models.UNet(width=2, depth=1))
