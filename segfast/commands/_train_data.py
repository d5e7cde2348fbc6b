"""The data of `segfast train`: which files, the classes in their masks, and what is held out."""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._errors import UserError
from .._table import format_table
from ..data import IGNORE_INDEX, NUCLEI_TRAIN_COLUMNS, Sample, image_and_mask_paths, nuclei
from ..data._classes import ClassList, default_classes, read_classes
from ..data._folder import ColumnsOf, FolderSamples, check_holdout, check_sizes, read_pair
from ..data._images import image_size, palette_of, read_image, read_mask, read_values
from ..train._losses import CLASS_LOSSES
from ..train._parallel import Ranks

Pair = tuple[Path, Path]


class TrainingData(NamedTuple):
    """Samples for training and those held out, and what is in them.

    `classes` is None for real values, of which there are `planes`; `pixels` counts each class's for training.
    `digest` tells other images apart; `table` is for people.
    """

    train: Sequence[Sample]
    test: Sequence[Sample]
    classes: ClassList | None
    planes: int
    pixels: list[int]
    digest: str
    table: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast train` that say what the data is."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="FOLDER",
        help="holds images/ and masks/, names equal or with one ending for all, as in a_mask.png; or train/ "
        "and val/ with those (the nuclei shipped)",
    )
    data.add_argument("--channels", type=int, default=1, help="of the images: 1 gray, 3 color (1)")
    data.add_argument(
        "--classes", type=int, metavar="N", help="of the masks, 0 to N-1 (up to the largest, if all occur)"
    )
    data.add_argument(
        "--class-list",
        metavar="FILE",
        help="JSON with the classes' names and colors; masks may be color images then (FOLDER/classes.json, "
        "if there is one)",
    )
    data.add_argument("--foreground", action="store_true", help="any mask value above 0 is class 1")
    data.add_argument("--ignore", type=int, metavar="VALUE", help="of pixels not to be scored, beside 255")
    data.add_argument(
        "--holdout", type=float, default=0.25, help="rightmost share of each image, for testing (0.25)"
    )
    data.add_argument(
        "--holdout-images", action="store_true", help="hold out that share of the images instead, whole"
    )
    data.add_argument(
        "--skip-bad", action="store_true", help="name images and masks that cannot be read, and do without"
    )


def nuclei_samples() -> tuple[list[Sample], list[Sample]]:
    """The training and the held-out region of `segfast.data.nuclei`, class 1 being nucleus."""
    image, labels = nuclei()
    target, column = (labels > 0).long(), NUCLEI_TRAIN_COLUMNS
    train = Sample(image[..., :column], target[:, :column])
    return [train], [Sample(image[..., column:], target[:, column:])]


class _Files(NamedTuple):
    """Images with their masks; the same ones twice if columns are held out of each."""

    train: list[Pair]
    test: list[Pair]
    by_columns: bool


def training_data(args: argparse.Namespace, ranks: Ranks, skipped: Callable[[str], None]) -> TrainingData:
    """Find the files, read every mask once, each rank its share, and count what is in them.

    To be called on all ranks. With --skip-bad the first one's `skipped` is told of files that are bad.

    Raises:
        UserError: files that are missing, bad or do not go together, masks beyond the classes or of one only.
    """
    if args.data is None:
        return ranks.together(lambda: _nuclei(args))
    files, classes = ranks.together(lambda: (_files(args), _class_list(args)))
    every = files.train if files.by_columns else [*files.train, *files.test]
    mine = every[ranks.rank :: ranks.world]
    checked = ranks.together(lambda: {pair: _checked(pair, args, files, classes) for pair in mine})
    found = {pair: result for part in ranks.gather(checked) for pair, result in part.items()}
    for error in found.values():
        if isinstance(error, UserError) and ranks.rank == 0:
            skipped(str(error))
    return ranks.together(lambda: _assembled(args, files, classes, found))


def _nuclei(args: argparse.Namespace) -> TrainingData:
    if args.channels != 1:
        raise UserError(f"--channels {args.channels}: the nuclei image has 1")
    if args.loss not in CLASS_LOSSES:
        raise UserError(
            f"--loss {args.loss} is of real values, for --data that has them; the nuclei are a class"
        )
    train, test = nuclei_samples()
    parts = [_pixels(part[0].target) for part in (train, test)]
    classes = default_classes(2)._replace(names=("background", "nucleus"))
    return TrainingData(train, test, classes, 2, parts[0].tolist(), "nuclei", _class_table(classes, parts))


def _files(args: argparse.Namespace) -> _Files:
    folder = Path(args.data)
    if (folder / "train").is_dir():
        if not (folder / "val").is_dir():
            raise UserError(f"{folder / 'val'}: no such folder; beside train/ it has what is held out")
        return _Files(image_and_mask_paths(folder / "train"), image_and_mask_paths(folder / "val"), False)
    check_holdout(args.holdout)
    pairs = image_and_mask_paths(folder)
    if not args.holdout_images:
        return _Files(pairs, pairs, True)
    count = round(args.holdout * len(pairs))
    if not 0 < count < len(pairs):
        raise UserError(f"--holdout {args.holdout}: of {len(pairs)} images none would be left on one side")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = set(order[:count])
    train = [pair for i, pair in enumerate(pairs) if i not in held_out]
    return _Files(train, [pairs[i] for i in sorted(held_out)], False)


def _class_list(args: argparse.Namespace) -> ClassList | None:
    if args.loss not in CLASS_LOSSES:
        return None
    path = Path(args.class_list) if args.class_list is not None else Path(args.data, "classes.json")
    if args.class_list is None and not path.exists():
        return None
    classes = read_classes(path)
    if args.classes not in (None, len(classes.names)):
        raise UserError(f"--classes {args.classes}: {path} has {len(classes.names)}")
    return classes


def _mask_reader(args: argparse.Namespace, classes: ClassList | None) -> Callable[[Path], Tensor]:
    if args.loss not in CLASS_LOSSES:
        return read_values
    from_colors = classes.labels if classes is not None and classes.in_masks else None
    return lambda path: read_mask(path, args.foreground, args.ignore, from_colors)


def _checked(
    pair: Pair, args: argparse.Namespace, files: _Files, classes: ClassList | None
) -> list[Tensor] | UserError:
    """The pixels or the values of the mask, for training and held out; with --skip-bad, or the error."""
    try:
        mask = _mask_reader(args, classes)(pair[1])
        check_sizes(pair[0], image_size(pair[0]), pair[1], mask.shape[-2:])
        parts = [mask]
        if files.by_columns:
            parts = [ColumnsOf([], args.holdout, held_out).columns(mask) for held_out in (False, True)]
        return [_pixels(part) if args.loss in CLASS_LOSSES else _range(part) for part in parts]
    except UserError as error:
        if not args.skip_bad:
            raise
        return error


def _assembled(
    args: argparse.Namespace,
    files: _Files,
    classes: ClassList | None,
    found: dict[Pair, list[Tensor] | UserError],
) -> TrainingData:
    good = {pair: parts for pair, parts in found.items() if not isinstance(parts, UserError)}
    pairs = [[pair for pair in part if pair in good] for part in (files.train, files.test)]
    for name, left in zip(("training", "held-out"), pairs, strict=True):
        if not left:
            raise UserError(f"{args.data}: no {name} image is left")
    counts = [[good[pair][i if files.by_columns else 0] for pair in part] for i, part in enumerate(pairs)]

    def read(path: Path, mask_path: Path) -> Sample:
        return read_pair(path, mask_path, lambda p: read_image(p, args.channels), _mask_reader(args, classes))

    samples = FolderSamples(pairs[0], read)
    train: Sequence[Sample] = samples
    test: Sequence[Sample] = FolderSamples(pairs[1], read)
    if files.by_columns:
        train, test = (ColumnsOf(samples, args.holdout, held_out) for held_out in (False, True))
    digest = _digest(args, pairs)
    if args.loss not in CLASS_LOSSES:
        planes = _planes(good)
        return TrainingData(train, test, None, planes, [], digest, _value_table(counts))
    totals = [torch.stack(part).sum(0) for part in counts]
    count = _class_count(args, classes, {pair[1]: sum(parts[1:], parts[0]) for pair, parts in good.items()})
    for name, total in zip(("training", "held-out"), totals, strict=True):
        if not total[:IGNORE_INDEX].any():
            raise UserError(f"--holdout {args.holdout}: no pixel of the {name} part is scored, all are 255")
    if classes is None:
        colors = palette_of(pairs[0][0][1], count)
        classes = default_classes(count)
        classes = classes if colors is None else classes._replace(colors=tuple(colors))
    present = totals[0][:count].nonzero().flatten().tolist()
    if len(present) < 2:
        raise UserError(
            f"{args.data}: the masks' training part has one class only, {classes.names[present[0]]} "
            f"({int(totals[0].max())} pixels); there is nothing to tell apart"
        )
    return TrainingData(
        train, test, classes, count, totals[0].tolist(), digest, _class_table(classes, totals)
    )


def _pixels(labels: Tensor) -> Tensor:
    """The pixels of each value, int64 `[256]`."""
    return labels.flatten().bincount(minlength=IGNORE_INDEX + 1)


def _range(values: Tensor) -> Tensor:
    """Planes, known values, their least and largest, and their sum; float64 `[5]`."""
    known = values[~values.isnan()].double()
    planes = 1 if values.dim() == 2 else len(values)
    least, largest = (known.min(), known.max()) if known.numel() else (torch.inf, -torch.inf)
    return torch.tensor([planes, known.numel(), least, largest, known.sum()], dtype=torch.float64)


def _planes(good: dict[Pair, list[Tensor]]) -> int:
    counts = {pair[1]: int(parts[0][0]) for pair, parts in good.items()}
    first = next(iter(counts))
    for path, count in counts.items():
        if count != counts[first]:
            raise UserError(f"{path}: {count} planes of values, {first} has {counts[first]}")
    return counts[first]


def _class_count(args: argparse.Namespace, classes: ClassList | None, masks: dict[Path, Tensor]) -> int:
    """As many as were given, or as there are up to the largest, of which none may be missing."""
    found = torch.stack([*masks.values()]).sum(0)[:IGNORE_INDEX].nonzero().flatten().tolist()
    largest = max(found, default=0)
    given = args.classes if classes is None else len(classes.names)
    if given is not None:
        if largest >= given:
            path = next(path for path, counts in masks.items() if counts[given:IGNORE_INDEX].any())
            option = f"--classes {given}" if classes is None else f"a class list of {given}"
            raise UserError(f"{option}: the masks have class {largest}, expected 0 to {given - 1} ({path})")
        return given
    missing = sorted(set(range(largest)) - set(found) - {0})
    if missing:
        raise UserError(
            f"the masks have class {largest} and none of {', '.join(map(str, missing[:5]))}"
            f"{', ...' * (len(missing) > 5)}: --classes {largest + 1} if those are classes nevertheless, "
            "--foreground if every value above 0 is one class"
        )
    return max(2, 1 + largest)


def _class_table(classes: ClassList, totals: Sequence[Tensor]) -> str:
    rows: list[list[object]] = []
    for k, name in [*enumerate(classes.names), (IGNORE_INDEX, "not scored")]:
        pixels = [int(total[k]) for total in totals]
        if k != IGNORE_INDEX or any(pixels):
            share = pixels[0] / int(totals[0].sum())
            color = "" if k == IGNORE_INDEX else "#" + bytes(classes.colors[k]).hex()
            rows.append([k, name, color, pixels[0], f"{share:.2%}", pixels[1]])
    return format_table(["class", "name", "color", "training pixels", "share", "held-out pixels"], rows)


def _value_table(counts: Sequence[Sequence[Tensor]]) -> str:
    rows: list[list[object]] = []
    for name, part in zip(("training", "held out"), counts, strict=True):
        _, known, least, largest, total = torch.stack([*part]).unbind(1)
        mean = total.sum() / known.sum().clamp_min(1)
        rows.append([name, int(known.sum()), *(f"{x:.4g}" for x in (least.min(), mean, largest.max()))])
    return format_table(["values", "known", "least", "mean", "largest"], rows)


def _digest(args: argparse.Namespace, pairs: Sequence[Sequence[Pair]]) -> str:
    """Of the names of all files, in order; where the folder lies does not count."""
    names = [str(path.relative_to(args.data)) for part in pairs for pair in part for path in pair]
    digest = hashlib.sha256("\0".join(names).encode()).hexdigest()[:12]
    return f"{len(pairs[0])} and {len(pairs[1])} images ({digest})"
