"""Calls that torch refuses it refuses at once: nothing is proven, or measured, for them.

The GPU is not there, and its tensors are fake: they have a device and no numbers.
"""

import contextlib

import pytest
import torch

import segfast
from segfast import functional as F
from segfast.ops import _gpu, _gpu_tune, _measure
from segfast.ops._choice import ATEN, Choice, collect
from segfast.ops._gpu_call import GPU_OPERATIONS
from tests.ops.test_gpu import fake


class Fake:
    """Tensors on the GPU."""

    def __call__(self, *shape, dtype=torch.bfloat16):
        return fake(
            *shape, dtype=dtype, layout=torch.channels_last if len(shape) == 4 else torch.contiguous_format
        )

    def elsewhere(self, *shape):
        return torch.zeros(shape, dtype=torch.bfloat16)


class Real:
    """Tensors on a CPU, which torch says something about."""

    def __call__(self, *shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)


def x(t):
    return t(2, 8, 9, 7)


def labels(t, *shape):
    return t(*shape, dtype=torch.int64)


def places(t, *size):
    return t(size[0], 2, *size[1:], dtype=torch.uint8)


def separable(t, **operands):
    return F.separable_conv2d(x(t), t(8, 1, 3, 3), t(4, 8, 1, 1), **operands)


def up(t, skip=(2, 4, 19, 15), weight=(8, 6, 2, 2), bias=6):
    return F.up_concat(x(t), t(*skip), t(*weight), t(bias))


def conv2d(t, *weight, **options):
    return F.conv2d(x(t), t(*(weight or (4, 8, 3, 3))), **options)


def transposed(t, *weight, **options):
    return F.conv_transpose2d(x(t), t(*(weight or (8, 4, 2, 2))), stride=2, **options)


def branches(t, *shapes, **options):
    return F.parallel_conv2d(x(t), [t(*shape) for shape in shapes], [1] * len(shapes), **options)


RIGHT = {
    "conv2d": lambda t: conv2d(t, bias=t(4), residual=t(2, 4, 7, 5)),
    "conv2d of groups": lambda t: conv2d(t, 4, 4, 3, 3, groups=2),
    "conv2d_of_images": lambda t: F.conv2d([x(t), t(2, 3, 9, 7)], t(4, 11, 3, 3), padding=1),
    "parallel_conv2d": lambda t: branches(t, (4, 8, 1, 1), (4, 8, 3, 3), scale=t(8), shift=t(8)),
    "conv_transpose2d": lambda t: transposed(t, bias=t(4), scale=t(4), output_padding=1),
    "up_concat": up,
    "depthwise_conv2d": lambda t: F.depthwise_conv2d(x(t), t(8, 1, 3, 3), t(8)),
    "separable_conv2d": lambda t: separable(t, depthwise_bias=t(8), bias=t(4), residual=t(2, 4, 7, 5)),
    "packed_max_pool2d": lambda t: F.packed_max_pool2d(x(t)),
    "packed_max_unpool2d": lambda t: F.packed_max_unpool2d(x(t), places(t, 2, 9, 7), (18, 13)),
    "upsample_cross_entropy": lambda t: F.upsample_cross_entropy(x(t), labels(t, 2, 18, 14)),
    "upsample_argmax": lambda t: F.upsample_argmax(x(t), (18, 14)),
    "upsample_dice": lambda t: F.upsample_dice(x(t), labels(t, 2, 18, 14)),
}
WRONG = {
    "channels": lambda t: conv2d(t, 4, 9, 3, 3),
    "groups": lambda t: conv2d(t, 5, 4, 3, 3, groups=2),
    "bias": lambda t: conv2d(t, bias=t(5)),
    "scale": lambda t: conv2d(t, scale=t(5)),
    "residual": lambda t: conv2d(t, residual=t(2, 4, 9, 7)),
    "stride": lambda t: conv2d(t, stride=0),
    "dilation": lambda t: conv2d(t, dilation=0),
    "padding": lambda t: conv2d(t, padding=-1),
    "an image smaller than its kernel": lambda t: conv2d(t, 4, 8, 10, 3),
    "two dtypes": lambda t: F.conv2d(x(t), t(4, 8, 3, 3, dtype=torch.float16)),
    "two devices": lambda t: F.conv2d(x(t), t.elsewhere(4, 8, 3, 3)),
    "a bias elsewhere": lambda t: conv2d(t, bias=t.elsewhere(4)),
    "images' batches": lambda t: F.conv2d([x(t), t(1, 3, 9, 7)], t(4, 11, 3, 3)),
    "images' padding": lambda t: F.conv2d([x(t), t(2, 3, 9, 7)], t(4, 11, 3, 3), padding=-1),
    "a branch's channels": lambda t: branches(t, (4, 8, 1, 1), (4, 9, 1, 1)),
    "branches' scale": lambda t: branches(t, (4, 8, 1, 1), scale=t(5)),
    "channels, transposed": lambda t: transposed(t, 9, 4, 2, 2),
    "output_padding": lambda t: transposed(t, output_padding=2),
    "output_padding below 0": lambda t: transposed(t, output_padding=-1),
    "bias, transposed": lambda t: transposed(t, bias=t(8)),
    "larger than the skip": lambda t: up(t, skip=(2, 4, 17, 13)),
    "channels, up_concat": lambda t: up(t, weight=(9, 6, 2, 2)),
    "bias, up_concat": lambda t: up(t, bias=8),
    "bias, depthwise": lambda t: F.depthwise_conv2d(x(t), t(8, 1, 3, 3), t(4)),
    "padding, depthwise": lambda t: F.depthwise_conv2d(x(t), t(8, 1, 3, 3), padding=-1),
    "bias, separable": lambda t: separable(t, bias=t(8)),
    "residual, separable": lambda t: separable(t, residual=t(2, 4, 9, 7)),
    "pointwise": lambda t: F.separable_conv2d(x(t), t(8, 1, 3, 3), t(4, 9, 1, 1)),
    "pointwise of 3x3": lambda t: F.separable_conv2d(x(t), t(8, 1, 3, 3), t(4, 8, 3, 3)),
    "places": lambda t: F.packed_max_unpool2d(x(t), places(t, 1, 9, 7)),
    "an image without a window": lambda t: F.packed_max_pool2d(t(2, 8, 1, 7)),
    "labels": lambda t: F.upsample_cross_entropy(x(t), labels(t, 1, 18, 14)),
}


