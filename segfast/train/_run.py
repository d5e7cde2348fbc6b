"""A training that survives: its steps, records, scores and checkpoints, until it is done or told to stop."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from segfast._errors import UserError
from segfast.data import Sample
from segfast.models import SegmentationModel

from ._batches import Batch
from ._loop import Trainer, confusions, predicted_values
from ._losses import CLASS_LOSSES
from ._metrics import RegressionScores, Scores, regression_scores, scores
from ._predict import channels_last
from ._progress import progress
from ._record import Record
from ._state import write_state


class Interruption:
    """Inside, Ctrl-C and SIGTERM are noted and do nothing else; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


class Course(NamedTuple):
    """When a training is scored and saved, where to, and who is told of images that are skipped."""

    checkpoint: Path
    settings: Mapping[str, str]
    checkpoint_every: int
    evaluate_every: int
    epoch_steps: float
    skipped: Callable[[str], None]


def run_steps(
    trainer: Trainer,
    batches: Iterator[Batch],
    course: Course,
    record: Record | None,
    evaluate: Callable[[], Mapping[str, float]],
) -> int:
    """Take the steps that are left; `record` is the first rank's, `evaluate` is called on every rank.

    Returns:
        0 when all are taken, else the number of the signal that stopped them; a checkpoint was written.

    Raises:
        UserError: a bad image, a loss that is not finite, a file that cannot be written.
    """
    steps, ranks = trainer.options.steps, trainer.ranks
    with (
        Interruption() as interruption,
        progress(steps, shown=ranks.rank == 0, done=trainer.step) as on_step,
    ):
        while trainer.step < steps:
            loss = _step(trainer, next(batches), course.skipped)
            last = trainer.step == steps
            row = {
                "step": trainer.step,
                "epoch": 1 + int((trainer.step - 1) / course.epoch_steps),
                "learning_rate": trainer.optimizer.param_groups[0]["lr"],
                "loss": loss,
            }
            if last or trainer.step % course.evaluate_every == 0:
                row |= evaluate()
            on_step(trainer.step - 1, loss)
            stop = ranks.largest(interruption.number)  # all stop after the same step
            state = None
            if stop or last or trainer.step % course.checkpoint_every == 0:
                state = trainer.state_dict()
            ranks.together(lambda: _write(record, row, state, course))  # noqa: B023 (called at once)
            if stop:
                return stop
    return 0


def _step(trainer: Trainer, batch: Batch, skipped: Callable[[str], None]) -> float:
    for line in batch.skipped:
        skipped(line)
    trainer.ranks.together(lambda: _raise(batch.error))
    assert batch.tensors is not None
    try:
        return trainer.train_step(*batch.tensors)
    except FloatingPointError as error:  # on all ranks alike
        found = str(error)
    return trainer.ranks.together(lambda: _raise(UserError(found)))


def _raise(error: UserError | None) -> Any:
    if error is not None:
        raise error


def _write(
    record: Record | None, row: Mapping[str, float], state: Mapping[str, Any] | None, course: Course
) -> None:
    if record is None:
        return
    record.add(row)
    if state is not None:
        write_state(course.checkpoint, course.settings, state)


def trained(trainer: Trainer, build: Callable[[], SegmentationModel]) -> SegmentationModel:
    """A new model for inference, with the weights so far (see `Trainer.weights`); on every rank."""
    model = build()
    model.load_state_dict(trainer.weights())
    return channels_last(model.to(trainer.device)).eval()


def scored(
    trainer: Trainer,
    build: Callable[[], SegmentationModel],
    samples: Sequence[Sample],
    skipped: Callable[[str], None] | None,
) -> Scores | RegressionScores:
    """The scores of all ranks together, each of which looks at its share of the samples (see `readable`).

    Raises:
        UserError: a sample cannot be read, or none can.
    """
    ranks, network = trainer.ranks, trained(trainer, build)
    share = readable(samples, range(ranks.rank, len(samples), ranks.world), skipped)
    if trainer.options.loss in CLASS_LOSSES:
        found = ranks.together(lambda: confusions(network, share, network.num_classes))
        whole, boundary = torch.stack(ranks.gather(found)).sum(0)
        ranks.together(lambda: _check_some(whole.any()))
        return scores(whole, boundary)
    parts = ranks.gather(ranks.together(lambda: predicted_values(network, share)))
    predictions, targets = (torch.cat(values) for values in zip(*parts, strict=True))
    ranks.together(lambda: _check_some(targets.numel()))
    return regression_scores(predictions, targets)


def _check_some(found: Any) -> None:
    if not found:
        raise UserError("no pixel of the held-out images is left to score")


def readable(
    samples: Sequence[Sample], indices: Iterable[int], skipped: Callable[[str], None] | None
) -> Iterator[Sample]:
    """Those of the samples; without those that cannot be read if `skipped` is there to be told.

    Raises:
        UserError: one cannot be read, and `skipped` is None.
    """
    for index in indices:
        try:
            yield samples[index]
        except UserError as error:
            if skipped is None:
                raise
            skipped(str(error))


def row_of(result: Scores | RegressionScores) -> dict[str, float]:
    """The scores by the names of their columns in `metrics.csv`."""
    if isinstance(result, RegressionScores):
        return result._asdict()
    row = {
        "miou": result.miou,
        "pixel_accuracy": result.pixel_accuracy,
        "boundary_accuracy": result.boundary_accuracy,
    }
    return row | {f"iou_{k}": value for k, value in enumerate(result.iou.tolist())}
