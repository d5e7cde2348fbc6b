"""`segfast train`: a network on the nuclei that are shipped, or on a folder of images and masks."""

import argparse
import ast
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segfast._errors import UserError
from segfast._table import format_table
from segfast.commands._load_model import add_device, check_seed, parse_device
from segfast.commands._output import claim
from segfast.data import IGNORE_INDEX, NUCLEI_TRAIN_COLUMNS, Sample, nuclei, read_folder, split_columns
from segfast.models import SegmentationModel, UNet, create
from segfast.models.unet import UNET_ACTIVATIONS

from ..train._augment import PatchSampler
from ..train._checkpoint import save_checkpoint
from ..train._figures import loss_figure, save_figure
from ..train._loop import OPTIMIZERS, Options, evaluate, fit
from ..train._metrics import Scores
from ..train._predict import channels_last
from ..train._progress import progress

DEFAULT_OUTPUT = "out/unet.safetensors"
MAX_RATE = 1e3
DEFAULT_LR = {"adamw": 3e-3, "sgd": 0.05}
# What the command has of its own for the U-Net, and what it is by default.
UNET_OPTIONS = {
    "width": 16,
    "depth": 4,
    "unpadded": False,
    "activation": "relu",
    "negative_slope": 0.01,
    "norm": "batch",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast train`."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="FOLDER", help="holds images/ and masks/, same names (the nuclei shipped)"
    )
    data.add_argument("--channels", type=int, default=1, help="of the images: 1 gray, 3 color (1)")
    data.add_argument("--foreground", action="store_true", help="any mask value above 0 is class 1")
    data.add_argument(
        "--classes", type=int, metavar="N", help="of the masks, 0 to N-1 (up to the largest, if all occur)"
    )
    data.add_argument(
        "--holdout", type=float, default=0.25, help="rightmost share of each image, for testing"
    )
    model = parser.add_argument_group("model", "all but the first two are for the U-Net")
    model.add_argument(
        "--model", default="unet", metavar="NAME", help="one of segfast.models.list_models() (unet)"
    )
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
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=350, help="(350)")
    training.add_argument("--batch", type=int, default=4, help="patches a step (4)")
    training.add_argument("--size", type=int, default=128, help="height and width of a patch, pixels (128)")
    training.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(adamw)")
    training.add_argument("--lr", type=float, help="peak learning rate (adamw 0.003, sgd 0.05)")
    training.add_argument("--momentum", type=float, default=0.9, help="of sgd (0.9)")
    training.add_argument("--weight-decay", type=float, default=1e-4, help="(0.0001)")
    training.add_argument("--no-augment", action="store_true", help="plain random crops")
    training.add_argument("--seed", type=int, default=0, help="of weights and patches (0)")
    add_device(training)
    parser.add_argument("--output", default=DEFAULT_OUTPUT, metavar="FILE", help=f"({DEFAULT_OUTPUT})")
    parser.add_argument("--force", action="store_true", help="replace files that segfast did not write")


def run(args: argparse.Namespace) -> int:
    """Train, score the held-out region, write checkpoint and loss curve; under torchrun, on all ranks."""
    _check_options(args)
    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: expected a name ending in .safetensors")
    outputs = [claim(path, force=args.force) for path in (output, output.with_suffix(".png"))]
    train, test = _data(args)
    num_classes = _num_classes([*train, *test], args.classes)
    for part, samples in (("training", train), ("held-out", test)):
        if not any((sample.target != IGNORE_INDEX).any() for sample in samples):
            raise UserError(f"--holdout {args.holdout}: no pixel of the {part} part is scored, all are 255")
    rank, device = _start(args.device)
    torch.manual_seed(args.seed)
    model = channels_last(_model(args, num_classes).to(device))
    sampler = PatchSampler(train, args.size, args.batch, args.seed + rank, augment=not args.no_augment)
    options = Options(
        steps=args.steps,
        optimizer=args.optimizer,
        lr=DEFAULT_LR[args.optimizer] if args.lr is None else args.lr,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
    )
    try:
        with progress(args.steps, shown=rank == 0) as on_step:
            losses = fit(_parallel(model, device), sampler, options, on_step)
    except FloatingPointError as error:
        raise UserError(str(error)) from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if rank == 0:
        result = evaluate(model, test, model.num_classes)
        save_checkpoint(model, outputs[0])
        save_figure(loss_figure(losses, f"{output.stem}: held-out mIoU {result.miou:.3f}"), outputs[1])
        print(scores_table(result))
        print(f"wrote {outputs[0]} and {outputs[1]}")
    return 0


def scores_table(result: Scores) -> str:
    """IoU of each class and their mean, on the region never trained on."""
    absent = [k for k, value in enumerate(result.iou.tolist()) if math.isnan(value)]
    rows = [
        [f"class {k}", "absent" if k in absent else f"{value:.4f}"]
        for k, value in enumerate(result.iou.tolist())
    ]
    table = format_table(["held-out region", "IoU"], [*rows, ["mean", f"{result.miou:.4f}"]])
    if not absent:
        return table
    names = f"class{'es' * (len(absent) > 1)} {', '.join(map(str, absent))}"
    return (
        f"{table}\nThe mean leaves out {names}: neither in the held-out region's masks nor predicted there."
    )


def nuclei_samples() -> tuple[list[Sample], list[Sample]]:
    """The training and the held-out region of `segfast.data.nuclei`, class 1 being nucleus."""
    image, labels = nuclei()
    target, column = (labels > 0).long(), NUCLEI_TRAIN_COLUMNS
    train = Sample(image[..., :column], target[:, :column])
    return [train], [Sample(image[..., column:], target[:, column:])]


def _check_options(args: argparse.Namespace) -> None:
    for name in ("channels", "width", "depth", "steps", "batch", "size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    check_seed(args.seed)
    if args.classes is not None and not 2 <= args.classes <= IGNORE_INDEX:
        raise UserError(f"--classes must be from 2 to {IGNORE_INDEX}, got {args.classes}")
    if not math.isfinite(args.negative_slope):
        raise UserError(f"--negative-slope must be finite, got {args.negative_slope}")
    for name in ("lr", "momentum", "weight_decay"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= MAX_RATE:
            raise UserError(f"--{name.replace('_', '-')} must be between 0 and {MAX_RATE:g}, got {value}")


def _data(args: argparse.Namespace) -> tuple[list[Sample], list[Sample]]:
    if args.data is not None:
        return split_columns(read_folder(args.data, args.channels, args.foreground), args.holdout)
    if args.channels != 1:
        raise UserError(f"--channels {args.channels}: the nuclei image has 1")
    return nuclei_samples()


def _num_classes(samples: list[Sample], given: int | None) -> int:
    """`given`, or as many as there are up to the largest, of which none may be missing."""
    found = set().union(*(sample.target.unique().tolist() for sample in samples)) - {IGNORE_INDEX}
    largest = max(found, default=0)
    if given is not None:
        if largest >= given:
            raise UserError(f"--classes {given}: the masks have class {largest}, expected 0 to {given - 1}")
        return given
    missing = sorted(set(range(largest)) - found - {0})
    if missing:
        raise UserError(
            f"the masks have class {largest} and none of {', '.join(map(str, missing[:5]))}"
            f"{', ...' * (len(missing) > 5)}: --classes {largest + 1} if those are classes nevertheless, "
            "--foreground if every value above 0 is one class"
        )
    return max(2, 1 + largest)


def _model(args: argparse.Namespace, num_classes: int) -> SegmentationModel:
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
        raise UserError(f"--{strange[0].replace('_', '-')} is for --model unet; of {args.model} use --option")
    try:
        model = create(args.model, **{"in_channels": args.channels, "num_classes": num_classes, **options})
    except (TypeError, ValueError) as error:
        raise UserError(f"--model {args.model}: {error}") from error
    _check_step(model, args)
    return model


def _check_step(model: SegmentationModel, args: argparse.Namespace) -> None:
    """Raise UserError if the model cannot be trained on patches of this size, so many a step."""
    if isinstance(model, UNet):
        try:
            model.check_size(args.size, args.size)
        except ValueError as error:
            raise UserError(f"--size {args.size}: {error}") from error
        if args.norm == "batch" and args.batch * model.bottleneck_pixels(args.size, args.size) == 1:
            raise UserError(
                f"--batch {args.batch} --size {args.size}: at --depth {args.depth} the deepest map of a step "
                "is one pixel, of which batch norm has no statistics; give a larger batch or size, or "
                "--norm none"
            )
        return
    try:
        with torch.device("meta"):
            twin = create(args.model, **model.config)
            twin(torch.empty(args.batch, model.in_channels, args.size, args.size))
    except ValueError as error:
        raise UserError(f"--batch {args.batch} --size {args.size}: {error}") from error


def _start(device: str | None) -> tuple[int, torch.device]:
    """Join the process group if torchrun started us; our rank and device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, parse_device(device)
    found = parse_device(device)
    if found.type == "cuda":
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(found)
    torch.distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
    return torch.distributed.get_rank(), found


def _parallel(model: nn.Module, device: torch.device) -> nn.Module:
    if not torch.distributed.is_initialized():
        return model
    return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
