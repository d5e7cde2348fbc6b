"""The losses: of classes, through the fused segmentation head, and of real values.

Each is a sum over pixels, or images, divided by a total that a batch has before it is split over ranks and
parts: so the parts' losses add up to the whole batch's, and so do their gradients.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from segfast.data import IGNORE_INDEX
from segfast.functional import upsample_cross_entropy, upsample_dice
from segfast.models._base import main_scores

from ._augment import center_crop

CLASS_LOSSES = ("cross_entropy", "dice", "both")
REGRESSION_LOSSES: dict[str, Callable[..., Tensor]] = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "huber": F.huber_loss,
}
LOSSES = (*CLASS_LOSSES, *REGRESSION_LOSSES)
# Of an auxiliary head's loss, as in torchvision's training reference.
AUX_WEIGHT = 0.5

Output = Tensor | Mapping[str, Tensor]
# From the sum of what a batch's parts are weighted by to that of the whole batch, which others may have too.
Total = Callable[[Tensor], Tensor]


def heads(output: Output) -> Iterator[tuple[Tensor, float]]:
    """The scores that a network returned, and what the loss of each counts: half that of "aux"."""
    if isinstance(output, Tensor):
        yield output, 1.0
        return
    yield output["out"], 1.0
    if "aux" in output:
        yield output["aux"], AUX_WEIGHT


def class_loss(
    output: Output,
    targets: Tensor,
    loss: str = "cross_entropy",
    weight: Tensor | None = None,
    *,
    coarse: bool = False,
    whole: Tensor | None = None,
    total: Total = lambda weight: weight,
) -> Tensor:
    """A loss of class scores, of either form that a `SegmentationModel` returns.

    "cross_entropy" is the mean over the pixels, each counting as much as its class; "dice" the mean over the
    images of `segfast.functional.upsample_dice` of each, in which the classes count alike; "both" their sum.
    To the loss of "out" half that of "aux" is added, if there is one.

    Args:
        output: scores `[N, K, H', W']`, or a dictionary of such.
        targets: class indices `[N, H, W]`; 255 counts nowhere. Center-cropped to smaller scores.
        loss: see above.
        weight: `[K]`, of the classes in the cross-entropy.
        coarse: the scores are to be upsampled to the targets' size, on the way into the loss.
        whole: the targets of the batch of which `targets` are a part; the part's share of the loss is
            returned then.
        total: from the weight of `whole`, a number in a tensor `[]`, to that of all ranks' batches.

    Raises:
        ValueError: another loss.
    """
    if loss not in CLASS_LOSSES:
        raise ValueError(f"loss must be one of {CLASS_LOSSES}, got {loss!r}")
    whole = targets if whole is None else whole
    result = targets.new_zeros((), dtype=torch.float32)
    for scores, factor in heads(output):
        size = whole.shape[-2:] if coarse else scores.shape[-2:]
        labels, all_labels = center_crop(targets, size), center_crop(whole, size)
        if loss != "dice":
            counted = total(_weight_of(all_labels, weight))
            result = result + factor * _cross_entropy_sum(scores, labels, weight) / counted
        if loss != "cross_entropy":
            images = total(all_labels.new_full((), len(all_labels), dtype=torch.float32))
            result = result + factor * _dice_sum(scores, labels) / images
    return result


def regression_loss(
    output: Output,
    targets: Tensor,
    loss: str = "l2",
    *,
    whole: Tensor | None = None,
    total: Total = lambda weight: weight,
) -> Tensor:
    """The mean error of real values: absolute ("l1"), squared ("l2"), or squared below 1 only ("huber").

    Args:
        output: `[N, K, H', W']`, or a dictionary with that under "out".
        targets: floating point, `[N, K, H, W]`, or `[N, H, W]` for K = 1; center-cropped to smaller outputs.
            What is NaN is not known and left out.
        loss: see above.
        whole, total: as for `class_loss`; the weight is the number of known values.

    Raises:
        ValueError: another loss; targets of another dtype or shape.
    """
    if loss not in REGRESSION_LOSSES:
        raise ValueError(f"loss must be one of {tuple(REGRESSION_LOSSES)}, got {loss!r}")
    values = main_scores(output)
    cropped = center_crop(targets, values.shape[-2:])
    cropped = cropped[:, None] if cropped.dim() == 3 else cropped
    if cropped.shape != values.shape or not targets.is_floating_point():
        raise ValueError(
            f"targets must be real values for an output of shape {list(values.shape)}, "
            f"got {targets.dtype} {list(targets.shape)}"
        )
    known = ~cropped.isnan()
    everything = center_crop(targets if whole is None else whole, values.shape[-2:])
    counted = total((~everything.isnan()).sum().to(torch.float32)).clamp_min(1)
    return REGRESSION_LOSSES[loss](values[known], cropped[known], reduction="sum") / counted


def _weight_of(labels: Tensor, weight: Tensor | None) -> Tensor:
    """The sum of the weights of all pixels that are scored; never 0."""
    scored = labels != IGNORE_INDEX
    if weight is None:
        return scored.sum(dtype=torch.float32).clamp_min(1)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight[labels[scored]].sum(dtype=dtype).clamp_min(torch.finfo(dtype).tiny)


def _cross_entropy_sum(scores: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    same = scores.shape[-2:] == labels.shape[-2:]
    function = F.cross_entropy if same else upsample_cross_entropy
    return function(scores, labels, weight=weight, ignore_index=IGNORE_INDEX, reduction="sum")


def _dice_sum(scores: Tensor, labels: Tensor) -> Tensor:
    """The sum over the images."""
    pairs = zip(scores.split(1), labels.split(1), strict=True)
    return torch.stack([upsample_dice(*pair, ignore_index=IGNORE_INDEX) for pair in pairs]).sum()
