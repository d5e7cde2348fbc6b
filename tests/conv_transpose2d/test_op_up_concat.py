"""`segfast.functional.up_concat`: a U-Net decoder's step against crop, `output_size` and `torch.cat`.

What holds of every function (strides of operands and gradients, gradcheck) is in `tests/conformance/`.
"""

import pytest
import torch

import segfast
from segfast.functional import up_concat
from tests.conformance.families import define_up_concat as reference
from tests.fused_conv import BACKENDS, INTERPRETING_ONLY, REFERENCE_ACTIVATIONS, draw
from tests.tolerances import assert_close_to_reference

# x's and the skip's height and width, kernel, stride, padding.
STEPS = {
    "k2s2 even": ((3, 4), (6, 8), 2, 2, 0),
    "k2s2 odd: 7 -> 3 -> 7": ((3, 3), (7, 7), 2, 2, 0),
    "k2s2 one side odd": ((3, 4), (7, 8), 2, 2, 0),
    "k2s2 cropped by 4": ((3, 3), (14, 14), 2, 2, 0),
    "k2s2 cropped unevenly": ((2, 3), (9, 11), 2, 2, 0),
    "k2s2 one side cropped, the other grown": ((3, 3), (7, 10), 2, 2, 0),
    "k2s2 cropped by a stride": ((3, 3), (8, 6), 2, 2, 0),
    "k3s2p1": ((3, 4), (6, 8), 3, 2, 1),
    "k3s2p1 exact": ((3, 4), (5, 7), 3, 2, 1),
    "k4s2p1": ((3, 4), (7, 8), 4, 2, 1),
    "k4s4": ((2, 2), (11, 8), 4, 4, 0),
    "k3s3 grown by 2": ((2, 2), (8, 7), 3, 3, 0),
    "k(2,3)s(2,3)": ((2, 3), (5, 9), (2, 3), (2, 3), 0),
    "k2s1": ((3, 3), (4, 6), 2, 1, 0),
    "one pixel": ((1, 1), (3, 2), 2, 2, 0),
}
NAMES = ("x", "skip", "weight", "bias")


def operands(step, dtype=torch.float32, channels_last=False, channels=(4, 3, 5)):
    size, skip_size, kernel, stride, padding = STEPS[step]
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    c_in, c_skip, c_up = channels
    options = {"dtype": dtype, "channels_last": channels_last}
    tensors = (
        draw(2, c_in, *size, **options),
        draw(2, c_skip, *skip_size, **options),
        draw(c_in, c_up, *kernel, **options),
        draw(c_up, dtype=dtype),
    )
    return tensors, {"stride": stride, "padding": padding}


