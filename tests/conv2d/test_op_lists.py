"""conv2d of a list of images and parallel_conv2d: what they stand for, their gradients, their errors."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv2d, parallel_conv2d
from segfast.ops.conv2d import prefers_virtual_concat
from tests.conv2d.reference import (
    aspp,
    branches_of,
    concatenated,
    conv2d_of_images,
    define_of_images,
    define_parallel,
    parallel_of_named,
    tiles,
)
from tests.fused_conv import BACKENDS, draw


@pytest.fixture(autouse=True)
def small_tiles():
    """Few steps for the interpreter: all sizes here fit one tile."""
    with tiles(64, 16, 64):
        yield


def images_of(dtype=torch.float32, channels_last=False, *, cropped=True):
    """Two images, a weight and every vector."""
    first = (1, 2, 5, 4) if cropped else (1, 2, 3, 3)
    shapes = {"input": first, "input1": (1, 3, 3, 3), "weight": (2, 5, 2, 3), "residual": (1, 2, 4, 3)}
    shapes |= {"bias": (2,), "scale": (2,), "shift": (2,)}
    return {
        name: draw(*shape, dtype=dtype, seed=i, channels_last=channels_last and len(shape) == 4)
        for i, (name, shape) in enumerate(shapes.items())
    }


def gradients(function, tensors, **options):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves, **options)
    g = draw(*y.shape, seed=5).to(y.dtype)
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), g), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("cropped", [False, True])
def test_a_list_is_the_convolution_of_its_concatenation(cropped, channels_last, backend, poisoned_empty):
    tensors = images_of(channels_last=channels_last, cropped=cropped)
    options = {"padding": 1, "activation": "relu"}
    expected, expected_grads = gradients(define_of_images, tensors, **options)
    with segfast.backend(backend):
        actual, grads = gradients(conv2d_of_images, tensors, **options)
        images = [tensors["input"], tensors["input1"]]
        as_tuple = conv2d(tuple(images), tensors["weight"], stride=2)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        as_tuple, F.conv2d(concatenated(images), tensors["weight"], stride=2), atol=1e-5, rtol=1e-5
    )
    assert actual.stride() == expected.stride()
    if backend == "triton":
        for name in ("input", "weight"):
            assert grads[name].shape == tensors[name].shape
        assert grads["weight"].stride() == tensors["weight"].stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_list_with_padding_by_name_and_groups(kernel, backend):
    images, w = [draw(1, 2, 3, 4), draw(1, 4, 4, 5)], draw(4, 6, kernel, kernel)
    joined = concatenated(images)
    with segfast.backend(backend):
        for padding in ("same", "valid"):
            y = conv2d(images, w, padding=padding)
            torch.testing.assert_close(y, F.conv2d(joined, w, padding=padding), atol=1e-5, rtol=1e-5)
        y = conv2d(images, w[:, :3], groups=2)
        torch.testing.assert_close(y, F.conv2d(joined, w[:, :3], groups=2), atol=1e-5, rtol=1e-5)
        # Groups of one channel: the joined image goes the depthwise way.
        y = conv2d(images, draw(6, 1, kernel, kernel), groups=6)
        torch.testing.assert_close(
            y, F.conv2d(joined, draw(6, 1, kernel, kernel), groups=6), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_image_twice(backend):
    x, w = draw(1, 2, 3, 3).requires_grad_(), draw(2, 4, 3, 3)
    expected = F.conv2d(torch.cat([x, x], 1), w, padding=1)
    with segfast.backend(backend):
        y = conv2d([x, x], w, padding=1)
        actual = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.square().sum(), x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_parallel_is_its_branches_side_by_side(channels_last, backend, poisoned_empty):
    tensors = aspp((2, 3, 4, 5), (2, 3, 2, 2, 2, 2), (1, 3, (3, 1), 1, 1, 1), channels_last=channels_last)
    options = {"dilations": (1, 2, (3, 1), 1, 1, 1), "activation": "hardswish"}
    expected, expected_grads = gradients(define_parallel, tensors, **options)
    with segfast.backend(backend):
        actual, grads = gradients(parallel_of_named, tensors, **options)
        without = parallel_of_named(**tensors, **options)
    for y in (actual, without):
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        assert y.stride() == expected.stride()
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parallel_takes_any_sequence_and_an_empty_batch(backend):
    tensors = aspp((1, 3, 2, 2), (2, 2), (3, 1))
    weights, rest = branches_of(tensors)
    with segfast.backend(backend):
        y = parallel_conv2d(rest["input"], tuple(weights), [(2, 2), 1])
        torch.testing.assert_close(
            y, define_parallel(rest["input"], [2, 1], a=weights[0], b=weights[1]), atol=1e-5, rtol=1e-5
        )
    empty = parallel_conv2d(rest["input"][:0], weights, (2, 1), activation="relu")
    assert empty.shape == (0, 4, 2, 2)


def test_a_list_prefers_nothing_on_aten():
    with segfast.backend("aten"):
        assert not prefers_virtual_concat([draw(1, 2, 3, 3)] * 2, draw(2, 4, 3, 3))


LIST_ERRORS = {
    "empty list": ([], {}, RuntimeError, "empty list"),
    "an unbatched image": ([(2, 3, 3), (2, 3, 3)], {}, RuntimeError, r"input\[0\] .*\[2, 3, 3\]"),
    "no image": (["image", (1, 2, 3, 3)], {}, RuntimeError, r"input\[0\].*str"),
    "batches": ([(1, 2, 3, 3), (2, 2, 3, 3)], {}, RuntimeError, r"input\[1\].*batch size, got 1 and 2"),
    "channels": ([(1, 2, 3, 3), (1, 3, 3, 3)], {}, RuntimeError, "5 channels"),
    "weight ndim": ([(1, 2, 3, 3)] * 2, {"weight": (4, 4)}, RuntimeError, "weight"),
    "bias": ([(1, 2, 3, 3)] * 2, {"bias": (3,)}, RuntimeError, "bias"),
    "residual": ([(1, 2, 3, 3)] * 2, {"residual": (1, 2, 3, 3)}, RuntimeError, "residual"),
    "size": ([(1, 2, 3, 3), (1, 2, 1, 3)], {}, RuntimeError, "size"),
    "activation": ([(1, 2, 3, 3)] * 2, {"activation": "swish"}, ValueError, "'relu', .*'swish'"),
    "padding": ([(1, 2, 3, 3)] * 2, {"padding": "full"}, RuntimeError, "'valid', 'same'.*'full'"),
    "stride": ([(1, 2, 3, 3)] * 2, {"stride": 0}, RuntimeError, "stride"),
    "negative padding": ([(1, 2, 3, 3)] * 2, {"padding": -1}, RuntimeError, "padding"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", LIST_ERRORS)
def test_bad_lists_are_named(wrong, backend):
    shapes, given, error, word = LIST_ERRORS[wrong]
    images = [torch.ones(s) if isinstance(s, tuple) else s for s in shapes]
    is_shape = ("weight", "bias", "residual")
    options = {n: torch.ones(v) if n in is_shape else v for n, v in given.items()}
    weight = options.pop("weight", torch.ones(2, 4, 3, 3))
    with segfast.backend(backend), pytest.raises(error, match=f"(?i){word}"):
        conv2d(images, weight, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_that_differ_in_more_than_size_are_named(backend):
    first, weight = torch.ones(1, 2, 3, 3), torch.ones(2, 4, 3, 3)
    with segfast.backend(backend):
        with pytest.raises(RuntimeError, match=r"input\[1\].*dtype"):
            conv2d([first, first.double()], weight)
        with pytest.raises(RuntimeError, match=r"input\[1\].*device"):
            conv2d([first, first.to("meta")], weight)


def _weights(*shapes):
    return [torch.ones(shape) for shape in shapes]


PARALLEL_ERRORS = {
    "no branch": ([], [], {}, "at least one"),
    "fewer dilations": (_weights((2, 3, 3, 3)), [], {}, "as many.*1 and 0"),
    "more dilations": (_weights((2, 3, 3, 3)), [1, 2], {}, "as many"),
    "channels": (_weights((2, 3, 1, 1), (2, 4, 3, 3)), [1, 1], {}, r"weights\[1\] .*\[2, 4, 3, 3\]"),
    "weight ndim": (_weights((2, 3)), [1], {}, r"weights\[0\]"),
    "no filters": (_weights((0, 3, 1, 1), (2, 3, 3, 3)), [1, 1], {}, r"weights\[0\] has no filters"),
    "no filters, last": (_weights((2, 3, 3, 3), (0, 3, 1, 1)), [1, 1], {}, r"weights\[1\] has no filters"),
    "even kernel": (_weights((2, 3, 3, 2)), [1], {}, r"weights\[0\] .*odd"),
    "dilation": (_weights((2, 3, 3, 3)), [0], {}, r"dilations\[0\] must be positive"),
    "dilation length": (_weights((2, 3, 3, 3)), [(1, 2, 3)], {}, "dilations"),
    "scale": (_weights((2, 3, 3, 3), (2, 3, 3, 3)), [1, 2], {"scale": torch.ones(2)}, "scale"),
    "shift": (_weights((2, 3, 3, 3)), [1], {"shift": torch.ones(2, 1)}, "shift"),
    "dtype": ([torch.ones(2, 3, 3, 3).double()], [1], {}, r"weights\[0\].*dtype"),
    "device": ([torch.ones(2, 3, 3, 3, device="meta")], [1], {}, r"weights\[0\].*device"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", PARALLEL_ERRORS)
def test_bad_branches_are_named(wrong, backend):
    weights, dilations, options, word = PARALLEL_ERRORS[wrong]
    with segfast.backend(backend), pytest.raises(RuntimeError, match=word):
        parallel_conv2d(torch.ones(1, 3, 4, 4), weights, dilations, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_and_activation_of_parallel(backend):
    weights = _weights((2, 3, 3, 3))
    with segfast.backend(backend):
        with pytest.raises(RuntimeError, match=r"input must be \[N, C_in, H, W\]"):
            parallel_conv2d(torch.ones(3, 4, 4), weights, [1])
        with pytest.raises(ValueError, match=r"'relu', .*'swish'"):
            parallel_conv2d(torch.ones(1, 3, 4, 4), weights, [1], activation="swish")


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_without_channels_is_no_end_of_the_list(backend, place):
    images = [draw(1, 3, 4, 4), draw(1, 2, 4, 4)]
    weight = draw(2, 5, 3, 3)
    expected = F.conv2d(torch.cat(images, 1), weight)
    images.insert(place, draw(1, 0, 4, 4))
    operator = torch.ops.segfast.conv2d_concat
    one = (1, 1)
    with segfast.backend(backend):
        torch.testing.assert_close(conv2d(images, weight), expected, atol=1e-5, rtol=1e-5)
        found = operator(images[0], images[1:], weight, None, None, None, None, one, (0, 0), one, None, 0.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_explain_names_a_list_once(backend):
    images, weight = [draw(1, 2, 4, 4), draw(1, 3, 4, 4)], draw(2, 5, 3, 3)
    with segfast.backend(backend):
        (explanation,) = segfast.explain(conv2d, images, weight)
    assert (explanation.operation, explanation.backend) == ("conv2d", backend)


@pytest.mark.interpreter
def test_the_operators_take_an_empty_batch():
    """As an exported program with a free batch size may bring it."""
    ops, one, pad = torch.ops.segfast, (1, 1), (1, 1)
    x, weight, geometry = draw(0, 3, 5, 4), draw(2, 3, 3, 3), ((1, 1), (1, 1), (1, 1))
    y = ops.conv2d(x, weight, None, None, None, None, *geometry, 1, "relu", 0.0)
    assert y.shape == (0, 2, 5, 4)
    assert ops.conv2d_grad_input(y, weight, 5, 4, *geometry, 1).shape == x.shape
    assert torch.equal(ops.conv2d_grad_weight(y, x, weight, *geometry, 1), torch.zeros_like(weight))
    found = ops.conv2d_concat(
        x, [x], torch.cat([weight] * 2, 1), None, None, None, None, one, pad, one, None, 0.0
    )
    assert found.shape == (0, 2, 5, 4)
    assert ops.parallel_conv2d(x, [weight, weight], None, None, [1, 1, 2, 2], None, 0.0).shape == (0, 4, 5, 4)


def test_several_images_want_zeros_for_padding():
    conv = segfast.nn.Conv2d(5, 2, 3, padding=1, padding_mode="reflect")
    with pytest.raises(TypeError, match="one image where padding_mode is 'reflect', got a list of 2"):
        conv([draw(1, 2, 4, 4), draw(1, 3, 4, 4)])
