"""`segfast.nn.UpsampleCrossEntropyLoss` and `UpsampleArgmax`: thin, with torch's constructor and state."""

import copy
import inspect
import pickle

import pytest
import torch

import segfast
from segfast.nn import UpsampleArgmax, UpsampleCrossEntropyLoss
from tests.segmentation_head.reference import (
    IGNORED,
    check_labels,
    cross_entropy,
    head,
    interpolate,
    value_and_gradient,
)

OPTIONS = {
    "plain": {},
    "weighted": {"weight": torch.tensor([0.5, 1.0, 2.0])},
    "smoothed sum": {"label_smoothing": 0.1, "reduction": "sum"},
    "each pixel": {"reduction": "none"},
}
RESAMPLINGS = [{}, {"align_corners": True}, {"mode": "nearest"}, {"scale_factor": (2.0, 3.0)}]


def small():
    return head((2, 3, 3, 4), {"size": (6, 12)})


@pytest.mark.parametrize("resampling", RESAMPLINGS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_is_torchs(options, resampling):
    logits, target = small()
    loss = UpsampleCrossEntropyLoss(ignore_index=IGNORED, **options, **resampling)
    sized = resampling if "scale_factor" in resampling else {"size": (6, 12), **resampling}
    expected = value_and_gradient(cross_entropy, logits, target, **options, **sized)
    torch.testing.assert_close(value_and_gradient(loss, logits, target), expected)


def test_the_constructor_is_torchs_with_three_more():
    torchs, own = (
        {n: p.default for n, p in inspect.signature(c).parameters.items()}
        for c in (torch.nn.CrossEntropyLoss, UpsampleCrossEntropyLoss)
    )
    assert issubclass(UpsampleCrossEntropyLoss, torch.nn.CrossEntropyLoss)
    torchs = {n: default for n, default in torchs.items() if n not in ("size_average", "reduce")}
    assert own == torchs | {"mode": "bilinear", "align_corners": False, "scale_factor": None}


def test_state_copies_and_names():
    weight = torch.tensor([0.5, 1.0, 2.0])
    loss, theirs = UpsampleCrossEntropyLoss(weight), torch.nn.CrossEntropyLoss(weight)
    assert loss.state_dict().keys() == theirs.state_dict().keys() == {"weight"}
    loss.load_state_dict(theirs.state_dict(), strict=True)
    logits, target = head((2, 3, 3, 4), {"size": (6, 12)})
    target.clamp_(max=2)
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    assert all(torch.equal(twin(logits, target), loss(logits, target)) for twin in twins)
    assert loss.double().weight.dtype == torch.float64
    named = UpsampleCrossEntropyLoss(
        ignore_index=255, align_corners=True, scale_factor=4, label_smoothing=0.1
    )
    assert repr(named) == (
        "UpsampleCrossEntropyLoss(ignore_index=255, reduction='mean', mode='bilinear', label_smoothing=0.1, "
        "align_corners=True, scale_factor=4)"
    )


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_labels_and_confidence(mode):
    logits, _ = small()
    expected = interpolate(logits, mode=mode, size=(6, 12))
    labels, confidence = UpsampleArgmax(scale_factor=(2, 3), mode=mode, return_confidence=True)(logits)
    torch.testing.assert_close(confidence, expected.softmax(1).amax(1))
    check_labels(labels, expected)
    fixed = UpsampleArgmax(size=(6, 12), mode=mode)
    assert torch.equal(fixed(logits), labels)
    other = fixed(logits, (5, 7))
    check_labels(other, interpolate(logits, mode=mode, size=(5, 7)))
    assert torch.equal(UpsampleArgmax(scale_factor=4, mode=mode)(logits, (5, 7)), other)
    assert repr(fixed) == f"UpsampleArgmax(size=(6, 12), mode={mode!r})"


def test_a_network_with_its_loss_compiles_and_trains():
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.loss = torch.nn.Conv2d(2, 3, 1), UpsampleCrossEntropyLoss(ignore_index=IGNORED)

        def forward(self, x, target):
            return self.loss(self.head(x), target)

    torch.manual_seed(0)
    network, x = Network(), torch.randn(2, 2, 3, 4)
    _, target = small()
    expected = torch.autograd.grad(network(x, target), network.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(x, target), network.parameters())
    torch.testing.assert_close(actual, expected)
    # Nothing of it is a layer that `optimize` replaces.
    assert type(segfast.optimize(network).loss) is UpsampleCrossEntropyLoss
