"""Calls on a GPU as they are made, and run again on tensors of their shapes to be measured.

Tensors of a CPU say that they are a GPU's; nothing is known of it, so that ATen computes.
"""

import pytest
import torch

import segfast.functional as sf
from segfast.ops import FAMILIES, _gpu_measure
from segfast.ops._backend import backend
from segfast.ops._choice import collect
from segfast.ops._gpu_call import GPU_OPERATIONS, Draw

CPU = torch.device("cpu")


def draw(*shape):
    t = torch.randn(shape)
    return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_()


def vectors(count, *names):
    return {name: draw(count) for name in names}


def conv2d():
    x, weight, epilogue = draw(2, 8, 9, 11), draw(6, 4, 3, 5), vectors(6, "bias", "scale", "shift")
    yield sf.conv2d, (x, draw(6, 8, 3, 3)), {}
    geometry = {"stride": (1, 2), "padding": (2, 3), "dilation": (2, 1), "groups": 2}
    yield sf.conv2d, (x, weight), epilogue | geometry | {"residual": draw(2, 6, 9, 7), "activation": "silu"}
    yield sf.conv2d, (x, weight), {"scale": epilogue["scale"], "padding": "same", "groups": 2}


def conv2d_of_images():
    yield sf.conv2d, ([draw(1, 3, 9, 8), draw(1, 5, 7, 8)], draw(4, 8, 3, 3)), {"stride": 2, "padding": 1}


def parallel_conv2d():
    weights = [draw(4, 8, 1, 1), draw(3, 8, 3, 3)]
    yield sf.parallel_conv2d, (draw(1, 8, 9, 8), weights, [1, (2, 3)]), {"activation": "relu"}
    yield sf.parallel_conv2d, (draw(1, 8, 9, 8), weights, [1, 6]), vectors(7, "scale", "shift")


def conv_transpose2d():
    x, weight, epilogue = draw(2, 8, 5, 4), draw(8, 3, 3, 2), vectors(6, "bias", "scale", "shift")
    geometry = {"stride": 2, "padding": (1, 0), "output_padding": (1, 0), "groups": 2, "dilation": (2, 1)}
    yield sf.conv_transpose2d, (x, draw(8, 3, 2, 2)), {"stride": 2}
    residual = {"residual": draw(2, 6, 12, 8), "activation": "relu"}
    yield sf.conv_transpose2d, (x, weight), epilogue | geometry | residual


def up_concat():
    x, weight, skip = draw(2, 8, 5, 4), draw(8, 3, 2, 2), draw(2, 4, 10, 8)
    yield sf.up_concat, (x, skip, weight), {}
    yield sf.up_concat, (x, skip, weight), {"bias": draw(3), "activation": "relu"}


def depthwise_conv2d():
    x, weight = draw(2, 4, 9, 8), draw(8, 1, 3, 5)
    yield sf.depthwise_conv2d, (x, weight), {"return_statistics": True}
    geometry = {"stride": 2, "padding": (2, 4), "dilation": (1, 2), "activation": "relu6"}
    yield sf.depthwise_conv2d, (x, weight), geometry | vectors(8, "bias", "scale", "shift")
    yield sf.depthwise_conv2d, (x, weight), {"shift": draw(8)}


def separable_conv2d():
    x, weight, pointwise = draw(2, 4, 9, 8), draw(8, 1, 3, 3), draw(6, 8, 1, 1)
    yield sf.separable_conv2d, (x, weight, pointwise), {}
    options = {"depthwise_activation": "relu", "activation": "silu", "stride": 2, "padding": 1}
    inner = vectors(8, "depthwise_bias", "depthwise_scale", "depthwise_shift")
    outer = vectors(6, "bias", "scale", "shift") | {"residual": draw(2, 6, 5, 4)}
    yield sf.separable_conv2d, (x, weight, pointwise), options | inner | outer
    yield sf.separable_conv2d, (x, weight, pointwise), {"depthwise_scale": draw(8), "shift": draw(6)}


def packed_max_pool2d():
    yield sf.packed_max_pool2d, (draw(2, 6, 5, 4),), {}
    yield sf.packed_max_pool2d, (draw(2, 6, 5, 4),), {"ceil_mode": True}


def packed_max_unpool2d():
    places = torch.zeros(2, 2, 3, 2, dtype=torch.uint8)
    yield sf.packed_max_unpool2d, (draw(2, 6, 3, 2), places), {}
    yield sf.packed_max_unpool2d, (draw(2, 6, 3, 2), places), {"output_size": (6, 5)}


LABELS = torch.randint(5, (2, 13, 7))


def upsample_cross_entropy():
    yield sf.upsample_cross_entropy, (draw(2, 5, 4, 3), LABELS), {}
    options = {"mode": "nearest", "label_smoothing": 0.1, "weight": torch.rand(5), "reduction": "none"}
    yield sf.upsample_cross_entropy, (draw(2, 5, 4, 3), LABELS), options


def upsample_dice():
    yield sf.upsample_dice, (draw(2, 5, 4, 3), LABELS), {"align_corners": True}


def upsample_argmax():
    yield sf.upsample_argmax, (draw(2, 5, 4, 3).detach(), (13, 7)), {}
    yield sf.upsample_argmax, (draw(2, 5, 4, 3).detach(), (13, 7)), {"return_confidence": True}


@pytest.fixture
def on_a_gpu(pretended_gpu, monkeypatch):
    for name, answer in (("is_cuda", True), ("is_cpu", False)):
        monkeypatch.setattr(torch.Tensor, name, answer, raising=False)


def kinds(results):
    results = results if isinstance(results, tuple) else (results,)
    return [(t.shape, t.dtype, t.stride()) for t in results]


def test_each_operation_has_samples():
    assert {name for name in GPU_OPERATIONS if name not in globals()} == set()
    assert {each.family for each in GPU_OPERATIONS.values()} == {*FAMILIES} - {"dense_crf"}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("operation", GPU_OPERATIONS)
def test_each_call_that_is_made_can_be_run_again(operation, gradients, on_a_gpu):
    for function, args, options in globals()[operation]():
        with torch.set_grad_enabled(gradients), collect() as collected:
            results = function(*args, **options)
        if gradients and operation == "parallel_conv2d":  # which is one convolution after the other then
            assert {call.operation for call in collected.counts} == {"conv2d"}
            continue
        call = next(iter(collected.counts))  # those it consists of come after it
        assert call.operation == operation and call.dtype == torch.float32 and call.channels_last
        assert call.gradients == (gradients and operation != "upsample_argmax")
        bound = GPU_OPERATIONS[operation].bind(call, Draw(call, CPU))
        again = _gpu_measure._runner(call, bound, "aten")()
        expected = kinds(results)
        assert kinds(again[: len(expected)]) == expected, call
        floats = [t for t in bound.tensors if t.is_floating_point()]
        assert [t.shape for t in again[len(expected) :]] == [t.shape for t in floats if call.gradients], call
        assert hash(call) and str(call).startswith(operation)
        # Weights of classes are not among the tensors; the images' convolution always has an epilogue.
        if "weight" not in options and operation != "conv2d_of_images":
            operands = (each for arg in args for each in (arg if isinstance(arg, list) else (arg,)))
            given = [t for t in (*operands, *options.values()) if isinstance(t, torch.Tensor)]
            with backend("aten"), torch.no_grad():
                same = bound.function(*given)
            torch.testing.assert_close(same, results, msg=lambda text, call=call: f"{call}: {text}")
