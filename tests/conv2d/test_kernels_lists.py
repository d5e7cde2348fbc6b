"""Several images as one input, several convolutions of one input: in Triton's interpreter, against fp64."""

import pytest
import torch

import segfast
from segfast.functional import conv2d, parallel_conv2d
from tests.conv2d.reference import (
    DENSE,
    DILATED,
    VECTORS,
    aspp,
    check_images,
    check_parallel,
    define_of_images,
    define_parallel,
    launched,
    pair,
    tiles,
)
from tests.fused_conv import draw

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_empty", "checked_launches")]

# Shapes of the images, C_out, and what differs from conv2d's defaults.
IMAGES = {
    "two": ([(1, 4, 3, 4), (1, 20, 3, 4)], 5, {"padding": 1}),
    "two of whole depths": ([(2, 16, 3, 3), (2, 32, 3, 3)], 5, {}),
    "three of one channel": ([(1, 1, 4, 3)] * 3, 2, {"padding": 1}),
    "four, 1x1": ([(1, 3, 4, 5), (1, 16, 4, 5), (1, 5, 4, 5), (1, 17, 4, 5)], 3, {"kernel": 1}),
    "four, s2": ([(1, 2, 3, 3), (1, 17, 3, 3), (1, 1, 3, 3), (1, 4, 3, 3)], 3, {"stride": 2, "padding": 1}),
    "five": ([(1, 2, 3, 3)] * 5, 2, {}),
    "one": ([(1, 3, 4, 4)], 2, {"padding": 1}),
    "cropped, odd differences": ([(1, 6, 8, 7), (1, 5, 4, 4)], 3, {"padding": 1}),
    "cropped, height of one and width of another": ([(1, 2, 3, 9), (1, 3, 6, 4)], 2, {}),
    "2x2": ([(1, 4, 4, 3), (1, 5, 4, 3)], 3, {"kernel": 2}),
    "d2": ([(1, 4, 5, 5), (1, 2, 6, 6)], 3, {"padding": 2, "dilation": 2}),
}


def operands(name, *, dtype=torch.float32, channels_last=True, vectors=("bias",)):
    shapes, filters, options = IMAGES[name]
    channels = sum(shape[1] for shape in shapes)
    tensors = {
        f"input{i or ''}": draw(*shape, dtype=dtype, seed=i, channels_last=channels_last)
        for i, shape in enumerate(shapes)
    }
    kernel = pair(options.get("kernel", 3))
    tensors["weight"] = draw(filters, channels, *kernel, dtype=dtype, channels_last=channels_last)
    tensors |= {name: draw(filters, dtype=dtype, seed=i) for i, name in enumerate(vectors)}
    return tensors, {n: v for n, v in options.items() if n != "kernel"}


@pytest.mark.compat
@pytest.mark.parametrize("name", IMAGES)
def test_images_are_as_if_concatenated(name):
    tensors, options = operands(name, channels_last=len(name) % 2 == 0)
    with tiles(), launched() as launches:
        check_images(tensors, "silu", **options)
    first = next(launch for launch in launches if launch.kernel.__name__ == DENSE)
    several = first.constants["CI1"] > 0
    assert several == (name not in ("one", "five"))
    if several:
        given = [first.constants[c] for c in ("CI", "CI1", "CI2", "CI3")]
        assert [c for c in given if c] == [shape[1] for shape in IMAGES[name][0]]


@pytest.mark.parametrize(
    ("name", "split", "dtype"),
    [("two", 3, torch.float32), ("four, 1x1", 2, torch.float16), ("2x2", 1, torch.float16)],
)
def test_alignment_of_images_is_promised_and_kept(name, split, dtype, checked_hints):
    tensors, options = operands(name, dtype=dtype, vectors=VECTORS)
    with tiles(split=split):
        check_images(tensors, "relu", **options)
    assert checked_hints


def test_a_list_reads_its_images_where_they_lie():
    tensors, options = operands("cropped, odd differences")
    with tiles(), segfast.backend("triton"), segfast.kernels.record_launches() as recorded:
        conv2d([tensors["input"], tensors["input1"]], tensors["weight"], **options)
    ((launch, pointers),) = recorded
    assert launch.kernel.__name__ == DENSE
    # The larger one from its row (8 - 4) // 2 and column (7 - 4) // 2 on.
    offset = pointers[0].data_ptr() - tensors["input"].data_ptr()
    assert offset == 4 * tensors["input"][0, 0, 2, 1].storage_offset()
    assert pointers[1].data_ptr() == tensors["input1"].data_ptr()


