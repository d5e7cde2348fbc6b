"""`segfast predict`: class masks of images of any size, with a network that `segfast train` wrote."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

from segfast._errors import UserError, do_each
from segfast._table import format_table
from segfast.commands._load_model import add_device, parse_device
from segfast.commands._output import claim_each
from segfast.data._images import SUFFIXES, existing, mask_writer
from segfast.data._mapped import open_image
from segfast.models import SegmentationModel
from segfast.predict import METHODS, TiledPredictor
from segfast.predict._tiled import AVERAGES, FLIPS, classes

from ..train._checkpoint import load_checkpoint
from ..train._parallel import Ranks, joined
from ..train._predict import MAX_TILE, channels_last
from ..train._progress import load_tqdm
from .train import DEFAULT_OUTPUT

# In images, of which a large one counts by its rows.
_BAR = {
    "desc": "segmenting",
    "mininterval": 0.5,
    "bar_format": "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast predict`."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="PNG, TIFF, JPEG or .npz, of any size; or a folder of those. Under torchrun the processes share "
        "them",
    )
    parser.add_argument("--checkpoint", default=DEFAULT_OUTPUT, metavar="FILE", help=f"({DEFAULT_OUTPUT})")
    parser.add_argument(
        "--output", metavar="PNG", help="of a single image; or a folder, for NAME.mask.png (out)"
    )
    tiles = parser.add_argument_group("tiles", "of images larger than one")
    tiles.add_argument("--tile", type=int, default=MAX_TILE, help=f"its side, pixels ({MAX_TILE})")
    tiles.add_argument(
        "--method",
        choices=METHODS,
        default="auto",
        help="exact: the whole image's scores; blend: neighbors fade into each other; auto: exact where the "
        "network does not look at the whole image (auto)",
    )
    tiles.add_argument(
        "--overlap", type=int, metavar="PIXELS", help="of neighbors, of blend (a quarter of a tile)"
    )
    average = parser.add_argument_group("test-time augmentation")
    average.add_argument(
        "--flips", choices=tuple(FLIPS), default="none", help="average over the image's mirror images (none)"
    )
    average.add_argument(
        "--scales", default="1", metavar="S,S,...", help="average over these sizes, 1 being the image's (1)"
    )
    average.add_argument("--average", choices=AVERAGES, default="scores", help="of what (scores)")
    add_device(parser)
    parser.add_argument("--force", action="store_true", help="replace files that segfast did not write")


def run(args: argparse.Namespace) -> int:
    """Write one palette PNG for each image: class indices to a reader, colors to a viewer."""
    with joined(parse_device(args.device)) as (ranks, device):
        return _run(args, ranks, device)


def _run(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> int:
    pairs = ranks.together(lambda: _pairs(args, ranks))
    model = ranks.together(lambda: channels_last(load_checkpoint(args.checkpoint, device)))
    predictor = ranks.together(lambda: _predictor(args, model))
    rows: dict[int, list[object]] = {}

    mine = range(ranks.rank, len(pairs), ranks.world)
    hidden = True if ranks.rank else None  # None: where nobody watches a terminal
    with load_tqdm()(total=len(mine), disable=hidden, **_BAR) as bar:

        def segment(index: int) -> None:
            rows[index] = segmented(predictor, model, *pairs[index], bar.update)

        code = do_each(mine, segment)
    for part in ranks.gather(rows):
        rows |= part
    if rows and ranks.rank == 0:
        table = [rows[index] for index in sorted(rows)]
        print(format_table(["image", "height x width", "share of each class", "mask"], table))
    return ranks.largest(code)


def _predictor(args: argparse.Namespace, model: SegmentationModel) -> TiledPredictor:
    try:
        scales = tuple(float(word) for word in args.scales.split(","))
    except ValueError as error:
        raise UserError(
            f"--scales must be numbers with commas between, as in 0.75,1,1.25; got {args.scales}"
        ) from error
    try:
        return TiledPredictor(
            model,
            args.tile,
            method=args.method,
            overlap=args.overlap,
            flips=args.flips,
            scales=scales,
            average=args.average,
        )
    except ValueError as error:  # begins with the option's name
        raise UserError(f"--{error}") from error


def segmented(
    predictor: TiledPredictor,
    model: SegmentationModel,
    path: Path,
    output: Path,
    on_part: Callable[[float], object],
) -> list[object]:
    """Write an image's mask, rows of tiles at a time; its line of the table.

    `on_part` is told of each part of the image that is written, as a share of it.

    Raises:
        UserError: the image cannot be read or run in such tiles, or the mask not be written.
    """
    image = open_image(path, model.in_channels)
    height, width = image.shape[1:]
    pixels = torch.zeros(max(2, model.num_classes), dtype=torch.int64)
    try:
        tiles = predictor(image)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    with mask_writer(output, height, width) as add:
        for rows, columns, scores in tiles:
            if columns.start == 0:
                band = torch.empty(rows.stop - rows.start, width, dtype=torch.uint8)
            band[:, columns] = classes(scores, predictor.average)
            if columns.stop == width:
                add(band)
                pixels += band.flatten().bincount(minlength=len(pixels))
                on_part(len(band) / height)
    shares = " ".join(f"{share:.1%}" for share in (pixels / pixels.sum()).tolist())
    return [path, f"{height}x{width}", shares, output]


def _pairs(args: argparse.Namespace, ranks: Ranks) -> list[tuple[Path, Path]]:
    """Every image, and where its mask goes; all names checked before the first is computed."""
    images = [path for name in args.images for path in _images(Path(name))]
    output = Path(args.output or "out")
    if args.output is None or not output.suffix or os.path.isdir(output):
        paths = [output / f"{image.stem}.mask.png" for image in images]
    elif output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: expected a name ending in .png, or a folder")
    elif len(images) > 1:
        raise UserError(f"--output names one file, there are {len(images)} images; a folder takes all")
    else:
        paths = [output]
    if ranks.rank == 0:
        claim_each(paths, images, force=args.force)
    return list(zip(images, paths, strict=True))


def _images(path: Path) -> list[Path]:
    if not path.is_dir():
        return [existing(path)]
    found = [p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise UserError(f"{path}: no file ending in one of {', '.join(SUFFIXES)}")
    return found
