"""The reference training loop, and the state of a training run: all that changes from step to step."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from segfast.data import Sample

from ._augment import seed_of
from ._losses import CLASS_LOSSES, LOSSES, class_loss, regression_loss
from ._metrics import (
    RegressionScores,
    Scores,
    confusion_matrix,
    near_boundary,
    regression_scores,
    scores,
)
from ._optimizers import PRECISIONS, Options, learning_rate, make_average, make_optimizer
from ._parallel import Ranks
from ._predict import predict, predict_scores


class Trainer:
    """A model in training, with its optimizer, its average and the number of steps taken.

    Args:
        model: in training mode from now on; with parameters that are whole, or sharded by `fully_shard`.
        options: see `Options`.
        ranks: those that train together, each with its share of every batch.
        wrapped: what calls the model, such as `DistributedDataParallel`; the model itself if None.
        average: what `make_average` made of the model, if its weights are sharded like those of the model.
        seed: of what layers draw (dropout) in a step on a rank; None leaves torch's generators alone.

    Raises:
        ValueError: an unknown loss, optimizer, schedule or precision, class weights for real values.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        ranks: Ranks | None = None,
        wrapped: nn.Module | None = None,
        average: AveragedModel | None = None,
        seed: int | None = None,
    ) -> None:
        for name, known in (("loss", LOSSES), ("precision", PRECISIONS)):
            if getattr(options, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(options, name)!r}")
        if options.loss not in CLASS_LOSSES and options.class_weights is not None:
            raise ValueError(f"class_weights are for cross_entropy, got loss={options.loss!r}")
        self.model, self.options, self.seed = model, options, seed
        self.ranks = ranks or Ranks()
        self.wrapped = wrapped or model
        self.step = 0
        like = next(model.parameters())
        self.device = like.device
        self.weight = None
        if options.class_weights is not None:
            self.weight = torch.tensor(options.class_weights, dtype=like.dtype, device=like.device)
        self.optimizer = make_optimizer(model, options)
        self.average = average or make_average(model, options)
        halves = options.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=halves)
        # Scores that the loss upsamples never exist in the image's size.
        takes = inspect.signature(model.forward).parameters
        self.coarse = (
            options.loss in CLASS_LOSSES and "upsample" in takes and getattr(model, "crf", None) is None
        )

    def train_step(self, images: Tensor, targets: Tensor) -> float:
        """Take a step; the loss of the whole batch, that of all ranks.

        Args:
            images: this rank's, float32 `[N, C, H, W]`, on any device.
            targets: int64 `[N, H, W]` or, for real values, what `regression_loss` takes.

        Raises:
            FloatingPointError: the loss is not finite; the step is not taken.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.options)
        if self.seed is not None:
            torch.manual_seed(seed_of(self.seed, 2, self.step, self.ranks.rank))
        images, targets = (tensor.to(self.device, non_blocking=True) for tensor in (images, targets))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.options.accumulate
        shares = []
        for index, pair in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True)):
            with self._gradients_shared(index == parts - 1):
                loss = self._loss(*pair, targets)
                # The ranks' gradients are averaged, and are to be added up.
                self.scaler.scale(loss * self.ranks.world).backward()
            shares.append(loss.detach())
        found = self.ranks.sum(torch.stack(shares).sum()).item()
        if not math.isfinite(found):
            raise FloatingPointError(
                f"the loss is {found} at step {self.step + 1}; a smaller learning rate may help"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        return found

    def _loss(self, images: Tensor, targets: Tensor, whole: Tensor) -> Tensor:
        with self._precision():
            output = self.wrapped(images, upsample=False) if self.coarse else self.wrapped(images)
            if self.options.loss not in CLASS_LOSSES:
                return regression_loss(output, targets, self.options.loss, whole=whole, total=self.ranks.sum)
            return class_loss(
                output,
                targets,
                self.options.loss,
                self.weight,
                coarse=self.coarse,
                whole=whole,
                total=self.ranks.sum,
            )

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.options.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.options.precision))

    @contextlib.contextmanager
    def _gradients_shared(self, last: bool):
        """Inside, a backward sums gradients over the ranks only for the batch's last part."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
            return
        if hasattr(self.wrapped, "set_requires_gradient_sync"):
            self.wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def state_dict(self) -> dict[str, Any]:
        """All of it, in whole tensors on the CPU that fit any number of ranks; to be called on every rank."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        moments = {
            names[parameter]: _whole(state) for parameter, state in self.optimizer.state.items() if state
        }
        return {
            "step": self.step,
            "model": _whole(self.model.state_dict()),
            "optimizer": moments,
            "average": None if self.average is None else _whole(self.average.state_dict()),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was called, on any number of ranks.

        Raises:
            KeyError, RuntimeError, ValueError: the state is of another model or other options.
        """
        _load(self.model, state["model"])
        moments = dict(state["optimizer"])
        for name, parameter in self.model.named_parameters():
            if name in moments:
                self.optimizer.state[parameter] = {
                    key: _like(parameter, value) for key, value in moments.pop(name).items()
                }
        if moments or (self.average is None) != (state["average"] is None):
            raise ValueError(f"no place for the optimizer's {', '.join(moments) or 'average'}")
        if self.average is not None:
            _load(self.average, state["average"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def weights(self) -> dict[str, Tensor]:
        """The weights to be used, of the average if there is one, whole and on the CPU; on every rank."""
        return _whole((self.model if self.average is None else self.average.module).state_dict())


def _whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copies on the CPU, of sharded tensors in full."""
    found = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            value = value.detach().to("cpu", copy=True)
        found[name] = value
    return found


def _like(parameter: Any, value: Any) -> Any:
    """An entry of the parameter's state in the optimizer, sharded and laid out as it is; numbers stay."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value.clone() if isinstance(value, Tensor) else value
    if not hasattr(parameter, "placements"):
        return torch.empty_like(parameter, requires_grad=False).copy_(value)
    from torch.distributed.tensor import distribute_tensor  # not with torch; it takes its time

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As `load_state_dict`, of whole tensors into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({k: _like(own[k], v) if k in own else v for k, v in state.items()})


def fit(
    model: nn.Module,
    sampler: Callable[[], tuple[Tensor, Tensor]],
    options: Options | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place; it is left in training mode, with its own weights also where `ema` is on.

    Works as it stands on a model wrapped in `DistributedDataParallel`: give each rank's sampler its own seed.

    Args:
        model: `[N, C, H, W]` -> `[N, K, H', W']`, or a dictionary of such (see `class_loss`).
        sampler: returns a batch, float32 `[N, C, H, W]` and int64 `[N, H, W]` or, for real values, what
            `regression_loss` takes, on any device.
        options: see `Options`.
        on_step: called after every step with its number, counted from 0, and its loss.

    Returns:
        The loss of every step.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError: an unknown loss, optimizer, schedule or precision, class weights for real values.
    """
    options = options or Options()
    trainer = Trainer(model, options)
    losses = []
    for step in range(options.steps):
        losses.append(trainer.train_step(*sampler()))
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


def evaluate(model: nn.Module, samples: Iterable[Sample], num_classes: int) -> Scores:
    """The scores over all pixels of `samples`, each predicted whole (see `predict`)."""
    return scores(*confusions(model, samples, num_classes))


def confusions(model: nn.Module, samples: Iterable[Sample], num_classes: int) -> Tensor:
    """int64 `[2, K, K]`: the confusion matrix of all pixels, and that of those near a boundary."""
    found = torch.zeros(2, num_classes, num_classes, dtype=torch.int64, device="cpu")
    for image, target in samples:
        prediction, near = predict(model, image), near_boundary(target)
        found[0] += confusion_matrix(prediction, target, num_classes)
        found[1] += confusion_matrix(prediction[near], target[near], num_classes)
    return found


def evaluate_regression(model: nn.Module, samples: Iterable[Sample]) -> RegressionScores:
    """RMSE and R2 over all pixels of `samples`, each predicted whole (see `predict_scores`).

    Their targets are floating point, `[K, H, W]`, or `[H, W]` for K = 1; NaN is left out.
    """
    return regression_scores(*predicted_values(model, samples))


def predicted_values(model: nn.Module, samples: Iterable[Sample]) -> tuple[Tensor, Tensor]:
    """The predictions at all pixels of all samples, and their targets, both `[M]`."""
    pairs = [(predict_scores(model, image).flatten(), target.flatten().cpu()) for image, target in samples]
    predictions, targets = zip(*pairs, strict=True) if pairs else ([torch.empty(0)], [torch.empty(0)])
    return torch.cat(predictions), torch.cat(targets)
