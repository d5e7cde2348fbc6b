"""The options of `segfast train` beside those of its data: what they are, and which values they take."""

import argparse
import math

from segfast._errors import UserError
from segfast.commands._load_model import add_device, check_seed
from segfast.data import IGNORE_INDEX
from segfast.models.unet import UNET_ACTIVATIONS

from ..train._augment import AUGMENTATIONS
from ..train._losses import LOSSES
from ..train._optimizers import OPTIMIZERS, PRECISIONS, SCHEDULES, Options
from ..train._parallel import Ranks
from ._train_data import TrainingData

MAX_RATE = 1e3
DEFAULT_LR = {"adamw": 3e-3, "sgd": 0.05}
# What goes with an optimizer: the papers' with SGD.
DEFAULT_SCHEDULE = {"adamw": "cosine", "sgd": "poly"}
DEFAULT_WARMUP = {"cosine": 0.05, "poly": 0.0}
# What the command has of its own for the U-Net, and what it is by default.
UNET_OPTIONS = {
    "width": 16,
    "depth": 4,
    "unpadded": False,
    "activation": "relu",
    "negative_slope": 0.01,
    "norm": "batch",
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Those of the network."""
    model = parser.add_argument_group("model", "all but the first are for the U-Net")
    model.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of segfast.models.create(MODEL), as in width_mult=0.5; may be repeated",
    )
    model.add_argument("--width", type=int, help="channels of the first level (16)")
    model.add_argument("--depth", type=int, help="poolings (4)")
    model.add_argument("--unpadded", action="store_true", help="the paper's unpadded convolutions")
    model.add_argument("--activation", choices=UNET_ACTIVATIONS, help="(relu)")
    model.add_argument("--negative-slope", type=float, help="of leaky_relu (0.01)")
    model.add_argument("--norm", choices=("none", "batch"), help="(batch)")
    parser.set_defaults(**UNET_OPTIONS)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Those of its training."""
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=350, help="(350)")
    training.add_argument("--batch", type=int, default=4, help="patches a step, of all processes (4)")
    training.add_argument("--accumulate", type=int, default=1, help="parts that a batch is run in (1)")
    training.add_argument("--size", type=int, default=128, help="height and width of a patch, pixels (128)")
    training.add_argument(
        "--loss",
        choices=LOSSES,
        default="cross_entropy",
        help="both: cross_entropy + dice; l1, l2, huber: of real values in masks/ (cross_entropy)",
    )
    training.add_argument(
        "--class-weights",
        metavar="W,W,...",
        help="of each class in the cross-entropy; or balanced: the fewer pixels, the larger",
    )
    training.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(adamw)")
    training.add_argument("--lr", type=float, help="peak learning rate (adamw 0.003, sgd 0.05)")
    training.add_argument("--schedule", choices=SCHEDULES, help="(adamw cosine, sgd poly)")
    training.add_argument(
        "--warmup", type=float, help="share of steps in which lr rises (cosine 0.05, poly 0)"
    )
    training.add_argument("--momentum", type=float, default=0.9, help="of sgd (0.9)")
    training.add_argument("--weight-decay", type=float, default=1e-4, help="(0.0001)")
    training.add_argument("--ema", type=float, default=0.0, help="decay of an average of the weights (off)")
    training.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="others: autocast (float32)"
    )
    training.add_argument(
        "--augment",
        default="all",
        metavar="NAME,...",
        help=f"of {', '.join(AUGMENTATIONS)}, or none (all)",
    )
    training.add_argument("--seed", type=int, default=0, help="of weights and patches (0)")


