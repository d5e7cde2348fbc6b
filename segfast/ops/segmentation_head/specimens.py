"""Launches of the segmentation head's kernels for `segfast compile-report`: heads of real networks."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .._operands import load_kernels

# name: (batch, classes, height, width), output size, mode, align_corners, with weight and label smoothing
_HEADS = {
    "ade20k x4": ((16, 150, 128, 128), (512, 512), "bilinear", False, False),
    "cityscapes x8": ((8, 19, 128, 256), (1024, 2048), "bilinear", False, True),
    "voc corners": ((8, 21, 65, 65), (513, 513), "bilinear", True, False),
    "voc x16": ((8, 21, 33, 33), (513, 513), "bilinear", False, False),
    "fcn x32": ((4, 150, 16, 16), (512, 512), "bilinear", False, False),
    "binary x2": ((8, 2, 128, 128), (256, 256), "bilinear", False, False),
    "ade20k nearest": ((16, 150, 128, 128), (512, 512), "nearest", False, True),
    "past_int32": ((64, 1024, 256, 256), (512, 512), "bilinear", False, True),
}


def specimens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, a call of a launcher, the width in bytes its stores must have), on meta tensors.

    A thread stores single numbers, its neighbours those beside: a warp's stores are whole cache lines.
    """
    kernels = load_kernels()
    for name, (shape, size, mode, align_corners, options) in _HEADS.items():
        batch, classes = shape[:2]

        def make(*sizes, dtype=torch.float32):
            return torch.empty(sizes, dtype=dtype, device="meta")

        x, target = make(*shape, dtype=dtype), make(batch, *size, dtype=torch.int64)
        lse, losses, mean, labels = (make(batch, *size), make(batch, *size), make(batch, *size),
                                     make(batch, *size, dtype=torch.int64))  # fmt: skip
        weight, smoothing = (make(classes), 0.1) if options else (None, 0.0)
        per_class, geometry = make(3, classes), (mode, align_corners, None)
        yield (f"{name} loss", partial(kernels.upsample_softmax_forward, x, target, weight, None, lse,
                                       *geometry, 255, smoothing), 4)  # fmt: skip
        yield (f"{name} losses", partial(kernels.upsample_softmax_forward, x, target, weight, losses, lse,
                                         *geometry, 255, smoothing), 4)  # fmt: skip
        yield (f"{name} gradient", partial(kernels.upsample_grad_logits, make(), x, target, weight, lse, None,
                                           x, *geometry, 255, smoothing), dtype.itemsize)  # fmt: skip
        yield f"{name} argmax", partial(kernels.upsample_argmax, x, labels, None, *geometry), 8
        yield f"{name} confidence", partial(kernels.upsample_argmax, x, labels, mean, *geometry), 4
        yield f"{name} dice", partial(kernels.upsample_dice_sums, x, target, lse, *geometry, 255), 4
        yield (f"{name} dice mean", partial(kernels.softmax_expectation, x, target, lse, per_class, mean,
                                            *geometry), 4)  # fmt: skip
        yield (f"{name} dice gradient", partial(kernels.upsample_grad_logits, per_class, x, target, None, lse,
                                                mean, x, *geometry, 255, 0.0), dtype.itemsize)  # fmt: skip
