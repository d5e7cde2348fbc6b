"""The segmentation head's calls for `segfast tune`: ours, and ATen's on full-size logits."""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tune_layers import Call, Calls, Draw, Head

_IGNORED = 255
_GEOMETRY = ("bilinear", False, None)  # of the interpolation, as the launchers take it
_LOSS_SCALE = 2.0**15  # keeps fp16's gradients of a mean off its smallest numbers


def _logits(head: Head, draw: Draw) -> Tensor:
    return draw(head.batch, head.classes, head.height, head.width).contiguous()


def _labels(head: Head, draw: Draw) -> Tensor:
    return draw.integers(min(head.classes, _IGNORED), *head.output_size())


def _upsampled(head: Head, x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=head.scale, mode="bilinear")


def _loss(head: Head, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(_upsampled(head, x), target, ignore_index=_IGNORED)


def _upsample_softmax_forward(head: Head, draw: Draw) -> Calls:
    """The loss; ours by its launcher, whose partial sums are added up afterwards."""
    from .kernels.segmentation_head import upsample_softmax_forward

    x, target = _logits(head, draw), _labels(head, draw)
    lse = torch.empty(head.output_size(), device=draw.device)

    def ours() -> Call:
        partials = upsample_softmax_forward(x, target, None, None, lse, *_GEOMETRY, _IGNORED, 0.0)

        def mean() -> Tensor:
            assert partials is not None
            loss, pixels = partials.sum(0, dtype=torch.float64).float()
            return loss / pixels

        return mean

    return Calls(ours, lambda: _loss(head, x, target))


def _grad_logits(head: Head, draw: Draw) -> Calls:
    """Held to fp32: on a GPU ATen adds an interpolation's gradient up in the logits' dtype."""
    from .functional import upsample_cross_entropy

    x, target = _logits(head, draw).requires_grad_(), _labels(head, draw)
    wide = x.detach().float().requires_grad_()
    mine = upsample_cross_entropy(x, target, scale_factor=head.scale, ignore_index=_IGNORED)
    theirs = cache(partial(_loss, head, x, target))

    def gradient(loss: Tensor, leaf: Tensor, keep: bool = True) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, leaf, torch.full_like(loss, _LOSS_SCALE), retain_graph=keep)

    return Calls(
        lambda: gradient(mine, x),
        lambda: gradient(theirs(), x),
        lambda: gradient(_loss(head, wide, target), wide, keep=False),
    )


def _argmax(head: Head, draw: Draw) -> Calls:
    """Held to fp32: rounding the full-size logits makes ties of classes that are nearly as good."""
    from .functional import upsample_argmax

    x = _logits(head, draw)
    return Calls(
        partial(upsample_argmax, x, scale_factor=head.scale),
        lambda: _upsampled(head, x).argmax(1),
        lambda: _upsampled(head, x.float()).argmax(1),
    )


# A dice loss runs these beside the two above. Their rows are of what it takes beyond a cross-entropy: ATen's
# start from the probabilities of all pixels, which a cross-entropy's row has paid for.
def _probabilities(head: Head, x: Tensor) -> Tensor:
    return _upsampled(head, x.float()).softmax(1)


def _sums(p: Tensor, target: Tensor) -> Tensor:
    """[3, C]: of the label's probability, of each class's, of pixels."""
    counted = (target != _IGNORED)[:, None]
    label = torch.where(counted, target[:, None], 0)
    hit = torch.zeros_like(p).scatter_(1, label, counted.to(p.dtype))
    return torch.stack([part.sum((0, 2, 3)) for part in (p * hit, p * counted, hit)])


def _log_sum_exp(head: Head, x: Tensor) -> Tensor:
    from .kernels.segmentation_head import upsample_softmax_forward

    lse = torch.empty(head.output_size(), device=x.device)
    upsample_softmax_forward(x, None, None, None, lse, *_GEOMETRY, _IGNORED, 0.0)
    return lse


def _dice_sums(head: Head, draw: Draw) -> Calls:
    from .kernels.segmentation_head import upsample_dice_sums

    x, target = _logits(head, draw), _labels(head, draw)
    lse = _log_sum_exp(head, x)
    p = cache(partial(_probabilities, head, x))

    def ours() -> Call:
        partials = upsample_dice_sums(x, target, lse, *_GEOMETRY, _IGNORED)
        return lambda: partials.sum(0, dtype=torch.float64).float()

    return Calls(ours, lambda: _sums(p(), target))


def _softmax_expectation(head: Head, draw: Draw) -> Calls:
    """The mean, under the probabilities, of the gradient they get from the sums."""
    from .kernels.segmentation_head import softmax_expectation

    x, target = _logits(head, draw), _labels(head, draw)
    lse = _log_sum_exp(head, x)
    grad = torch.randn(3, head.classes, device=draw.device, generator=draw.generator)

    @cache
    def leaf_and_sums() -> tuple[Tensor, Tensor]:
        p = _probabilities(head, x).requires_grad_()
        return p, _sums(p, target)

    def ours() -> Tensor:
        mean = torch.empty_like(lse)
        softmax_expectation(x, target, lse, grad, mean, *_GEOMETRY)
        return mean

    def aten() -> Tensor:
        p, sums = leaf_and_sums()
        (q,) = torch.autograd.grad(sums, p, grad, retain_graph=True)
        return (p.detach() * q).sum(1)

    return Calls(ours, aten)


HEAD_OPERATIONS = {
    "upsample_softmax_forward": _upsample_softmax_forward,
    "upsample_argmax": _argmax,
    "upsample_dice_sums": _dice_sums,
    "upsample_grad_logits": _grad_logits,
    "softmax_expectation": _softmax_expectation,
}
HEADS = tuple(
    Head(batch, *sizes)
    for batch in (8, 1)
    for sizes in (
        (150, 128, 128, 4),  # ADE20K
        (19, 64, 128, 8),  # Cityscapes, 512x1024 pixels
        (19, 128, 256, 4),
        (21, 33, 33, 16),  # PASCAL VOC, output stride 16 and 8
        (21, 65, 65, 8),
    )
)
