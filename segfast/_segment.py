"""`segfast segment`: find the person in photos, with a pretrained network that is part of the package."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._errors import UserError
from ._load_model import parse_device
from ._output import claim_each
from ._table import format_table
from ._threads import one_thread
from .data import read_photo, write_image
from .models import SelfieSegmenter
from .train._predict import channels_last
from .train._progress import load_tqdm

# The network's own: it has seen every photo squeezed to this.
SIZE = (256, 256)
# Of an overlay's background: Okabe and Ito's green, and how much of it there is.
COLOUR = (0, 158, 115)
STRENGTH = 0.65


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast segment`."""
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="any image that pillow opens, of any size")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="NAME.png for the mask of a single photo (the overlay goes to NAME.overlay.png), or a folder "
        "(out: NAME.mask.png and NAME.overlay.png)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="a hard mask: 255 where a person is at least this probable, else 0 (255 times the probability)",
    )
    parser.add_argument("--device", help="cpu or cuda (cuda where there is a GPU)")
    parser.add_argument("--force", action="store_true", help="replace files that segfast did not write")


@one_thread()
def run(args: argparse.Namespace) -> int:
    """Write two PNGs of each photo's size: the mask in grey, and the photo with its background tinted."""
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise UserError(f"--threshold must be between 0 and 1, got {args.threshold}")
    photos = [Path(photo) for photo in args.photos]
    outputs = _outputs(photos, args.output, args.force)
    model = load_segmenter(parse_device(args.device))
    rows = []
    for path, (mask_path, overlay_path) in zip(_bar(photos), outputs, strict=True):
        photo = read_photo(path)
        mask = person_mask(model, photo)
        if args.threshold is not None:
            mask = (mask >= args.threshold).float()
        write_image(mask_path, (255 * mask).round().byte())
        write_image(overlay_path, overlay(photo, mask))
        rows.append([path, f"{mask.shape[1]}x{mask.shape[0]}", f"{mask.mean():.1%}", mask_path, overlay_path])
    print(format_table(["photo", "width x height", "person", "mask", "overlay"], rows))
    return 0


def load_segmenter(device: torch.device | str = "cpu") -> SelfieSegmenter:
    """The pretrained network, ready to run."""
    return channels_last(SelfieSegmenter(pretrained=True).eval().to(device))


@torch.inference_mode()
def person_mask(model: nn.Module, photo: Tensor) -> Tensor:
    """The probability of "person" at every pixel, on the CPU.

    Args:
        model: of `load_segmenter`.
        photo: uint8 `[3, H, W]`, RGB.

    Returns:
        float32 `[H, W]` in [0, 1]: the network's 256x256 pixels, bilinearly interpolated.
    """
    device = next(model.parameters()).device
    small = F.interpolate(photo[None], SIZE, mode="bilinear", antialias=True)
    mask = model(small.to(device).float() / 255).sigmoid().cpu()
    return F.interpolate(mask, photo.shape[1:], mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def overlay(photo: Tensor, mask: Tensor) -> Tensor:
    """The photo, uint8 `[3, H, W]`, with its background (mask 0, of `[H, W]`) in shades of one colour."""
    from PIL import Image

    image = Image.fromarray(photo.movedim(0, -1).contiguous().numpy())
    grey = image.convert("L").convert("RGB")
    background = Image.blend(grey, Image.new("RGB", image.size, COLOUR), STRENGTH)
    person = Image.fromarray((255 * mask).round().byte().numpy())
    return torch.from_numpy(np.array(Image.composite(image, background, person))).movedim(-1, 0)


def _bar(photos: Sequence[Path]) -> Iterator[Path]:
    """The photos, with a progress bar on stderr where there are several."""
    return iter(photos) if len(photos) == 1 else iter(load_tqdm()(photos, desc="segmenting", unit="photo"))


def _outputs(photos: list[Path], output: str | None, force: bool) -> list[tuple[Path, Path]]:
    """Where each photo's mask and overlay go, every one of them checked before the first is computed."""
    folder = Path("out" if output is None else output)
    if folder.suffix.lower() == ".png":
        if len(photos) > 1:
            raise UserError(
                f"--output {output}: one file for {len(photos)} photos; give a folder, or leave it out"
            )
        masks, overlays = [folder], [folder.with_suffix(".overlay.png")]
    elif folder.suffix and not folder.is_dir():
        raise UserError(f"--output {output}: expected a name ending in .png, or a folder")
    else:
        masks, overlays = (
            [folder / f"{photo.stem}.{kind}.png" for photo in photos] for kind in ("mask", "overlay")
        )
    for path in (*masks, *overlays):
        if any(path.exists() and photo.exists() and os.path.samefile(path, photo) for photo in photos):
            raise UserError(f"{path}: the result would replace the photo itself")
    claim_each(masks, photos, force=force)
    claim_each(overlays, photos, force=force)
    return list(zip(masks, overlays, strict=True))
