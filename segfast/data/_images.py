"""Image files to tensors and back: PNG, TIFF and JPEG through pillow, arrays through `.npz`."""

import contextlib
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segfast._errors import UserError
from segfast._files import atomic_write

IGNORE_INDEX = 255
SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".npz")

# What a viewer shows for class 0, 1, 2, ... of a mask: black, white, then the colors of Okabe and Ito; for
# class 8 and on the same again.
PALETTE = [*bytes.fromhex("000000 ffffff e69f00 56b4e9 009e73 f0e442 0072b2 d55e00")]
# A PNG's kind of pixels: indices into its palette.
PNG_PALETTE = 3
# Of an image's values: those that become 0 and 1.
PERCENTILES = (1, 99.8)


def normalize(image: np.ndarray) -> Tensor:
    """Stretch the 1st to 99.8th percentile of each channel to [0, 1] and clip.

    Args:
        image: `[C, H, W]`, any real dtype, any scale.

    Returns:
        float32 `[C, H, W]`; a constant channel becomes 0.
    """
    values = image.astype(np.float32)
    low, high = np.percentile(values, PERCENTILES, axis=(1, 2), keepdims=True)
    span = np.where(high > low, high - low, 1)
    return torch.from_numpy(((values - low) / span).clip(0, 1).astype(np.float32))


def read_image(path: str | os.PathLike, channels: int = 1) -> Tensor:
    """Read an image as `[channels, H, W]` float32 in [0, 1] (see `normalize`).

    Gray images are repeated to three channels, color images are averaged (ITU-R 601 luma) to one;
    an alpha channel is dropped. Of an `.npz` the array named `image`, or the only one, is taken, `[H, W]`
    or `[C, H, W]`.

    Raises:
        UserError: no such file, not an image, several pages, empty, not finite, or no way to `channels`
            channels.
    """
    return normalize(_read_channels(path, channels)[0])


def read_colors(path: str | os.PathLike, channels: int = 3) -> Tensor:
    """Read an image as `[channels, H, W]` float32 in 0..255, whose differences a dense CRF looks at.

    8-bit images as they are, others normalized; else as `read_image`.
    """
    array, as_it_is = _read_channels(path, channels)
    return torch.from_numpy(array.astype(np.float32)) if as_it_is else 255 * normalize(array)


def _read_channels(path: str | os.PathLike, channels: int) -> tuple[np.ndarray, bool]:
    """The pixels `[channels, H, W]`, and whether the file has them in 8 bits."""
    array = _read_array(path, "image")
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise UserError(f"{path}: expected an image [H, W] or [C, H, W], got shape {list(array.shape)}")
    in_8_bits = array.dtype == np.uint8
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise UserError(f"{path}: expected integer or floating-point pixels, got {array.dtype}")
    if not np.isfinite(array).all():
        raise UserError(f"{path}: the image has pixels that are not finite (NaN or infinity)")
    if len(array) == 3 and channels == 1:
        array = np.tensordot([0.299, 0.587, 0.114], array, axes=1)[None]
    elif len(array) == 1:
        array = np.repeat(array, channels, axis=0)
    if len(array) != channels:
        raise UserError(f"{path}: the image has {len(array)} channels, the network takes {channels}")
    return array, in_8_bits


def read_mask(
    path: str | os.PathLike,
    foreground: bool = False,
    ignore: int | None = None,
    from_colors: Callable[[np.ndarray, Path], Tensor] | None = None,
) -> Tensor:
    """Read a mask of class indices as int64 `[H, W]`; 255 means "do not score this pixel".

    Args:
        path: a single-channel image, a palette image, or an `.npz` with an array `labels` (or only one).
        foreground: take the mask as instances, or as 0/255: every value above 0 is class 1.
        ignore: one more value that means "do not score".
        from_colors: makes class indices of a color image, uint8 `[3, H, W]`, as `ClassList.labels` does.

    Raises:
        UserError: as `read_image`; also for color images without `from_colors`, negative or fractional
            values, values above 255.
    """
    array = _read_array(path, "labels", mask=True)
    if array.ndim == 3 and len(array) == 3 and from_colors is not None and array.dtype == np.uint8:
        return from_colors(array, Path(path))
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"{path}: expected a mask [H, W] of class indices, got shape {list(array.shape)}")
    if array.dtype != bool and not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{path}: expected integer class indices, got {array.dtype}")
    labels = torch.from_numpy(array.astype(np.int64))
    unscored = torch.zeros_like(labels, dtype=torch.bool) if ignore is None else labels == ignore
    if foreground:
        return (labels > 0).long().masked_fill(unscored, IGNORE_INDEX)
    labels = labels.masked_fill(unscored, IGNORE_INDEX)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > IGNORE_INDEX:
        raise UserError(
            f"{path}: expected class indices 0 to 254 (255 is ignored), got {low} to {high}; "
            "--foreground takes every value above 0 as class 1"
        )
    if ignore is None and high == IGNORE_INDEX and not ((labels > 0) & (labels < IGNORE_INDEX)).any():
        raise UserError(
            f"{path}: the mask holds only 0 and 255, and 255 means 'do not score'; "
            "--foreground takes every value above 0 as class 1"
        )
    return labels


