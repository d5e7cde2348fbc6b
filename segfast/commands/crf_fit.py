"""`segfast crf-fit`: search the parameters of a dense CRF on a validation split, and say whether it helps.

So Kraehenbuehl and Koltun chose theirs, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials" (2011), section 4. Values copied from elsewhere often lower the accuracy.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import UserError
from ..data import IGNORE_INDEX, image_and_mask_paths, read_colors, read_image, read_mask
from ..models import SegmentationModel
from ..ops.dense_crf.filters import METHODS
from ..train import load_checkpoint, predict_scores
from ..train._predict import channels_last
from ..train._progress import load_tqdm
from ._crf_parameters import NO_CRF, TEXTBOOK, write_parameters
from ._crf_search import (
    Accuracy,
    Labeled,
    accuracy,
    accuracy_table,
    describe,
    labeled,
    permutation_note,
    search,
    split,
    verdict,
)
from ._load_model import add_device, check_seed, parse_device
from ._output import claim
from ._threads import one_thread
from ._train_data import nuclei_samples
from .demo import STEPS, trained_model

DEFAULT_OUTPUT = "out/crf.json"
# How far the sum of a pixel's probabilities may be from 1: half precision's worth.
SUM_TOLERANCE = 1e-2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast crf-fit`."""
    data = parser.add_argument_group("data, which the network must not have been trained on")
    data.add_argument(
        "--data",
        metavar="FOLDER",
        help="holds images/ and masks/, same names (the columns of the nuclei shipped that "
        "`segfast train` holds out)",
    )
    data.add_argument("--foreground", action="store_true", help="any mask value above 0 is class 1")
    data.add_argument(
        "--unseen",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="rightmost share of each image to use: what `segfast train --holdout` was given (1)",
    )
    data.add_argument(
        "--holdout",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the images, or of the rows of a single one, to measure on and not to fit (0.5)",
    )
    network = parser.add_argument_group("network").add_mutually_exclusive_group()
    network.add_argument(
        "--checkpoint",
        metavar="FILE",
        help=f"that `segfast train` wrote (for the nuclei: a U-Net trained here and now, {STEPS} steps)",
    )
    network.add_argument(
        "--probabilities",
        metavar="FOLDER",
        help="of NAME.npy or NAME.npz, [classes, H, W], or [H, W] of class 1; the images are taken as color",
    )
    fit = parser.add_argument_group("search")
    fit.add_argument("--trials", type=int, default=100, help="parameter sets to try (100)")
    fit.add_argument("--seconds", type=float, default=math.inf, help="start no trial after (no limit)")
    fit.add_argument("--seed", type=int, default=0, help="of what is tried, and of the split (0)")
    fit.add_argument("--method", choices=METHODS, default="auto", help="how the CRF filters (auto)")
    add_device(parser)
    parser.add_argument("-o", "--output", default=DEFAULT_OUTPUT, metavar="FILE", help=f"({DEFAULT_OUTPUT})")
    parser.add_argument("--force", action="store_true", help="replace a file that segfast did not write")


@one_thread()
def run(args: argparse.Namespace) -> int:
    """Search, print the accuracy before and after, whichever way it went, and write the parameters."""
    if args.trials < 2:
        raise UserError(f"--trials must be at least 2 (no CRF and the textbook's), got {args.trials}")
    check_seed(args.seed)
    if not args.seconds > 0:
        raise UserError(f"--seconds must be above 0, got {args.seconds}")
    if Path(args.output).suffix != ".json":
        raise UserError(f"--output {args.output}: expected a name ending in .json")
    output = claim(args.output, force=args.force)
    samples = _samples(args, parse_device(args.device))
    note = permutation_note(samples)
    if note is not None:
        print(f"segfast: {note}", file=sys.stderr)
    fitted, held_out = split(samples, args.holdout, args.seed)
    for name, part in (("fitted", fitted), ("held-out", held_out)):
        if not any((sample.target != IGNORE_INDEX).any() for sample in part):
            raise UserError(f"--holdout {args.holdout}: no pixel of the {name} part is scored")
    with load_tqdm()(total=args.trials, desc="fitting", unit="trial") as bar:

        def on_trial(best: Accuracy) -> None:
            bar.set_postfix({"best mean IoU": f"{best.mean_iou:.4f}"}, refresh=False)
            bar.update()

        best, trials = search(
            fitted, args.trials, args.seed, args.seconds, method=args.method, on_trial=on_trial
        )
    parts = {"fitted": fitted, "held out": held_out}
    before, textbook, after = (
        {name: accuracy(part, parameters, args.method) for name, part in parts.items()}
        for parameters in (NO_CRF, TEXTBOOK, best)
    )
    print(accuracy_table(before, {"textbook CRF": textbook, "fitted CRF": after}))
    print(f"\nbest of {trials}: {describe(best)}")
    print(verdict(best, before["held out"], after["held out"]))
    write_parameters(
        output,
        best,
        args.method,
        channels=samples[0].image.shape[0],
        classes=samples[0].probabilities.shape[0],
        trials=trials,
        seed=args.seed,
        accuracy={name: {"before": before[name]._asdict(), "after": after[name]._asdict()} for name in parts},
    )
    print(f"wrote {output}")
    return 0


