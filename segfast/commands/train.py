"""`segfast train`: a network on the nuclei that are shipped, or on a folder of images and masks."""

import argparse
import ast
import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from segfast._errors import UserError
from segfast._table import format_table
from segfast.commands._load_model import parse_device
from segfast.commands._output import claim
from segfast.data import ClassList
from segfast.models import SegmentationModel, UNet, create, model_name

from ..train._augment import PatchSampler
from ..train._batches import Skipped, batches
from ..train._checkpoint import save_checkpoint
from ..train._figures import curves_figure, predictions_figure, save_figure
from ..train._loop import Trainer
from ..train._metrics import BOUNDARY, RegressionScores, Scores
from ..train._optimizers import Options, make_average
from ..train._parallel import Ranks, joined, parallel, sync_batch_norm, units
from ..train._predict import channels_last, predict, predict_scores
from ..train._record import Record
from ..train._run import Course, readable, row_of, run_steps, scored, trained
from ..train._state import read_state, remove_leftovers
from . import _train_data
from ._train_data import TrainingData
from ._train_options import (
    UNET_OPTIONS,
    add_model,
    add_survival,
    add_training,
    augmentations,
    training_options,
    with_class_weights,
)

DEFAULT_OUTPUT = "out/unet.safetensors"
# Of the command's own options those that a training that goes on must have as before.
SETTINGS = (
    *("batch", "size", "augment", "seed", "channels", "foreground", "ignore"),
    *("holdout", "holdout_images"),
)
# Of the samples held out, those that are drawn.
DRAWN = 4
# Classes for whom the confusion matrix is printed.
MOST_COLUMNS = 10


class Outputs(NamedTuple):
    """Where everything goes, beside the network."""

    network: Path
    checkpoint: Path
    metrics: Path
    curves: Path
    predictions: Path
    board: Path