def test_a_remembered_list_is_told_apart_by_the_alignment_of_its_centers(checked_launches):
    # A crop 72 bytes into an image: whether it is aligned to 16 does not follow from the image's not being.
    store, w, second = draw(300), draw(4, 4, 1, 1, channels_last=True), draw(1, 1, 3, 3)
    with tiles(), segfast.backend("triton"):
        for offset in (1, 2, 3, 1, 2, 3):
            first = store[offset : offset + 75].view(1, 5, 5, 3).permute(0, 3, 1, 2)
            y = conv2d([first, second], w)
            expected = define_of_images(input=first, input1=second, weight=w)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


# Filters of each branch, kernels, dilations.
PYRAMIDS = {
    "ASPP": ((5,) * 4, (1, 3, 3, 3), (1, 2, 3, 7)),
    "one": ((17,), (3,), (2,)),
    "widths apart": ((3, 3, 18, 2), (3, 1, (3, 1), (1, 5)), (2, 1, (1, 4), 3)),
    "six": ((2,) * 6, (1, 3, (1, 3), (3, 1), 1, 1), (1, 1, 2, 3, 1, 4)),
}


@pytest.mark.parametrize(("name", "split"), [(n, 1) for n in PYRAMIDS] + [("ASPP", 2), ("widths apart", 3)])
def test_branches_are_as_if_run_one_by_one(name, split):
    filters, kernels, dilations = PYRAMIDS[name]
    tensors = aspp((2, 16, 2, 3), filters, kernels, channels_last=split == 1)
    with tiles(split=split), launched() as launches:
        check_parallel(tensors, dilations, "hardswish")
    branches = [launch.constants["BRANCHES"] for launch in launches if launch.kernel.__name__ == DILATED]
    # At the end the launch for all; branches of as many filters go together, five at the most.
    last = {"ASPP": [4], "one": [1], "widths apart": [2, 1, 1], "six": [5, 1]}[name]
    assert branches[-len(last) :] == last


@pytest.mark.parametrize("given", [(), ("scale",), ("shift",)])
def test_parallel_in_half_precision_without_some_vectors(given):
    tensors = aspp((1, 16, 5, 4), (5, 5), (3, 1), dtype=torch.float16)
    tensors = {n: t for n, t in tensors.items() if n not in ("scale", "shift") or n in given}
    with tiles():
        check_parallel(tensors, (3, 1), "relu")


def test_parallel_is_one_launch_and_bitwise_repeatable():
    filters, kernels, dilations = PYRAMIDS["ASPP"]
    tensors = aspp((1, 16, 3, 4), filters, kernels)
    weights = [tensors[f"weight{i}"] for i in range(4)]
    x, scale, shift = (tensors[n] for n in ("input", "scale", "shift"))
    for split, count in ((1, 1), (3, 2)):
        results = []
        for _ in range(2):
            with tiles(split=split), segfast.backend("triton"), launched() as launches:
                y = parallel_conv2d(x, weights, dilations, scale=scale, shift=shift, activation="gelu")
            assert len(launches) == count
            results.append(y)
        assert torch.equal(*results)
        assert y.is_contiguous(memory_format=torch.channels_last)
        expected = define_parallel(x, dilations, scale, shift, "gelu", **dict(enumerate_named(weights)))
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def enumerate_named(weights):
    return [(f"weight{i}", w) for i, w in enumerate(weights)]


def test_a_remembered_aspp_computes_anew(checked_launches):
    # Through other values and another alignment; split into two launches, whose parts of the result, the
    # scale and the shift begin anywhere.
    store = draw(400)
    with tiles(), segfast.backend("triton"):
        for offset in (0, 0, 4, 1, 1, 0):
            x = store[offset : offset + 48].view(1, 3, 4, 4).permute(0, 3, 1, 2)
            weights = [
                store[100 + offset : 112 + offset].view(3, 1, 1, 4).permute(0, 3, 1, 2),
                store[200 + offset : 272 + offset].view(2, 3, 3, 4).permute(0, 3, 1, 2),
            ]
            scale, shift = store[offset : offset + 5], store[50 + offset : 55 + offset]
            y = parallel_conv2d(x, weights, (1, 2), scale=scale, shift=shift)
            expected = define_parallel(x, (1, 2), scale, shift, **dict(enumerate_named(weights)))
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
