"""`segfast predict`: class masks of images, with a network that `segfast train` wrote."""

import argparse
from pathlib import Path

from segfast._errors import UserError, do_each
from segfast._table import format_table
from segfast.commands._load_model import add_device, parse_device
from segfast.commands._output import claim_each
from segfast.data import read_image, write_mask
from segfast.data._images import existing

from ..train._checkpoint import load_checkpoint
from ..train._predict import MAX_TILE, channels_last, predict
from .train import DEFAULT_OUTPUT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast predict`."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="PNG, TIFF, JPEG or .npz, of any size")
    parser.add_argument("--checkpoint", default=DEFAULT_OUTPUT, metavar="FILE", help=f"({DEFAULT_OUTPUT})")
    parser.add_argument("--output", metavar="FILE", help="of a single image (out/NAME.mask.png)")
    parser.add_argument(
        "--tile", type=int, default=MAX_TILE, help=f"largest side computed at once ({MAX_TILE})"
    )
    add_device(parser)
    parser.add_argument("--force", action="store_true", help="replace files that segfast did not write")


def run(args: argparse.Namespace) -> int:
    """Write one palette PNG for each image: class indices to a reader, colors to a viewer."""
    if args.tile < 1:
        raise UserError(f"--tile must be at least 1, got {args.tile}")
    images = [Path(image) for image in args.images]
    outputs = _outputs(images, args.output, args.force)
    model = channels_last(load_checkpoint(args.checkpoint, parse_device(args.device)))
    rows: list[list[object]] = []

    def segment(pair: tuple[Path, Path]) -> None:
        path, output = pair
        labels = predict(model, read_image(path, model.in_channels), args.tile)
        write_mask(output, labels)
        shares = labels.flatten().bincount(minlength=model.num_classes) / labels.numel()
        size = f"{labels.shape[0]}x{labels.shape[1]}"
        rows.append([path, size, " ".join(f"{share:.1%}" for share in shares.tolist()), output])

    code = do_each(zip(images, outputs, strict=True), segment)
    if rows:
        print(format_table(["image", "height x width", "share of each class", "mask"], rows))
    return code


def _outputs(images: list[Path], output: str | None, force: bool) -> list[Path]:
    """Where each mask goes; every name checked before the first is computed."""
    for image in images:
        existing(image)
    if output is not None:
        if len(images) > 1:
            raise UserError(
                f"--output names one file, there are {len(images)} images; without it each goes to out/"
            )
        if Path(output).suffix.lower() != ".png":
            raise UserError(f"--output {output}: expected a name ending in .png")
        paths = [Path(output)]
    else:
        paths = [Path("out") / f"{image.stem}.mask.png" for image in images]
    claim_each(paths, images, force=force)
    return paths