ENDINGS = (".safetensors", ".checkpoint", ".metrics.csv", ".png", ".predictions.png", ".tensorboard")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast train`."""
    parser.add_argument(
        "model", nargs="?", default="unet", metavar="MODEL", help="one of segfast.models.list_models() (unet)"
    )
    _train_data.add_arguments(parser)
    add_model(parser)
    add_training(parser)
    add_survival(parser)
    parser.add_argument("--output", metavar="FILE", help="(out/MODEL.safetensors)")
    parser.add_argument("--force", action="store_true", help="replace files that segfast did not write")


def run(args: argparse.Namespace) -> int:
    """Train, score what is held out, write network, metrics and pictures; under torchrun, on all ranks."""
    device = parse_device(args.device)
    with joined(device) as (ranks, device), _own_random_numbers(device):
        outputs, options = ranks.together(lambda: _checked(args, ranks))
        skipped = Skipped()
        data = _train_data.training_data(args, ranks, skipped)
        if ranks.rank == 0:
            print(data.table)
        options = ranks.together(lambda: with_class_weights(options, args.class_weights, data))
        model = ranks.together(lambda: channels_last(_model(args, data, ranks).to(device)))
        settings = _settings(args, model, options, data)
        trainer = _trainer(args, model, options, ranks)
        if args.resume and outputs.checkpoint.exists():
            state = ranks.together(lambda: read_state(outputs.checkpoint, settings))
            trainer.load_state_dict(state)
        build = functools.partial(create, args.model, **model.config)
        course = Course(
            outputs.checkpoint,
            settings,
            args.checkpoint_every,
            args.evaluate_every or max(1, options.steps // 10),
            len(data.train) / args.batch,
            skipped,
        )
        return _train(args, trainer, build, data, outputs, course)


@contextlib.contextmanager
def _own_random_numbers(device: torch.device):
    """The caller's generators are afterwards as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _train(
    args: argparse.Namespace,
    trainer: Trainer,
    build: Callable[[], SegmentationModel],
    data: TrainingData,
    outputs: Outputs,
    course: Course,
) -> int:
    ranks, options = trainer.ranks, trainer.options
    share = range(trainer.step, options.steps)
    sampler = PatchSampler(data.train, args.size, args.batch, args.seed, augmentations(args.augment))
    pins = trainer.device.type == "cuda"
    read = batches(sampler, ranks, share, args.skip_bad, args.workers, pins)
    skipped = course.skipped if args.skip_bad else None
    results: list[Scores | RegressionScores] = []

    def evaluate() -> Mapping[str, float]:
        results[:] = [scored(trainer, build, data.test, skipped)]
        return row_of(results[0])

    start = trainer.step
    record = ranks.together(lambda: _record(outputs, data, start) if ranks.rank == 0 else None)
    try:
        stop = run_steps(trainer, read, course, record, evaluate)
    finally:
        if record is not None:
            record.close()
    if stop:
        if ranks.rank == 0:
            print(
                f"segfast: stopped after step {trainer.step} of {options.steps}; with --resume it goes on",
                file=sys.stderr,
            )
        return 128 + stop
    if not results:  # all steps had been taken before
        evaluate()
    network = trained(trainer, build)
    ranks.together(lambda: _finish(args.loss, network, data, outputs, record, results[0], skipped))
    return 0


def _checked(args: argparse.Namespace, ranks: Ranks) -> tuple[Outputs, Options]:
    """The outputs, which may be written, and the options, before any work is done for them."""
    args.model = args.model.removeprefix("segfast:")
    options = training_options(args, ranks)
    output = Path(args.output or DEFAULT_OUTPUT.replace("unet", args.model))
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: expected a name ending in .safetensors")
    outputs = Outputs(*map(output.with_suffix, ENDINGS))
    if ranks.rank == 0:
        for path in outputs[:-1]:
            claim(path, force=args.force)
        if outputs.board.exists() and not outputs.board.is_dir():
            raise UserError(f"{outputs.board}: is not a folder")
        for path in outputs[:-1]:
            remove_leftovers(path)
    return outputs, options


def _model(args: argparse.Namespace, data: TrainingData, ranks: Ranks) -> SegmentationModel:
    """The network, with weights that depend on --seed alone."""
    options: dict[str, Any] = {}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise UserError(f"--option must be NAME=VALUE, as in width_mult=0.5; got {text!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value  # a word
    own = {name: getattr(args, name) for name in UNET_OPTIONS}
    if args.model == "unet":
        own["norm"] = None if args.norm == "none" else args.norm
        own["padded"] = not own.pop("unpadded")
        options = own | options
    elif strange := [name for name, value in own.items() if value != UNET_OPTIONS[name]]:
        raise UserError(f"--{strange[0].replace('_', '-')} is for unet; of {args.model} use --option")
    torch.manual_seed(args.seed)
    try:
        model = create(args.model, **{"in_channels": args.channels, "num_classes": data.planes, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"MODEL {args.model}: {error}") from error
    if (model.in_channels, model.num_classes) != (args.channels, data.planes):
        raise UserError(
            f"MODEL {args.model} is for {model.in_channels} channels and {model.num_classes} classes, "
            f"the data has {args.channels} and {data.planes}"
        )
    _check_step(model, args)
    return model


def _check_step(model: SegmentationModel, args: argparse.Namespace) -> None:
    """Raise UserError if the model cannot be trained on patches of this size, so many a step."""
    batch = args.batch // args.accumulate
    if isinstance(model, UNet):
        try:
            model.check_size(args.size, args.size)
        except ValueError as error:
            raise UserError(f"--size {args.size}: {error}") from error
        if args.norm == "batch" and batch * model.bottleneck_pixels(args.size, args.size) == 1:
            raise UserError(
                f"--batch {args.batch} --size {args.size}: at --depth {args.depth} the deepest map of a step "
                "is one pixel, of which batch norm has no statistics; give a larger batch or size, or "
                "--norm none"
            )
        return
    try:
        _pass_on_meta(model, batch, args.size)
    except ValueError as error:
        raise UserError(f"--batch {args.batch} --size {args.size}: {error}") from error


def _pass_on_meta(model: SegmentationModel, batch: int, size: int) -> set[str]:
    """Run a twin of the model that has no values; the names of its modules that were called."""
    called: set[str] = set()
    with torch.device("meta"):
        twin = create(model_name(model), **model.config)
        for name, module in twin.named_modules():
            module.register_forward_hook(lambda *_, name=name: called.add(name))
        twin(torch.empty(batch, model.in_channels, size, size))
    return called


def _trainer(args: argparse.Namespace, model: SegmentationModel, options: Options, ranks: Ranks) -> Trainer:
    """The trainer of a model that is on its device, with the ranks' wrapping if there are several."""
    try:
        if ranks.world == 1:
            return Trainer(model, options, seed=args.seed)
        sharded = None
        if args.fsdp:
            sharded = units(model, _pass_on_meta(model, 2, args.size))
        sync_batch_norm(model, ranks.device)
        average = make_average(model, options)
        wrapped = parallel(model, average and average.module, ranks.device, sharded)
        return Trainer(model, options, ranks, wrapped, average, args.seed)
    except ValueError as error:
        raise UserError(str(error)) from error


def _settings(
    args: argparse.Namespace, model: SegmentationModel, options: Options, data: TrainingData
) -> dict[str, str]:
    """All that a training that goes on has in common with the one that was stopped, the model first."""
    named = {"MODEL": args.model, "the model's options": json.dumps(model.config, default=str)}
    own = options._asdict() | {name: getattr(args, name) for name in SETTINGS}
    named |= {f"--{name.replace('_', '-')}": str(value) for name, value in own.items()}
    return named | {"--data": data.digest}


def _record(outputs: Outputs, data: TrainingData, step: int) -> Record:
    columns = ["rmse", "r2"]
    if data.classes is not None:
        ious = [f"iou_{k}" for k in range(data.planes)]
        columns = ["miou", "pixel_accuracy", "boundary_accuracy", *ious]
    return Record(outputs.metrics, columns, step, outputs.board)


def _finish(
    loss: str,
    network: SegmentationModel,
    data: TrainingData,
    outputs: Outputs,
    record: Record | None,
    result: Scores | RegressionScores,
    skipped: Callable[[str], None] | None,
) -> None:
    """The first rank's: write network and pictures, print the scores."""
    if record is None:
        return
    save_checkpoint(network, outputs.network)
    name = outputs.network.stem
    names: tuple[str, ...] = ()
    if isinstance(result, RegressionScores) or data.classes is None:
        title, confusion, colors = f"{name}: held-out RMSE {row_of(result)['rmse']:.4g}", None, None
    else:
        title, confusion = f"{name}: held-out mIoU {result.miou:.3f}", result.confusion
        names, colors = data.classes.names, data.classes.colors
    save_figure(curves_figure(record.rows, loss, title, confusion, names), outputs.curves)
    shown = list(readable(data.test, range(min(DRAWN, len(data.test))), skipped))
    run = predict if colors is not None else predict_scores
    if shown:
        found = [run(network, sample.image) for sample in shown]
        save_figure(predictions_figure(shown, found, colors), outputs.predictions)
    print(scores_table(result, data.classes))
    print("wrote " + ", ".join(map(str, outputs[:-1])))


def scores_table(result: Scores | RegressionScores, classes: ClassList | None = None) -> str:
    """How good the network is on what it was never trained on."""
    if isinstance(result, RegressionScores):
        rows = [["RMSE", f"{result.rmse:.4g}"], ["R2", f"{result.r2:.4f}"]]
        return format_table(["held out", "value"], rows)
    names = [f"class {k}" for k in range(len(result.iou))]
    if classes is not None:
        names = [
            name if name == own else f"{name} {own}" for name, own in zip(names, classes.names, strict=True)
        ]
    ious = result.iou.tolist()
    absent = [k for k, value in enumerate(ious) if math.isnan(value)]
    few = len(names) <= MOST_COLUMNS
    rows = [
        [name, "absent" if k in absent else f"{ious[k]:.4f}", *(result.confusion[k].tolist() if few else [])]
        for k, name in enumerate(names)
    ]
    near = "none" if math.isnan(result.boundary_accuracy) else f"{result.boundary_accuracy:.4f}"
    blank = [""] * (len(names) if few else 0)
    rows += [
        ["mean", f"{result.miou:.4f}", *blank],
        ["pixel accuracy", f"{result.pixel_accuracy:.4f}", *blank],
        [f"accuracy within {BOUNDARY} pixels of a boundary", near, *blank],
    ]
    headers = ["held-out region", "IoU", *(f"predicted {k}" for k in range(len(names)) if few)]
    table = format_table(headers, rows)
    if not absent:
        return table
    missing = f"class{'es' * (len(absent) > 1)} {', '.join(map(str, absent))}"
    return (
        f"{table}\nThe mean leaves out {missing}: neither in the held-out region's masks nor predicted there."
    )
