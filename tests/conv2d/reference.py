"""Convolution by its definition, and operands, small tiles and recorded launches to hold ours to it."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import segfast
from segfast.functional import conv2d, parallel_conv2d
from segfast.kernels import Tile, override_tile
from segfast.ops.conv2d import OPERATIONS

from ..fused_conv import REFERENCE_ACTIVATIONS, check_layer, draw, fused

DILATED = "_conv2d_dilated_kernel"
DENSE = "_conv2d_dense_kernel"
VECTORS = ("bias", "scale", "shift")


@contextlib.contextmanager
def tiles(pixels=16, outputs=16, depth=16, split=1) -> Iterator[None]:
    """Every operation of the family with one tile."""
    tile = Tile(pixels, outputs, depth, 4, 2, split_k=split)
    with contextlib.ExitStack() as stack:
        for operation in OPERATIONS:
            stack.enter_context(override_tile(operation, tile))
        yield


@contextlib.contextmanager
def launched() -> Iterator[list]:
    """The launches that are launched meanwhile, which `record_launches` would only collect."""
    from segfast.kernels._launch import Launch

    original, launches = Launch._launch, []
    Launch._launch = lambda launch, *rest: launches.append(launch) or original(launch, *rest)
    try:
        yield launches
    finally:
        Launch._launch = original


def names(launches) -> list[str]:
    return [launch.kernel.__name__ for launch in launches]


def pair(value) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def operands(
    shape, filters, kernel=3, *, groups=1, vectors=("bias",), dtype=torch.float32, channels_last=True
) -> dict[str, Tensor]:
    """{"input", "weight", and the vectors asked for}."""
    weight = draw(filters, shape[1] // groups, *pair(kernel), dtype=dtype, channels_last=channels_last)
    tensors = {"input": draw(*shape, dtype=dtype, channels_last=channels_last), "weight": weight}
    return tensors | {name: draw(filters, dtype=dtype, seed=i) for i, name in enumerate(vectors)}


def depths(input: Tensor, weight: Tensor) -> dict[str, int]:
    """Terms in the sums behind the output and the gradients of the images."""
    return {"output": weight[0].numel(), "input": weight.numel() // input.shape[1], "residual": 1}


def check_conv2d(tensors: dict[str, Tensor], activation=None, **geometry) -> dict[str, Tensor]:
    """Our kernels on the operands, values and all gradients, held to the error rule."""
    depth = depths(tensors["input"], tensors["weight"])
    with segfast.backend("triton"):
        return check_layer(
            conv2d, fused(F.conv2d), tensors, depth, activations={"activation": activation}, **geometry
        )


def concatenated(images) -> Tensor:
    """The image that a list of images stands for: their centers side by side."""
    height, width = (min(t.shape[axis] for t in images) for axis in (2, 3))
    centers = []
    for t in images:
        top, left = (t.shape[2] - height) // 2, (t.shape[3] - width) // 2
        centers.append(t[:, :, top : top + height, left : left + width])
    return torch.cat(centers, 1)


def split_images(tensors: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The images "input", "input1", ... of a dictionary, and the rest of it."""
    images = [t for name, t in tensors.items() if name.startswith("input")]
    return images, {name: t for name, t in tensors.items() if not name.startswith("input")}


def conv2d_of_images(**tensors_and_options) -> Tensor:
    images, rest = split_images(tensors_and_options)
    return conv2d(images, **rest)


def define_of_images(**tensors_and_options) -> Tensor:
    images, rest = split_images(tensors_and_options)
    return fused(F.conv2d)(concatenated(images), **rest)


def check_images(tensors: dict[str, Tensor], activation=None, **geometry) -> dict[str, Tensor]:
    """The convolution of the images "input", "input1", ... held to the error rule."""
    images, _ = split_images(tensors)
    weight = tensors["weight"]
    depth = depths(tensors["input"], weight) | {f"input{i}": weight[:, 0].numel() for i in range(len(images))}
    depth["input"] = weight[:, 0].numel()
    with segfast.backend("triton"):
        return check_layer(
            conv2d_of_images,
            define_of_images,
            tensors,
            depth,
            activations={"activation": activation},
            **geometry,
        )


def branches_of(tensors_and_options: dict) -> tuple[list[Tensor], dict]:
    weights = [t for name, t in tensors_and_options.items() if name.startswith("weight")]
    return weights, {n: t for n, t in tensors_and_options.items() if not n.startswith("weight")}


def parallel_of_named(**tensors_and_options) -> Tensor:
    weights, rest = branches_of(tensors_and_options)
    return parallel_conv2d(weights=weights, **rest)


def define_parallel(input, dilations, scale=None, shift=None, activation=None, **weights) -> Tensor:
    """Convolutions that keep the size, side by side, with their epilogue."""
    results = []
    for weight, dilation in zip(weights.values(), dilations, strict=True):
        dilation = pair(dilation)
        padding = [d * (k // 2) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        results.append(F.conv2d(input, weight, None, 1, padding, dilation))
    z = torch.cat(results, 1)
    if scale is not None:
        z = z * scale[:, None, None]
    if shift is not None:
        z = z + shift[:, None, None]
    return REFERENCE_ACTIVATIONS[activation](z)


def aspp(shape, filters, kernels, *, dtype=torch.float32, channels_last=True) -> dict[str, Tensor]:
    """{"input", "scale", "shift", "weight0", "weight1", ...}: `filters` of each branch, and its kernel."""
    tensors = {"input": draw(*shape, dtype=dtype, channels_last=channels_last)}
    tensors |= {name: draw(sum(filters), dtype=dtype, seed=i) for i, name in enumerate(("scale", "shift"))}
    for i, (count, kernel) in enumerate(zip(filters, kernels, strict=True)):
        weight = draw(count, shape[1], *pair(kernel), dtype=dtype, seed=i, channels_last=channels_last)
        tensors[f"weight{i}"] = weight
    return tensors


def check_parallel(tensors: dict[str, Tensor], dilations, activation=None) -> None:
    """Our one launch without gradients, and the branches with them, held to the error rule."""
    weights, _ = branches_of(tensors)
    depth = {"output": max(w[0].numel() for w in weights), "input": sum(w[:, 0].numel() for w in weights)}
    activations = {"activation": activation}
    options = {"activations": activations, "dilations": dilations}
    with segfast.backend("triton"):
        check_layer(parallel_of_named, define_parallel, tensors, depth, **options)
        values = {name: t.detach() for name, t in tensors.items()}
        check_layer(_only_values, define_parallel, values, depth, **options)


class _OnlyValues(torch.autograd.Function):
    """The launch of all branches, with the definition's gradients: `check_layer` wants some."""

    @staticmethod
    def forward(ctx, options, keys, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.options, ctx.keys = options, keys
        return parallel_of_named(**dict(zip(keys, tensors, strict=True)), **options)

    @staticmethod
    def backward(ctx, grad):
        options = {name: value for name, value in ctx.options.items() if name != "negative_slope"}
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            y = define_parallel(**dict(zip(ctx.keys, leaves, strict=True)), **options)
            return (None, None, *torch.autograd.grad(y, leaves, grad))


def _only_values(**tensors_and_options) -> Tensor:
    options = {n: v for n, v in tensors_and_options.items() if not isinstance(v, Tensor)}
    tensors = {n: v for n, v in tensors_and_options.items() if isinstance(v, Tensor)}
    return _OnlyValues.apply(options, list(tensors), *tensors.values())