def run(function, tensors, **options):
    """The result and the gradients of every operand, under an upstream gradient exact in any dtype."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    y = function(*leaves, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, draw(*y.shape, dtype=torch.float16).to(y.dtype))


def check(step, dtype=torch.float32, activation=None, **options):
    tensors, geometry = operands(step, dtype, **options)
    slope = {"negative_slope": 0.2} if activation == "leaky_relu" else {}
    actual = run(up_concat, tensors, activation=activation, **geometry, **slope)
    wide = run(reference, [t.double() for t in tensors], activation=activation, **geometry)
    aten = run(reference, tensors, activation=activation, **geometry)
    sizes = run(lambda *a, **o: reference(*a, **o), [t.double().abs() for t in tensors], **geometry)
    depth = (tensors[2][:, 0].numel(), tensors[2][0].numel(), 1, tensors[0].numel(), actual[0][:, 0].numel())
    for name, *rest in zip(("output", *NAMES), actual, wide, aten, sizes, depth, strict=True):
        assert_close_to_reference(*rest, what=name)
    skip_channels = tensors[1].shape[1]
    assert torch.equal(actual[0][:, :skip_channels], aten[0][:, :skip_channels])  # copied, not computed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("step", STEPS)
def test_is_crop_output_size_and_cat(step, channels_last, backend, poisoned_empty):
    with segfast.backend(backend):
        check(step, channels_last=channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [name for name in REFERENCE_ACTIVATIONS if name])
def test_the_activation_is_for_up_alone(activation, backend, poisoned_empty):
    with segfast.backend(backend):
        check("k2s2 one side cropped, the other grown", activation=activation)
        check("k3s2p1", activation=activation)


@INTERPRETING_ONLY
@pytest.mark.parametrize("step", ["k2s2 odd: 7 -> 3 -> 7", "k2s2 cropped by 4", "k3s2p1"])
def test_half_precision(step, poisoned_empty):
    with segfast.backend("triton"):
        check(step, torch.float16, channels_last=True)


@INTERPRETING_ONLY
@pytest.mark.parametrize("channels", [(3, 1, 1), (21, 40, 21), (8, 16, 32), (5, 33, 16)], ids=str)
def test_channels_that_fill_tiles_and_that_do_not(channels, poisoned_empty):
    with segfast.backend("triton"):
        check("k2s2 one side odd", channels_last=True, channels=channels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", ["k2s2 even", "k2s2 odd: 7 -> 3 -> 7", "k2s2 cropped by 4"])
def test_memory_format_follows_input_or_weight(step, backend):
    for layouts in ((False, False, False), (True, True, True), (True, False, False), (False, False, True)):
        (x, skip, w, bias), geometry = operands(step)
        x, skip, w = (
            t.contiguous(memory_format=torch.channels_last) if last else t
            for t, last in zip((x, skip, w), layouts, strict=True)
        )
        with segfast.backend(backend):
            y = up_concat(x, skip, w, bias, **geometry)
        last = layouts[0] or layouts[2]
        expected = y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        # ATen's cat decides for itself where its operands differ.
        if backend == "triton" or len(set(layouts)) == 1:
            assert y.stride() == expected.stride(), layouts
        torch.testing.assert_close(y, reference(x, skip, w, bias, **geometry), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    (x, skip, w, bias), geometry = operands("k2s2 even")
    leaves = [t.requires_grad_() for t in (x, skip, w, bias)]
    with torch.autocast("cpu", torch.float16), segfast.backend(backend):
        y = up_concat(*leaves, **geometry)
        assert y.dtype == torch.float16
        # The skip of an autocast encoder is already fp16 where x, from a float32 layer, is not.
        assert up_concat(x, skip.half(), w, bias, **geometry).dtype == torch.float16
        grads = torch.autograd.grad(y.float().sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 4
    torch.testing.assert_close(y.float(), reference(x, skip, w, bias, **geometry), atol=1e-2, rtol=1e-2)


def _t(*shape, **options):
    return torch.ones(shape, **options)


ERRORS = {
    "up larger": (
        (_t(1, 4, 3, 3), _t(1, 2, 5, 6), _t(4, 2, 2, 2)),
        {},
        ValueError,
        "height 6 is larger than the skip's 5",
    ),
    "up wider": ((_t(1, 4, 3, 3), _t(1, 2, 6, 5), _t(4, 2, 2, 2)), {}, ValueError, "width 6"),
    "batch": ((_t(1, 4, 3, 3), _t(2, 2, 6, 6), _t(4, 2, 2, 2)), {}, RuntimeError, "batch"),
    "dtype": ((_t(1, 4, 3, 3), _t(1, 2, 6, 6).half(), _t(4, 2, 2, 2)), {}, RuntimeError, "dtype"),
    "device": ((_t(1, 4, 3, 3), _t(1, 2, 6, 6, device="meta"), _t(4, 2, 2, 2)), {}, RuntimeError, "device"),
    "channels": ((_t(1, 3, 3, 3), _t(1, 2, 6, 6), _t(4, 2, 2, 2)), {}, RuntimeError, "channels"),
    "x ndim": ((_t(4, 3, 3), _t(1, 2, 6, 6), _t(4, 2, 2, 2)), {}, RuntimeError, "4-D"),
    "skip ndim": ((_t(1, 4, 3, 3), _t(2, 6, 6), _t(4, 2, 2, 2)), {}, RuntimeError, "4-D"),
    "weight ndim": ((_t(1, 4, 3, 3), _t(1, 2, 6, 6), _t(4, 2, 2)), {}, RuntimeError, "4-D"),
    "bias": ((_t(1, 4, 3, 3), _t(1, 2, 6, 6), _t(4, 2, 2, 2), _t(3)), {}, RuntimeError, "bias"),
    "stride": ((_t(1, 4, 3, 3), _t(1, 2, 6, 6), _t(4, 2, 2, 2)), {"stride": 0}, RuntimeError, "stride"),
    "activation": (
        (_t(1, 4, 3, 3), _t(1, 2, 6, 6), _t(4, 2, 2, 2)),
        {"activation": "mish"},
        ValueError,
        "mish",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", ERRORS)
def test_bad_arguments_are_named(wrong, backend):
    args, options, error, match = ERRORS[wrong]
    with segfast.backend(backend), pytest.raises(error, match=match):
        up_concat(*args, **options)


@INTERPRETING_ONLY
def test_one_launch_copies_and_convolves():
    (x, skip, w, bias), geometry = operands("k2s2 cropped by 4", channels_last=True)
    with segfast.backend("triton"), segfast.kernels.record_launches() as launches:
        up_concat(x, skip, w, bias, **geometry, activation="relu")
    ((launch, pointers),) = launches
    assert launch.constants["SKIP"] == 3 and any(
        p is skip for p in pointers
    )  # read where it lies, not copied first


def test_a_skip_larger_than_needed_gets_zero_gradients_outside_the_crop():
    (x, skip, w, bias), geometry = operands("k2s2 cropped by 4")
    skip.requires_grad_()
    with segfast.backend("aten"):
        up_concat(x, skip, w, bias, **geometry).sum().backward()
    inside = torch.zeros(14, 14)
    inside[4:10, 4:10] = 1
    assert torch.equal(skip.grad, inside.expand_as(skip))