def add_survival(parser: argparse.ArgumentParser) -> None:
    """Those of checkpoints and of the machine."""
    survival = parser.add_argument_group("survival")
    survival.add_argument(
        "--checkpoint-every",
        type=int,
        default=100,
        metavar="N",
        help="steps; also at Ctrl-C, SIGTERM (100)",
    )
    survival.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint beside --output, if there is one"
    )
    survival.add_argument(
        "--evaluate-every", type=int, metavar="N", help="steps between scores held out (a tenth of all)"
    )
    machine = parser.add_argument_group("machine", "several: torchrun --nproc-per-node N -m segfast train")
    machine.add_argument("--workers", type=int, default=0, help="processes that read and augment (0)")
    machine.add_argument(
        "--fsdp", action="store_true", help="shard weights and optimizer over torchrun's processes"
    )
    add_device(machine)


def training_options(args: argparse.Namespace, ranks: Ranks) -> Options:
    """The options as `Trainer` takes them, still without class weights.

    Raises:
        UserError: a value that an option does not take.
    """
    _check_numbers(args, ranks)
    augmentations(args.augment)
    schedule = args.schedule or DEFAULT_SCHEDULE[args.optimizer]
    return Options(
        steps=args.steps,
        optimizer=args.optimizer,
        lr=DEFAULT_LR[args.optimizer] if args.lr is None else args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        warmup=DEFAULT_WARMUP[schedule] if args.warmup is None else args.warmup,
        loss=args.loss,
        schedule=schedule,
        accumulate=args.accumulate,
        precision=args.precision,
        ema=args.ema,
    )


def _check_numbers(args: argparse.Namespace, ranks: Ranks) -> None:
    counts = ("channels", "width", "depth", "steps", "batch", "accumulate", "size", "checkpoint_every")
    for name in (*counts, *(["evaluate_every"] if args.evaluate_every is not None else [])):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("workers", *(["ignore"] if args.ignore is not None else [])):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} must be at least 0, got {getattr(args, name)}")
    check_seed(args.seed)
    if args.classes is not None and not 2 <= args.classes <= IGNORE_INDEX:
        raise UserError(f"--classes must be from 2 to {IGNORE_INDEX}, got {args.classes}")
    if not math.isfinite(args.negative_slope):
        raise UserError(f"--negative-slope must be finite, got {args.negative_slope}")
    for name in ("lr", "momentum", "weight_decay"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= MAX_RATE:
            raise UserError(f"--{name.replace('_', '-')} must be between 0 and {MAX_RATE:g}, got {value}")
    for name in ("ema", "warmup"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"--{name} must be at least 0 and below 1, got {value}")
    if args.batch % (ranks.world * args.accumulate):
        raise UserError(
            f"--batch {args.batch}: expected a multiple of {ranks.world * args.accumulate}, "
            f"{ranks.world} processes times --accumulate {args.accumulate}"
        )
    if args.fsdp and ranks.world == 1:
        raise UserError("--fsdp shards over processes: torchrun --nproc-per-node N -m segfast train ...")


def augmentations(text: str) -> tuple[str, ...]:
    """Those that --augment names, of `AUGMENTATIONS`."""
    names = {"all": AUGMENTATIONS, "none": ()}.get(text, tuple(text.split(",")))
    if unknown := [name for name in names if name not in AUGMENTATIONS]:
        raise UserError(
            f"--augment must be all, none, or some of {', '.join(AUGMENTATIONS)}; got {unknown[0]!r}"
        )
    return names


def with_class_weights(options: Options, text: str | None, data: TrainingData) -> Options:
    """The options with the weights that --class-weights asks for."""
    if text is None:
        return options
    if data.classes is None or options.loss == "dice":
        raise UserError(f"--class-weights {text}: --loss {options.loss} has none")
    if text == "balanced":
        pixels = data.pixels[: data.planes]
        total, present = sum(pixels), sum(count > 0 for count in pixels)
        weights = tuple(total / (present * count) if count else 0.0 for count in pixels)
        return options._replace(class_weights=weights)
    try:
        weights = tuple(float(word) for word in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != data.planes or not all(0 <= w <= MAX_RATE for w in weights) or not any(weights):
        raise UserError(
            f"--class-weights {text}: expected balanced, or {data.planes} numbers from 0 to {MAX_RATE:g}, "
            "not all 0, with commas between"
        )
    return options._replace(class_weights=weights)
