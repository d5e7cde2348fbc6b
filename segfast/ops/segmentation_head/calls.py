"""How calls of losses and labels at a higher resolution are run to be measured on a GPU."""

from functools import partial

from torch import Tensor

from .._gpu_call import GPU_OPERATIONS, Bound, Draw, GpuCall, GpuOperation
from .functional import OPERATIONS, upsample_argmax, upsample_cross_entropy, upsample_dice

_SPREAD = 3.0  # of logits: probabilities near 0 and 1 among them


def _labeled(call: GpuCall, draw: Draw) -> tuple[Tensor, Tensor, int]:
    """Logits, labels at full size, and how many terms a sum over them may have."""
    logits, (batch, _, height, width) = call.images
    return draw(*logits, scale=_SPREAD), draw.labels(logits[1], batch, height, width), batch * height * width


def _cross_entropy(call: GpuCall, draw: Draw) -> Bound:
    mode, align_corners, weighted, smoothed, reduction = call.options
    logits, target, pixels = _labeled(call, draw)
    # No gradient is asked for the classes' weights: they are not among the tensors.
    weight = (draw(logits.shape[1]).float().abs() + 0.5) if weighted else None

    def function(logits: Tensor, target: Tensor) -> Tensor:
        return upsample_cross_entropy(
            logits,
            target,
            mode=mode,
            align_corners=align_corners,
            weight=weight,
            label_smoothing=0.1 if smoothed else 0.0,
            reduction=reduction,
        )

    return Bound((logits, target), function, pixels)


def _dice(call: GpuCall, draw: Draw) -> Bound:
    mode, align_corners = call.options
    logits, target, pixels = _labeled(call, draw)
    return Bound((logits, target), partial(upsample_dice, mode=mode, align_corners=align_corners), pixels)


def _argmax(call: GpuCall, draw: Draw) -> Bound:
    mode, align_corners, confidence = call.options
    logits, (_, _, height, width) = call.images
    options = {"mode": mode, "align_corners": align_corners, "return_confidence": confidence}
    function = partial(upsample_argmax, size=(height, width), **options)
    return Bound((draw(*logits, scale=_SPREAD),), function, logits[1])


def _dice_proofs(gradients: bool) -> tuple[str, ...]:
    return (OPERATIONS[0], OPERATIONS[3], *((OPERATIONS[4], OPERATIONS[1]) if gradients else ()))


_FAMILY = "segmentation_head"
GPU_OPERATIONS["upsample_cross_entropy"] = GpuOperation(
    _FAMILY, lambda gradients: OPERATIONS[: 2 if gradients else 1], _cross_entropy
)
GPU_OPERATIONS["upsample_argmax"] = GpuOperation(_FAMILY, lambda gradients: OPERATIONS[2:3], _argmax)
GPU_OPERATIONS["upsample_dice"] = GpuOperation(_FAMILY, _dice_proofs, _dice)