def _samples(args: argparse.Namespace, device: torch.device) -> list[Labeled]:
    if args.data is None:
        if args.probabilities is not None:
            raise UserError("--probabilities needs --data, the images and masks they belong to")
        if args.foreground or args.unseen != 1:
            raise UserError("--foreground and --unseen need --data")
        return [labeled(_nuclei_network(args.checkpoint, device), nuclei_samples()[1][0])]
    if not 0 < args.unseen <= 1:
        raise UserError(f"--unseen {args.unseen}: expected a share above 0, at most 1")
    paths = image_and_mask_paths(args.data)
    if args.checkpoint is not None:
        found = _from_network(paths, channels_last(load_checkpoint(args.checkpoint, device)))
    elif args.probabilities is not None:
        found = _from_arrays(paths, Path(args.probabilities))
    else:
        raise UserError("--data needs the network: --checkpoint or --probabilities")
    samples: list[Labeled] = []
    for (path, probabilities, colors), (image_path, mask_path) in zip(
        _bar(found, len(paths)), paths, strict=True
    ):
        target = read_mask(mask_path, args.foreground)
        sizes = {path: probabilities.shape[1:], image_path: colors.shape[1:], mask_path: target.shape}
        _check_sizes(sizes)
        _check_classes(path, probabilities, mask_path, target, samples)
        start = target.shape[1] - max(1, round(target.shape[1] * args.unseen))
        cut = (tensor[..., start:] for tensor in (probabilities.to(device), colors.to(device), target))
        samples.append(Labeled(*cut))
    return samples


def _nuclei_network(checkpoint: str | None, device: torch.device) -> SegmentationModel:
    train, [test] = nuclei_samples()
    if checkpoint is None:
        return trained_model(train, device=device)
    model = channels_last(load_checkpoint(checkpoint, device))
    if model.in_channels != 1 or model.num_classes < 1 + int(test.target.max()):
        raise UserError(
            f"{checkpoint}: {model.in_channels} channels and {model.num_classes} classes, the nuclei "
            "image has 1 and 2; --data names other images"
        )
    return model


Pairs = Sequence[tuple[Path, Path]]
Found = Iterator[tuple[Path, Tensor, Tensor]]


def _from_network(paths: Pairs, model: SegmentationModel) -> Found:
    """The name of what the probabilities are of, these, and the image's colors."""
    for path, _ in paths:
        scores = predict_scores(model, read_image(path, model.in_channels))
        yield path, scores.softmax(0), read_colors(path, model.in_channels)


def _from_arrays(paths: Pairs, folder: Path) -> Found:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for path, _ in paths:
        source = next(
            (p for p in (folder / f"{path.stem}{end}" for end in (".npy", ".npz")) if p.exists()), None
        )
        if source is None:
            raise UserError(f"{path}: no probabilities named {path.stem}.npy or .npz in {folder}")
        yield source, _read_probabilities(source), read_colors(path, 3)


def _read_probabilities(path: Path) -> Tensor:
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with loaded as archive:
                if len(archive.files) != 1:
                    raise UserError(f"{path}: expected one array, the file has {sorted(archive.files)}")
                loaded = archive[archive.files[0]]
    except UserError:
        raise
    except Exception as error:  # zipfile.BadZipFile, ValueError, OSError, zlib.error, ...
        raise UserError(f"{path}: not a readable array ({str(error).splitlines()[0]})") from error
    if loaded.dtype.kind != "f" or loaded.ndim not in (2, 3) or 0 in loaded.shape:
        raise UserError(
            f"{path}: expected floating point, [classes, H, W] or [H, W], "
            f"got {loaded.dtype} {list(loaded.shape)}"
        )
    found = torch.from_numpy(loaded.astype(np.float32))
    if found.dim() == 2:
        found = torch.stack([1 - found, found])
    off = (found.sum(0) - 1).abs().max()
    if not (off <= SUM_TOLERANCE and found.min() >= -SUM_TOLERANCE):
        raise UserError(
            f"{path}: expected probabilities, which sum to 1, got {found.min():.3g} to {found.max():.3g}"
        )
    return found.clamp_min(0)


def _check_sizes(sizes: dict[Path, torch.Size]) -> None:
    """Check that an image's files are of one size, that of its mask, the last."""
    *others, mask = sizes
    for path in others:
        if sizes[path] != sizes[mask]:
            found = " and ".join(f"{s[0]}x{s[1]}" for s in (sizes[mask], sizes[path]))
            raise UserError(f"{mask} and {path}: different sizes, {found}")


def _check_classes(
    path: Path, probabilities: Tensor, mask_path: Path, target: Tensor, earlier: list[Labeled]
) -> None:
    """As many in all images, and no mask with others."""
    classes = earlier[0].probabilities.shape[0] if earlier else max(2, len(probabilities))
    if len(probabilities) != classes:
        raise UserError(f"{path}: {len(probabilities)} classes, expected {classes}")
    largest = int(target.masked_fill(target == IGNORE_INDEX, 0).max())
    if largest >= classes:
        raise UserError(f"{mask_path}: class {largest}, the network knows 0 to {classes - 1}")


def _bar(found: Found, count: int) -> Found:
    """The images found, with a progress bar on stderr where there are several."""
    return found if count == 1 else iter(load_tqdm()(found, total=count, desc="reading", unit="image"))
