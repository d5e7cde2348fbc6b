"""`segfast segment`: find the person in photos, with a pretrained network that is part of the package."""

import argparse
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import UserError, do_each
from .._table import format_table
from ..data import read_photo, write_image
from ..data._images import existing
from ..models import SelfieSegmenter
from ..train._figures import new_figure, save_figure
from ..train._predict import channels_last
from ..train._progress import load_tqdm
from ._crf_figure import Refined, crf_figure
from ._crf_parameters import Parameters, read_parameters, refine
from ._load_model import add_device, parse_device
from ._output import claim_each
from ._threads import one_thread

# The network's own: it has seen every photo squeezed to this.
SIZE = (256, 256)
# Of an overlay's background: Okabe and Ito's green, and how much of it there is.
COLOR = (0, 158, 115)
STRENGTH = 0.65
# Of --crf without a file, for a photo whose longer side is 512. Chosen by eye: the package has no labeled
# portraits to fit them to.
UNFITTED = Parameters(40.0, 8.0, 3.0, 3.0, 3.0, 5)
# Mean field of larger photos runs on this many pixels, for time and memory.
MAX_PIXELS = 1 << 20


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
    parser.add_argument(
        "--crf",
        nargs="?",
        const="",
        type=_json_name,
        metavar="FILE.json",
        help="refine the mask by mean field in a dense CRF on the photo, and draw photo, mask, refined mask "
        "and difference in NAME.crf.png. FILE.json is of `segfast crf-fit`, fitted to masks like these. The "
        "values taken without it were fitted to nothing and measured on nothing: look at the picture. A "
        "photo of more than a megapixel is refined at one megapixel",
    )
    add_device(parser)
    parser.add_argument("--force", action="store_true", help="replace files that segfast did not write")


@one_thread()
def run(args: argparse.Namespace) -> int:
    """Write two PNGs of each photo's size: the mask in gray, and the photo with its background tinted."""
    if args.threshold is not None and not 0 < args.threshold < 1:
        raise UserError(f"--threshold must be between 0 and 1, got {args.threshold}")
    fitted = read_parameters(args.crf, channels=3) if args.crf else None
    device = parse_device(args.device)
    photos = [Path(photo) for photo in args.photos]
    kinds = ["mask", "overlay"] if args.crf is None else ["mask", "overlay", "crf"]
    outputs = _outputs(photos, kinds, args.output, args.force)
    if args.crf is not None:
        new_figure()  # or say what is missing, before the first file is written
    model = load_segmenter(device)
    rows: list[list[object]] = []

    def segment(index: int) -> None:
        path, files = photos[index], outputs[index]
        photo = read_photo(path)
        soft = person_mask(model, photo)
        refined = soft if args.crf is None else refined_mask(soft, photo, fitted, device)
        before, mask = (
            mask if args.threshold is None else (mask >= args.threshold).float() for mask in (soft, refined)
        )
        write_image(files[0], (255 * mask).round().byte())
        write_image(files[1], overlay(photo, mask))
        if args.crf is not None:
            save_figure(crf_figure([Refined(photo, before, mask)], path.name), files[2])
        rows.append([path, f"{mask.shape[0]}x{mask.shape[1]}", f"{mask.mean():.1%}", *files])

    code = do_each(_bar(len(photos), args.crf), segment)
    if rows:
        print(format_table(["photo", "height x width", "person", *kinds], rows))
    return code


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


def refined_mask(
    mask: Tensor,
    photo: Tensor,
    fitted: tuple[Parameters, str] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The mask after mean field in a dense CRF over the photo's pixels.

    Args:
        mask: of `person_mask`.
        photo: uint8 `[3, H, W]`, RGB; of more than `MAX_PIXELS` it is made smaller, and the result enlarged.
        fitted: of `read_parameters`, for the photo at its own size; without it `UNFITTED`, which goes with
            the size.

    Returns:
        float32 `[H, W]` in [0, 1], on the CPU.
    """
    height, width = mask.shape
    parameters, method = fitted or (UNFITTED.scaled(max(height, width) / 512), "auto")
    factor = min(1.0, (MAX_PIXELS / (height * width)) ** 0.5)
    size = [max(1, int(side * factor)) for side in (height, width)]
    small_mask, colors = (
        F.interpolate(tensor[None].float(), size, mode="bilinear", antialias=True)[0]
        for tensor in (mask[None], photo)
    )
    person = small_mask[0].clamp(0, 1).to(device)
    probabilities = torch.stack([1 - person, person])
    refined = refine(probabilities, colors, parameters.scaled(factor), method)[1].cpu()
    return F.interpolate(refined[None, None], (height, width), mode="bilinear", antialias=True)[0, 0].clamp(
        0, 1
    )


def overlay(photo: Tensor, mask: Tensor) -> Tensor:
    """The photo, uint8 `[3, H, W]`, with its background (mask 0, of `[H, W]`) in shades of one color."""
    from PIL import Image

    image = Image.fromarray(photo.movedim(0, -1).contiguous().numpy())
    gray = image.convert("L").convert("RGB")
    background = Image.blend(gray, Image.new("RGB", image.size, COLOR), STRENGTH)
    person = Image.fromarray((255 * mask).round().byte().numpy())
    return torch.from_numpy(np.array(Image.composite(image, background, person))).movedim(-1, 0)


def _json_name(name: str) -> str:
    """The argument of --crf; a photo behind it would be taken for one."""
    if name and Path(name).suffix.lower() != ".json":
        raise argparse.ArgumentTypeError(f"{name}: expected a name ending in .json; put photos before --crf")
    return name


def _bar(count: int, crf: str | None) -> Iterable[int]:
    """The photos' numbers, with a progress bar on stderr where they may take a while."""
    if count == 1 and crf is None:
        return range(count)
    return load_tqdm()(range(count), desc="segmenting", unit="photo")


def _outputs(photos: list[Path], kinds: list[str], output: str | None, force: bool) -> list[tuple[Path, ...]]:
    """Where each photo's mask and pictures go; every name checked before the first is computed."""
    folder = Path("out" if output is None else output)
    if folder.suffix.lower() == ".png":
        if len(photos) > 1:
            raise UserError(
                f"--output {output}: one file for {len(photos)} photos; give a folder, or leave it out"
            )
        paths = [[folder], *([folder.with_suffix(f".{kind}.png")] for kind in kinds[1:])]
    elif folder.suffix and not os.path.isdir(folder):
        raise UserError(f"--output {output}: expected a name ending in .png, or a folder")
    else:
        paths = [[folder / f"{photo.stem}.{kind}.png" for photo in photos] for kind in kinds]
    for photo in photos:
        existing(photo)
    for of_a_kind in paths:
        claim_each(of_a_kind, photos, force=force)
    for path in itertools.chain(*paths):
        if any(path.exists() and os.path.samefile(path, photo) for photo in photos):
            raise UserError(f"{path}: the result would replace the photo itself")
    return list(zip(*paths, strict=True))
