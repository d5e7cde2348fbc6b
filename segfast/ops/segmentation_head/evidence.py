"""The cases that prove the segmentation head's kernels right on a GPU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .._case import Proof as Evidence
from . import formulas
from .geometry import Resampling, upsample, upsample_adjoint
from .operators import ARGMAX, CROSS_ENTROPY, CROSS_ENTROPY_BACKWARD, DICE_SUMS, DICE_SUMS_BACKWARD

IGNORED = 255

# (batch, classes, height, width), the resampling, whether classes are weighted, label smoothing. Odd sizes,
# classes that fill no block, every kind of source position, cells of one output and of many.
_PROOFS = {
    "x4 150 classes": ((2, 150, 9, 13), Resampling((36, 52), "bilinear", False, (4.0, 4.0)), False, 0.0),
    "x8 19 classes weighted": ((2, 19, 7, 5), Resampling((56, 40), "bilinear", False, None), True, 0.1),
    "corners 21 classes": ((1, 21, 9, 17), Resampling((65, 129), "bilinear", True, None), True, 0.0),
    "x2.3 5 classes": ((3, 5, 11, 8), Resampling((25, 18), "bilinear", False, (2.3, 2.3)), False, 0.3),
    "smaller": ((1, 33, 19, 23), Resampling((7, 9), "bilinear", False, None), False, 0.0),
    "nearest": ((2, 12, 6, 7), Resampling((13, 28), "nearest", False, None), True, 0.2),
}


def proofs(device: torch.device, dtype: torch.dtype) -> Iterator[Evidence]:
    """Evidence for `segfast.ops._prove`: each operator beside fp64 and beside ATen in its own dtype."""
    for case, sizes in _PROOFS.items():
        yield from head_evidence(device, dtype, case, *sizes)


def head_evidence(
    device: torch.device, dtype: torch.dtype, case: str, shape, resampling: Resampling, weighted, smoothing
) -> Iterator[Evidence]:
    """Every operation on one case, sizes as in `_PROOFS`."""
    generator = torch.Generator().manual_seed(0)
    batch, classes = shape[:2]
    logits = (3 * torch.randn(shape, generator=generator)).to(dtype)
    target = torch.randint(classes, (batch, *resampling.size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.1] = IGNORED
    weight = torch.rand(classes, generator=generator) + 0.5 if weighted else None
    grad = torch.randn(target.shape, generator=generator)
    inputs = (logits, target, weight, grad, torch.randn(3, classes, generator=generator))
    yield from _cross_entropy(device, case, resampling, smoothing, *inputs[:4])
    yield from _labels_and_dice(device, case, resampling, logits, target, inputs[4])


def _to(device: torch.device, *tensors: Any) -> list[Any]:
    return [None if t is None else t.to(device) for t in tensors]


def _wide(*tensors: Any) -> list[Any]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def _per_output(size: tuple[int, int], low: torch.Size) -> int:
    """Outputs that a low-resolution pixel's gradient sums over."""
    return 4 * (size[0] // low[0] + 1) * (size[1] // low[1] + 1)


def _cross_entropy(
    device, case, resampling: Resampling, smoothing, logits, target, weight, grad
) -> Iterator[Evidence]:
    options = (*resampling, IGNORED, smoothing)
    x, t, w, g = _to(device, logits, target, weight, grad)
    wide_x, _, wide_w, wide_g = _wide(logits, target, weight, grad)
    reference, wide_lse = formulas.cross_entropy(wide_x, target, wide_w, *options, True)
    rounded = upsample(x, *resampling).float()  # as the separate functions have it
    same = (*_same(resampling), IGNORED, smoothing)
    aten = formulas.cross_entropy(rounded, t, w, *same, True)[0]
    z = upsample(wide_x, *resampling)
    scale = z.abs().amax(1)
    run = partial(CROSS_ENTROPY, x, t, w, *options, True)
    yield Evidence("upsample_softmax_forward", case, lambda: run()[0], reference, aten, 2 * scale, z.shape[1])

    reference = formulas.cross_entropy_gradient(wide_g, wide_x, target, wide_w, wide_lse, *options)
    lse = wide_lse.float().to(device)
    aten = formulas.cross_entropy_gradient(g, x, t, w, lse, *options)
    size = upsample_adjoint((torch.softmax(z, 1) + 0.1) * (grad.abs() * (1 + scale))[:, None],
                            logits.shape, *resampling[1:])  # fmt: skip
    backward = partial(CROSS_ENTROPY_BACKWARD, g, x, t, w, lse, *options)
    depth = _per_output(resampling.size, logits.shape[2:])
    yield Evidence("upsample_grad_logits", case, backward, reference, aten, size, depth)


def _same(resampling: Resampling) -> Resampling:
    """The resampling that changes nothing, for logits that are of full size already."""
    return Resampling(resampling.size, "nearest", False, None)


def _labels_and_dice(device, case, resampling: Resampling, logits, target, grad) -> Iterator[Evidence]:
    x, t, g = _to(device, logits, target, grad)
    z = upsample(logits.double(), *resampling)
    p = torch.softmax(z, 1)
    scale = z.abs().amax(1)
    aten = torch.softmax(upsample(x, *resampling).float(), 1)
    best = p.amax(1)
    run = partial(ARGMAX, x, *resampling, True)

    def chosen() -> torch.Tensor:
        # Where two classes are as good as equal either label is right: judged by its probability.
        label = run()[0].cpu()[:, None]
        known = (label >= 0) & (label < z.shape[1])
        return torch.where(known, p.gather(1, label.where(known, 0)), torch.nan)[:, 0].float()

    yield Evidence("upsample_argmax", f"{case}, labels", chosen, best, best.float(), scale, z.shape[1])
    yield Evidence("upsample_argmax", case, lambda: run()[1], best, aten.amax(1), scale, z.shape[1])

    options = (*resampling, IGNORED)
    reference = formulas.dice_sums_of(z, target, IGNORED)
    on_device = formulas.dice_sums_of(upsample(x, *resampling).float(), t, IGNORED)
    sums = partial(DICE_SUMS, x, t, *options)
    size = reference * (1 + scale.max())
    yield Evidence("upsample_dice_sums", case, lambda: sums()[0], reference, on_device, size, z.shape[1])

    wide_lse = torch.logsumexp(z, 1)
    lse = wide_lse.float().to(device)
    reference = formulas.dice_gradient(grad.double(), logits.double(), target, wide_lse, *options)
    on_device = formulas.dice_gradient(g, x, t, lse, *options)
    size = upsample_adjoint(p * (1 + scale)[:, None] * 4 * grad.abs().max().item(), logits.shape,
                            *resampling[1:])  # fmt: skip
    backward = partial(DICE_SUMS_BACKWARD, g, x, t, lse, *options)
    depth = _per_output(resampling.size, logits.shape[2:])
    yield Evidence("softmax_expectation", case, backward, reference, on_device, size, depth)
