"""Every convolution on a device: values and all gradients, in every dtype, shape and layout."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segfast.functional as SF

from ..fused_conv import REFERENCE_ACTIVATIONS, fused
from ..kernels.test_pixels import check_quotients
from .tester import Case, check, check_once, check_rounding_to_tf32

pytestmark = pytest.mark.device

VECTORS = ("bias", "scale", "shift")


def conv2d(
    input, weight, stride=1, padding=0, dilation=1, groups=1, /, *,
    vectors=(), residual=False, activation=None, **layouts,
) -> Case:  # fmt: skip
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shapes = {"input": input, "weight": weight} | {name: (weight[0],) for name in vectors}
    if residual:
        size = F.conv2d(
            torch.empty(input, device="meta"), torch.empty(weight, device="meta"), **options
        ).shape
        shapes["residual"] = tuple(size)

    def ours(tensors, activation):
        return SF.conv2d(**tensors, **options, activation=activation)

    def plain(tensors, activation):
        return fused(F.conv2d)(**tensors, **options, activation=activation)

    return Case(ours, plain, shapes, layouts, activation)


def images(sizes, channels_out, kernel=3, /, *, activation=None, **layouts) -> Case:
    """conv2d of a list of images, each cropped to the smallest."""
    shapes = {f"image{i}": size for i, size in enumerate(sizes)}
    shapes |= {
        "weight": (channels_out, sum(size[1] for size in sizes), kernel, kernel),
        "bias": (channels_out,),
    }
    height, width = (min(size[axis] for size in sizes) for axis in (2, 3))

    def ours(tensors, activation):
        *given, weight, bias = tensors.values()
        return SF.conv2d(given, weight, bias, padding=kernel // 2, activation=activation)

    def plain(tensors, activation):
        *given, weight, bias = tensors.values()
        return fused(F.conv2d)(
            cropped(given, height, width), weight, bias, 1, kernel // 2, activation=activation
        )

    return Case(ours, plain, shapes, layouts, activation)


def cropped(given: list[Tensor], height: int, width: int) -> Tensor:
    starts = [((t.shape[2] - height) // 2, (t.shape[3] - width) // 2) for t in given]
    parts = [t[:, :, h : h + height, w : w + width] for t, (h, w) in zip(given, starts, strict=True)]
    return torch.cat(parts, 1)


def parallel(input, channels_out, dilations, kernels, /, *, activation=None, **layouts) -> Case:
    shapes = {"input": input}
    for i, kernel in enumerate(kernels):
        shapes[f"weight{i}"] = (channels_out, input[1], kernel, kernel)
    shapes |= {"scale": (channels_out * len(kernels),), "shift": (channels_out * len(kernels),)}

    def ours(tensors, activation):
        input, *weights, scale, shift = tensors.values()
        return SF.parallel_conv2d(input, weights, dilations, scale=scale, shift=shift, activation=activation)

    def plain(tensors, activation):
        input, *weights, scale, shift = tensors.values()
        y = [
            F.conv2d(input, w, None, 1, d * (w.shape[2] // 2), d)
            for w, d in zip(weights, dilations, strict=True)
        ]
        return REFERENCE_ACTIVATIONS[activation](
            torch.cat(y, 1) * scale[:, None, None] + shift[:, None, None]
        )

    return Case(ours, plain, shapes, layouts, activation)


def transposed(
    input, weight, stride=1, padding=0, output_padding=0, groups=1, dilation=1, /, *,
    vectors=(), activation=None, **layouts,
) -> Case:  # fmt: skip
    geometry = (stride, padding, output_padding, groups, dilation)
    shapes = {"input": input, "weight": weight} | {name: (weight[1] * groups,) for name in vectors}

    def ours(tensors, activation):
        input, weight, bias, rest = split(tensors)
        return SF.conv_transpose2d(input, weight, bias, *geometry, **rest, activation=activation)

    def plain(tensors, activation):
        input, weight, bias, rest = split(tensors)
        return fused(F.conv_transpose2d)(input, weight, bias, *geometry, **rest, activation=activation)

    return Case(ours, plain, shapes, layouts, activation)


def split(tensors):
    rest = dict(tensors)
    return rest.pop("input"), rest.pop("weight"), rest.pop("bias", None), rest


def up_concat(input, skip, weight, /, *, activation=None, **layouts) -> Case:
    """Where up is smaller than the skip by one it grows; by more, the skip is cropped."""
    shapes = {"input": input, "skip": skip, "weight": weight, "bias": (weight[1],)}
    step = weight[2]
    extra = [
        n - step * m if 0 <= n - step * m < step else 0 for m, n in zip(input[2:], skip[2:], strict=True)
    ]

    def ours(tensors, activation):
        return SF.up_concat(*tensors.values(), stride=step, activation=activation)

    def plain(tensors, activation):
        input, skip, weight, bias = tensors.values()
        up = REFERENCE_ACTIVATIONS[activation](F.conv_transpose2d(input, weight, bias, step, 0, extra))
        return torch.cat([cropped([skip], *up.shape[2:]), up], 1)

    return Case(ours, plain, shapes, layouts, activation)


def depthwise(
    input, kernel, stride=1, padding=0, dilation=1, filters=1, /, *,
    statistics=False, vectors=(), activation=None, **layouts,
) -> Case:  # fmt: skip
    channels = input[1] * filters
    geometry = (stride, padding, dilation)
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    shapes = {"input": input, "weight": (channels, 1, *kernel)} | {name: (channels,) for name in vectors}

    def ours(tensors, activation):
        input, weight, bias, rest = split(tensors)
        return SF.depthwise_conv2d(
            input, weight, bias, *geometry, **rest, activation=activation, return_statistics=statistics
        )

    def plain(tensors, activation):
        input, weight, bias, rest = split(tensors)
        y = fused(F.conv2d)(input, weight, bias, *geometry, input.shape[1], **rest, activation=activation)
        return (y, y.sum((2, 3)), y.square().sum((2, 3))) if statistics else y

    # Squares of what is rounded are off by twice as much.
    return Case(ours, plain, shapes, layouts, activation, roundings=3 * statistics)


def separable(input, channels_out, kernel=3, stride=1, dilation=1, /, *, activation=None, **layouts) -> Case:
    channels, padding = input[1], dilation * (kernel // 2)
    shapes = {
        "input": input, "weight": (channels, 1, kernel, kernel), "weight2": (channels_out, channels, 1, 1),
        "depthwise_bias": (channels,), "bias": (channels_out,), "depthwise_scale": (channels,),
        "depthwise_shift": (channels,), "scale": (channels_out,), "shift": (channels_out,),
    }  # fmt: skip

    def ours(tensors, activation):
        input, first, second, b1, b2, s1, t1, s2, t2 = tensors.values()
        return SF.separable_conv2d(
            input, first, second, b1, b2, stride, padding, dilation, depthwise_scale=s1, depthwise_shift=t1,
            scale=s2, shift=t2, activation=activation,
        )  # fmt: skip

    def plain(tensors, activation):
        input, first, second, b1, b2, s1, t1, s2, t2 = tensors.values()
        between = fused(F.conv2d)(input, first, b1, stride, padding, dilation, channels, scale=s1, shift=t1)
        return fused(F.conv2d)(between, second, b2, scale=s2, shift=t2, activation=activation)

    return Case(ours, plain, shapes, layouts, activation, roundings=2)


CASES = {
    "conv2d, several tiles": conv2d(
        (2, 72, 13, 17), (136, 72, 3, 3), 1, 1, vectors=VECTORS, residual=True, activation="relu"
    ),
    "conv2d 1x1": conv2d((2, 40, 12, 11), (72, 40, 1, 1), vectors=VECTORS, activation="relu6"),
    "conv2d of one pixel": conv2d((8, 10, 1, 1), (1, 10, 1, 1), vectors=["bias"]),
    "conv2d of width 1": conv2d((2, 24, 37, 1), (40, 24, 3, 1), 1, (1, 0)),
    "conv2d of height 1": conv2d((1, 24, 1, 37), (40, 24, 1, 3), 1, (0, 1)),
    "conv2d of one channel to one": conv2d((2, 1, 9, 10), (1, 1, 3, 3), 1, 1, vectors=["bias"]),
    "conv2d of RGB, stride 2": conv2d((1, 3, 21, 23), (32, 3, 7, 7), 2, 3, activation="relu"),
    "conv2d, groups, strides": conv2d((2, 48, 11, 13), (24, 16, 5, 3), (3, 2), (3, 1), (2, 1), 3),
    "conv2d, zones": conv2d((1, 72, 19, 21), (72, 72, 3, 3), 1, 12, 12, vectors=VECTORS, activation="relu"),
    "conv2d, zones, odd": conv2d((2, 64, 9, 1), (21, 64, 3, 3), 1, 5, 5, input="wide"),
    "conv2d, off 16 bytes": conv2d(
        (1, 32, 9, 16), (32, 32, 3, 3), 1, 1, vectors=["bias"], input="off16", weight="off16",
        bias="off16", grad="off16",
    ),
    "conv2d, odd strides": conv2d(
        (2, 21, 9, 13), (33, 21, 3, 3), 1, 1, residual=True, input="wide", weight="wide", grad="wide"
    ),
    "conv2d, cropped": conv2d((2, 24, 9, 13), (40, 24, 3, 3), 2, 1, input="crop", grad="crop"),
    "conv2d, wide strides": conv2d((1, 24, 9, 13), (48, 24, 3, 3), 1, 1, input="wide16", grad="wide16"),
    "conv2d, NCHW": conv2d((2, 24, 9, 13), (40, 24, 3, 3), 1, 1, input="NCHW", weight="NCHW", grad="NCHW"),
    "images": images(((2, 40, 15, 14), (2, 72, 9, 12), (2, 3, 9, 11)), 72, activation="relu"),
    "images of width 1": images(((1, 16, 15, 1), (1, 17, 9, 1)), 21, 1, image0="crop", grad="wide"),
    "pyramid": parallel((1, 40, 33, 31), 72, (1, 6, 18), (1, 3, 3), activation="relu"),
    "pyramid of one pixel": parallel((3, 21, 1, 1), 8, (1, 6, 12), (1, 3, 3), grad="wide"),
    "pyramid, cropped": parallel((1, 24, 9, 8), 8, (1, 2), (1, 3), input="crop", grad="crop"),
    "conv_transpose2d 2x2": transposed(
        (2, 40, 13, 11), (40, 72, 2, 2), 2, vectors=VECTORS, activation="relu"
    ),
    "conv_transpose2d 4x4": transposed((1, 64, 9, 17), (64, 136, 4, 4), 2, 1, vectors=["bias"]),
    "conv_transpose2d 3x3, groups": transposed((2, 24, 8, 9), (24, 16, 3, 3), 2, 1, 1, 3, 2),
    "conv_transpose2d 16x16": transposed((1, 5, 4, 3), (5, 5, 16, 16), 8, 4),
    "conv_transpose2d of one pixel": transposed((8, 10, 1, 1), (10, 1, 2, 2), 2, vectors=["bias"]),
    "conv_transpose2d of width 1": transposed((2, 24, 19, 1), (24, 40, 2, 1), (2, 1)),
    "conv_transpose2d of one channel": transposed((1, 1, 9, 9), (1, 1, 3, 3), 3, 1),
    "conv_transpose2d, off 16 bytes": transposed(
        (1, 32, 5, 16), (32, 16, 2, 2), 2, input="off16", weight="off16", grad="off16"
    ),
    "conv_transpose2d, odd strides": transposed(
        (2, 21, 9, 7), (21, 33, 3, 3), (2, 1), 1, input="wide", weight="wide", grad="wide"
    ),
    "up_concat, odd": up_concat((2, 24, 9, 7), (2, 40, 19, 15), (24, 48, 2, 2), activation="relu"),
    "up_concat, cropped": up_concat((1, 24, 9, 7), (1, 5, 25, 15), (24, 21, 2, 2), skip="wide", grad="crop"),
    "up_concat of width 1": up_concat((1, 8, 9, 1), (1, 8, 18, 2), (8, 8, 2, 2), skip="off16", grad="off16"),
    "up_concat, odd strides": up_concat(
        (2, 21, 5, 7), (2, 9, 10, 14), (21, 11, 2, 2), input="wide", grad="wide"
    ),
    "up_concat, NCHW": up_concat((1, 16, 5, 7), (1, 8, 10, 14), (16, 8, 2, 2), skip="NCHW", grad="NCHW"),
    "depthwise 3x3": depthwise((2, 72, 11, 21), 3, 1, 1, vectors=VECTORS, activation="relu"),
    "depthwise 3x3, stride 2": depthwise((2, 40, 17, 21), 3, 2, 1, vectors=["bias"]),
    "depthwise 3x3, dilation 3": depthwise((1, 21, 14, 19), 3, 1, 3, 3, input="wide"),
    "depthwise 5x5": depthwise((1, 40, 9, 19), 5, 1, 2, weight="NCHW"),
    "depthwise 5x3, stride 2x1": depthwise((1, 40, 10, 19), (5, 3), (2, 1), (2, 1)),
    "depthwise 9x9, stride 3": depthwise((1, 24, 13, 14), 9, 3, 4),
    "depthwise, two filters": depthwise((2, 24, 9, 11), 3, 2, 2, 2, 2, vectors=["bias"]),
    "depthwise of width 1": depthwise((2, 16, 19, 1), (3, 1), 1, (1, 0)),
    "depthwise of two channels": depthwise((1, 2, 9, 9), 3, 1, 1, grad="NCHW"),
    "depthwise, off 16 bytes": depthwise(
        (1, 32, 9, 16), 3, 1, 1, input="off16", weight="off16", grad="off16"
    ),
    "statistics": depthwise((2, 40, 9, 21), 3, 1, 1, statistics=True, vectors=["scale", "shift"]),
    "statistics of one pixel": depthwise((3, 24, 1, 1), 3, 1, 1, statistics=True),
    "separable": separable((2, 40, 9, 17), 72, activation="relu"),
    "separable, stride 2": separable((1, 72, 17, 11), 24, 3, 2, input="wide", grad="crop"),
    "separable of one pixel": separable((2, 16, 1, 1), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_convolution(name, arithmetic, device):
    check(CASES[name], arithmetic, device)


@pytest.mark.parametrize(
    "name", ["conv2d 1x1", "conv_transpose2d of width 1", "depthwise of width 1", "separable of one pixel"]
)
def test_what_is_remembered_is_not_launched_on_pointers_of_another_alignment(name, device):
    case = CASES[name]
    check_once(case, "float16", device, 0)
    check_once(case._replace(layouts=dict.fromkeys((*case.shapes, "grad"), "off16")), "float16", device, 1)


@pytest.mark.parametrize(
    "name",
    [
        "conv2d 1x1", "conv2d, wide strides", "conv2d, zones", "images", "conv_transpose2d 2x2",
        "conv_transpose2d 3x3, groups", "separable",
    ],
)  # fmt: skip
@pytest.mark.parametrize("arithmetic", ["tf32"], indirect=True)
def test_operands_are_rounded_to_tf32_and_not_cut_off(name, arithmetic, device):
    check_rounding_to_tf32(CASES[name], device)


def random_case(family: str, rng: random.Random) -> Case:
    """Any kernel, stride, padding, dilation, groups, sizes, layouts and vectors that give a result at all."""
    if family in ("pointwise", "separable"):
        return random_pointwise(family, rng)
    while True:
        groups = rng.choice([1, 1, 1, 2])
        channels = groups * rng.choice([1, 3, 5, 8, 24, 40])
        channels_out = rng.choice([1, 3, 7, 21, 32, 40])
        kernel = (rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 3, 5]))
        stride = (rng.choice([1, 2, 3]), rng.choice([1, 2]))
        dilation = rng.choice([1, 1, 2, 3, 7])
        padding = tuple(rng.randrange(dilation * (k - 1) + 1) for k in kernel)
        size = (rng.choice([1, 4, 7, 13]), rng.choice([1, 5, 8, 17]))
        input = (rng.choice([1, 1, 2, 3]), channels, *size)
        vectors = [name for name in VECTORS if rng.random() < 0.5]
        layouts = {
            t: rng.choice(["", "", "wide", "crop", "off16", "NCHW"]) for t in ("input", "grad", "weight")
        }
        if family == "conv_transpose2d":
            extra = tuple(rng.randrange(max(s, dilation)) for s in stride)
            weight = (channels, channels_out, *kernel)
            grown = [
                (n - 1) * s - 2 * p + dilation * (k - 1) + e + 1
                for n, s, p, k, e in zip(size, stride, padding, kernel, extra, strict=True)
            ]
            if min(grown) > 0:
                return transposed(
                    input, weight, stride, padding, extra, groups, dilation, vectors=vectors, **layouts
                )
            continue
        if any(n + 2 * p <= dilation * (k - 1) for n, p, k in zip(size, padding, kernel, strict=True)):
            continue
        if family == "conv2d":
            weight = (groups * channels_out, channels // groups, *kernel)
            return conv2d(input, weight, stride, padding, dilation, groups, vectors=vectors, **layouts)
        if channels > 1:
            return depthwise(
                input, kernel, stride, padding, dilation, rng.choice([1, 1, 2]), vectors=vectors, **layouts
            )


def random_pointwise(family: str, rng: random.Random) -> Case:
    """A 1x1 convolution with any of what is fused into it, or one behind a depthwise convolution."""
    channels, channels_out = rng.choice([2, 5, 8, 21, 40, 72]), rng.choice([1, 3, 8, 21, 40])
    input = (rng.choice([1, 1, 2, 3]), channels, rng.choice([1, 3, 7, 12]), rng.choice([1, 5, 8, 13]))
    activation = rng.choice([None, "relu", "relu6"])
    layouts = {t: rng.choice(["", "", "wide", "crop", "off16", "NCHW"]) for t in ("input", "grad", "weight")}
    if family == "separable":
        kernel, stride, dilation = rng.choice([1, 3, 3, 5]), rng.choice([1, 1, 2]), rng.choice([1, 1, 2, 3])
        return separable(input, channels_out, kernel, stride, dilation, activation=activation, **layouts)
    return conv2d(
        input, (channels_out, channels, 1, 1), rng.choice([1, 1, 2]), residual=rng.random() < 0.5,
        vectors=[name for name in VECTORS if rng.random() < 0.5], activation=activation, **layouts,
    )  # fmt: skip


# How many of each.
RANDOM = {"conv2d": 6, "conv_transpose2d": 6, "depthwise": 6, "pointwise": 3, "separable": 3}


@pytest.mark.parametrize("family, seed", [(name, seed) for name, n in RANDOM.items() for seed in range(n)])
def test_random_convolution(family, seed, arithmetic, device):
    check(random_case(family, random.Random(f"{family} {arithmetic} {seed}")), arithmetic, device, seed)


def test_pixels_are_numbered_without_a_division(device):
    check_quotients(device)
