"""Photos as a camera or a phone leaves them, and pictures as PNG."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segfast._errors import UserError

from ._images import existing, opened, save_png


def read_photo(path: str | os.PathLike) -> Tensor:
    """Read any image that pillow opens, as a viewer shows it: uint8 RGB `[3, H, W]`.

    Turned as its EXIF orientation says; transparent pixels over white; of several frames the first. 16-bit
    gray keeps its scale (65535 is white); 32-bit and floating-point gray, which have none, are stretched from
    their least to their largest value.

    Raises:
        UserError: no such file, not an image, or pixels that are not finite.
    """
    path = existing(path)
    with opened(path) as image:
        from PIL import ImageOps

        rgb = _to_rgb(ImageOps.exif_transpose(image), path)
    return torch.from_numpy(np.array(rgb)).movedim(-1, 0)


def write_image(path: str | os.PathLike, image: Tensor) -> None:
    """Write uint8 `[H, W]` (gray) or `[3, H, W]` (RGB) as PNG."""
    from PIL import Image

    array = image if image.dim() == 2 else image.movedim(0, -1)
    save_png(Image.fromarray(array.contiguous().cpu().numpy()), path)


def _to_rgb(image: Any, path: os.PathLike) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"{path}: the image has pixels that are not finite (NaN or infinity)")
        low, high = values.min(), values.max()
        gray = (values - low) * (255 / (high - low) if high > low else 0)
        return Image.fromarray(gray.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
