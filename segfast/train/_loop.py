"""The reference training loop: a loss of every pixel, AdamW or SGD with momentum, a cosine schedule."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.data import IGNORE_INDEX, Sample
from segfast.models._base import main_scores

from ._augment import center_crop
from ._metrics import RegressionScores, Scores, confusion_matrix, regression_scores, scores
from ._predict import predict, predict_scores

OPTIMIZERS = ("adamw", "sgd")
REGRESSION_LOSSES: dict[str, Callable[..., Tensor]] = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "huber": F.huber_loss,
}
LOSSES = ("cross_entropy", *REGRESSION_LOSSES)
# Of an auxiliary head's loss, as in torchvision's training reference.
AUX_WEIGHT = 0.5


class Options(NamedTuple):
    """How `fit` trains.

    `lr` rises linearly over the first `warmup` share of the steps and falls to 0 along a cosine (Loshchilov
    and Hutter, ICLR 2017). `momentum` is SGD's only; AdamW's `weight_decay` is decoupled (ICLR 2019). `loss`
    is "cross_entropy", of classes, or "l1", "l2" or "huber", of real values (see `regression_loss`).
    """

    steps: int = 350
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.05
    class_weights: tuple[float, ...] | None = None
    loss: str = "cross_entropy"


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The optimizer of `options`.

    Raises:
        ValueError: `options.optimizer` is not one of "adamw", "sgd".
    """
    if options.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), options.lr, weight_decay=options.weight_decay)
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), options.lr, momentum=options.momentum, weight_decay=options.weight_decay
        )
    raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {options.optimizer!r}")


def learning_rate(step: int, options: Options) -> float:
    """The learning rate of step `step`, counted from 0.

    >>> options = Options(steps=100, lr=1.0, warmup=0.1)
    >>> learning_rate(0, options), learning_rate(9, options), round(learning_rate(99, options), 3)
    (0.1, 1.0, 0.0)
    """
    warmup = max(1, round(options.warmup * options.steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step + 1 - warmup) / max(1, options.steps - warmup)
    return options.lr * (1 + math.cos(math.pi * progress)) / 2


def cross_entropy(
    output: Tensor | Mapping[str, Tensor], targets: Tensor, weight: Tensor | None = None
) -> Tensor:
    """The mean cross-entropy of class scores, of either form that a `SegmentationModel` returns.

    To the loss of "out" half that of "aux" is added, if there is one. Targets are center-cropped to smaller
    scores.
    """
    if not isinstance(output, Tensor):
        loss = cross_entropy(output["out"], targets, weight)
        return loss + AUX_WEIGHT * cross_entropy(output["aux"], targets, weight) if "aux" in output else loss
    return F.cross_entropy(
        output, center_crop(targets, output.shape[-2:]), weight=weight, ignore_index=IGNORE_INDEX
    )


def regression_loss(output: Tensor | Mapping[str, Tensor], targets: Tensor, loss: str = "l2") -> Tensor:
    """The mean error of real values: absolute ("l1"), squared ("l2"), or squared below 1 only ("huber").

    Args:
        output: `[N, K, H', W']`, or a dictionary with that under "out".
        targets: floating point, `[N, K, H, W]`, or `[N, H, W]` for K = 1; center-cropped to smaller outputs.
            What is NaN is not known and left out.
        loss: see above.

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
    return REGRESSION_LOSSES[loss](values[known], cropped[known])


def fit(
    model: nn.Module,
    sampler: Callable[[], tuple[Tensor, Tensor]],
    options: Options | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place; it is left in training mode.

    Works as it stands on a model wrapped in `DistributedDataParallel`: give each rank's sampler its own seed.

    Args:
        model: `[N, C, H, W]` -> `[N, K, H', W']`, or a dictionary of such (see `cross_entropy`).
        sampler: returns a batch, float32 `[N, C, H, W]` and int64 `[N, H, W]` or, for real values, what
            `regression_loss` takes, on any device.
        options: see `Options`.
        on_step: called after every step with its number, counted from 0, and its loss.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: an unknown loss, optimizer, or class weights for real values.
    """
    options = options or Options()
    if options.loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {options.loss!r}")
    regresses = options.loss != "cross_entropy"
    if regresses and options.class_weights is not None:
        raise ValueError(f"class_weights are for cross_entropy, got loss={options.loss!r}")
    like = next(model.parameters())
    device = like.device
    weight = None if options.class_weights is None else like.new_tensor(options.class_weights)
    optimizer = make_optimizer(model, options)
    model.train()
    losses = []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        images, targets = (tensor.to(device, non_blocking=True) for tensor in sampler())
        output = model(images)
        if regresses:
            loss = regression_loss(output, targets, options.loss)
        else:
            loss = cross_entropy(output, targets, weight)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss is {losses[-1]} at step {step + 1}; a smaller learning rate may help"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


def evaluate(model: nn.Module, samples: Iterable[Sample], num_classes: int) -> Scores:
    """IoU per class and their mean over all pixels of `samples`, each predicted whole (see `predict`)."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device="cpu")
    for image, target in samples:
        confusion += confusion_matrix(predict(model, image), target, num_classes)
    return scores(confusion)


def evaluate_regression(model: nn.Module, samples: Iterable[Sample]) -> RegressionScores:
    """RMSE and R2 over all pixels of `samples`, each predicted whole (see `predict_scores`).

    Their targets are floating point, `[K, H, W]`, or `[H, W]` for K = 1; NaN is left out.
    """
    pairs = [(predict_scores(model, image).flatten(), target.flatten().cpu()) for image, target in samples]
    predictions, targets = zip(*pairs, strict=True)
    return regression_scores(torch.cat(predictions), torch.cat(targets))