@pytest.fixture
def measured(monkeypatch, pretended_gpu):
    """The operations that were measured."""
    found = []

    def measure_now(call, device):
        found.append(call.operation)
        return Choice(ATEN, {})

    monkeypatch.setattr(_gpu_tune, "measure_now", measure_now)
    monkeypatch.setattr(_gpu, "is_traced", lambda: False)
    return found


def test_every_operation_is_asked_for():
    assert set(GPU_OPERATIONS) <= set(RIGHT)


# Of which a CPU has no like.
ELSEWHERE = {"two devices", "a bias elsewhere"}
# Behind what is asked here a torch without CUDA, or without its checks, may refuse anything, or nothing.
ANYTHING = contextlib.suppress(Exception)


@pytest.mark.parametrize("name", RIGHT)
def test_a_call_that_torch_takes_is_measured(name, measured):
    operation = name.partition(" ")[0]
    RIGHT[name](Real())
    with segfast.autotune(), ANYTHING:
        RIGHT[name](Fake())
    assert operation in measured
    with collect() as found, ANYTHING:
        RIGHT[name](Fake())
    assert operation in {call.operation for call in found.counts}


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_torch_refuses_is_not(name, measured):
    if name not in ELSEWHERE:
        with pytest.raises((RuntimeError, ValueError)):
            WRONG[name](Real())
    with segfast.autotune(), ANYTHING:
        WRONG[name](Fake())
    assert not measured
    with collect() as found, ANYTHING:
        WRONG[name](Fake())
    assert not found.counts


def test_under_autocast_dtypes_may_differ(measured):
    t = Fake()
    with segfast.autotune(), torch.autocast("cuda", dtype=torch.bfloat16), ANYTHING:
        F.conv2d(x(t), t(4, 8, 3, 3, dtype=torch.float32))
    assert measured == ["conv2d"]


def test_nothing_of_it_is_told_as_a_decision(measured):
    with segfast.autotune():
        assert len(segfast.explain(RIGHT["conv2d of groups"], Fake())) == 1
    assert measured == ["conv2d"]


@pytest.mark.parametrize("name", sorted(set(WRONG) - ELSEWHERE))
def test_on_a_cpu_neither(name, monkeypatch, cache):
    measured = []
    monkeypatch.setattr(_measure, "measure", lambda call: measured.append(call) or Choice(ATEN, {}))
    with torch.no_grad(), segfast.autotune(), pytest.raises((RuntimeError, ValueError)):
        WRONG[name](Real())
    assert not measured