def read_values(path: str | os.PathLike) -> Tensor:
    """Read real values, a target to regress, as float32 `[H, W]` or `[K, H, W]`; NaN is not known.

    Args:
        path: a single-channel image of any depth, or an `.npz` with an array `values` (or only one).

    Raises:
        UserError: no such file, not an image, empty, infinite, or another shape or dtype.
    """
    array = _read_array(path, "values", mask=True)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(f"{path}: expected real values [H, W] or [K, H, W], got shape {list(array.shape)}")
    if array.dtype.kind not in "uif" or np.isinf(array).any():
        raise UserError(f"{path}: expected finite real values or NaN, got {array.dtype} with others")
    return torch.from_numpy(array.astype(np.float32))


def palette_of(path: str | os.PathLike, count: int) -> list[tuple[int, int, int]] | None:
    """The first `count` colors of a palette image; None of another file, or if there are fewer."""
    path = existing(path)
    if path.suffix.lower() == ".npz":
        return None
    with opened(path) as image:
        flat = (image.getpalette() or []) if image.mode == "P" else []
    colors = [tuple(flat[i : i + 3]) for i in range(0, min(len(flat), 3 * count), 3)]
    return colors if len(colors) == count else None


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width of an image, from its file's header where it has one.

    Raises:
        UserError: no such file, not an image, several pages.
    """
    path = existing(path)
    if path.suffix.lower() == ".npz":
        shape = _read_npz(path, "image").shape
        if len(shape) < 2:
            raise UserError(f"{path}: expected an image [H, W] or [C, H, W], got shape {list(shape)}")
        return shape[-2], shape[-1]
    with opened(path) as image:
        _check_pages(path, image)
        return image.height, image.width


def write_mask(path: str | os.PathLike, labels: Tensor) -> None:
    """Write class indices `[H, W]` (0 to 255) as a palette PNG: colors to a viewer, indices to a reader."""
    with mask_writer(path, *labels.shape) as add:
        add(labels)


@contextlib.contextmanager
def mask_writer(path: str | os.PathLike, height: int, width: int) -> Iterator[Callable[[Tensor], None]]:
    """As `write_mask`, but yield a function that takes the next rows `[h, W]`, until there are `height`.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:

        def chunk(kind: bytes, content: bytes) -> None:
            check = zlib.crc32(kind + content)
            file.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check))

        def add(labels: Tensor) -> None:
            rows = np.zeros((len(labels), 1 + width), np.uint8)  # before each row 0: it is not filtered
            rows[:, 1:] = labels.to(torch.uint8).cpu().numpy()
            if packed := packer.compress(rows.data):
                chunk(b"IDAT", packed)

        packer = zlib.compressobj()
        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, PNG_PALETTE, 0, 0, 0))
        chunk(b"tEXt", b"Software\0segfast")  # see `segfast.commands._output`
        chunk(b"PLTE", bytes((PALETTE * 32)[: 3 * 256]))
        yield add
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")


def save_png(image: Any, path: str | os.PathLike) -> None:
    """Write a pillow image as PNG, marked as ours (see `segfast.commands._output`)."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("Software", "segfast")
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def _read_array(path: str | os.PathLike, name: str, mask: bool = False) -> np.ndarray:
    """The file's pixels, `[H, W]` or `[C, H, W]`."""
    path = existing(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)}")
    if path.suffix.lower() == ".npz":
        return _read_npz(path, name)
    with opened(path) as image:
        _check_pages(path, image)
        array = np.array(image.convert(_plain_mode(image.mode, mask)))
    return array if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _check_pages(path: Path, image: Any) -> None:
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise UserError(f"{path}: the file has {pages} pages, expected one")


def existing(path: str | os.PathLike) -> Path:
    """`path`, which must be a file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, pillow warns of nothing: what cannot be read becomes one error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file as a pillow image; whatever goes wrong while it is read becomes a UserError."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            f"{path}: reading images needs the package pillow (the extra 'demo' has it)"
        ) from error
    try:
        with quiet():
            image = Image.open(path)
        with image:
            yield image
    except UserError:
        raise
    except Exception as error:  # pillow raises many kinds: OSError, SyntaxError, DecompressionBombError, ...
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason})") from error


def _plain_mode(mode: str, mask: bool) -> str:
    """The pillow mode to read an image of mode `mode` as: gray or RGB, of any depth."""
    if mode == "LA":
        return "L"
    # A palette's indices are the classes of a mask, its colors an image.
    if mode in ("PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV") or (mode == "P" and not mask):
        return "RGB"
    return mode


def _read_npz(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            key = name if name in archive.files else archive.files[0] if len(archive.files) == 1 else None
            if key is None:
                raise UserError(f"{path}: no array named {name!r}, the file has {sorted(archive.files)}")
            return archive[key]
    except UserError:
        raise
    except Exception as error:  # zipfile.BadZipFile, ValueError, OSError, zlib.error, ...
        raise UserError(f"{path}: not a readable .npz ({str(error).splitlines()[0]})") from error
