"""How a network is trained: the options, the optimizer and the learning rate of every step."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "poly")
PRECISIONS = ("float32", "bfloat16", "float16")
# Of the poly schedule: Chen et al., "DeepLab" (PAMI 2018), section 4.1.
POWER = 0.9


class Options(NamedTuple):
    """How `fit` trains.

    `lr` rises linearly over the first `warmup` share of the steps; then it falls to 0, along a cosine
    (Loshchilov and Hutter, ICLR 2017) or, with `schedule="poly"`, as (1 - progress)**0.9 (DeepLab).
    `momentum` is SGD's only; AdamW's `weight_decay` is decoupled (ICLR 2019).

    `loss` is "cross_entropy", "dice" or "both", their sum, of classes (see `class_loss`), or "l1", "l2" or
    "huber", of real values (see `regression_loss`).

    Each step's batch goes through the network in `accumulate` parts of equal size, whose gradients are those
    of the whole batch (batch norm's statistics are of a part). `precision` "bfloat16" or "float16" computes
    under autocast. `ema` above 0 is the decay of an exponential moving average of the weights.
    """

    steps: int = 350
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.05
    class_weights: tuple[float, ...] | None = None
    loss: str = "cross_entropy"
    schedule: str = "cosine"
    accumulate: int = 1
    precision: str = "float32"
    ema: float = 0.0


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


def make_average(model: nn.Module, options: Options) -> AveragedModel | None:
    """A copy of the model that becomes the moving average of its weights; None if `options.ema` is 0."""
    if not options.ema:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))


def learning_rate(step: int, options: Options) -> float:
    """The learning rate of step `step`, counted from 0.

    Raises:
        ValueError: `options.schedule` is not one of "cosine", "poly".

    >>> options = Options(steps=100, lr=1.0, warmup=0.1)
    >>> learning_rate(0, options), learning_rate(9, options), round(learning_rate(99, options), 3)
    (0.1, 1.0, 0.0)
    >>> round(learning_rate(50, Options(steps=100, lr=1.0, warmup=0, schedule="poly")), 3)
    0.536
    """
    if options.schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {options.schedule!r}")
    if options.schedule == "poly":
        warmup = round(options.warmup * options.steps)
        progress = (step - warmup) / max(1, options.steps - warmup)
        falling = (1 - max(0.0, progress)) ** POWER
    else:
        warmup = max(1, round(options.warmup * options.steps))
        progress = (step + 1 - warmup) / max(1, options.steps - warmup)
        falling = (1 + math.cos(math.pi * progress)) / 2
    return options.lr * ((step + 1) / warmup if step < warmup else falling)
