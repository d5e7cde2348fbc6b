"""Whole images through a network, of any size, in overlapping tiles where they are large."""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from segfast.models import UNet
from segfast.models._base import main_scores

MAX_TILE = 1024
Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def predict_scores(model: nn.Module, image: Tensor, tile: int = MAX_TILE) -> Tensor:
    """Class scores of one image, float32 `[K, H, W]`, on the CPU; the model is left in the mode it was in.

    An unpadded `UNet` sees the image mirrored beyond its border (Ronneberger et al. 2015, figure 2). Images
    larger than `tile` go through in tiles whose overlap covers what an output pixel looks at, so the result
    is that of the whole image up to rounding; models other than `UNet` are run whole.

    Args:
        model: `[N, C, H, W]` -> `[N, K, H, W]`, or a dictionary with that under "out", or an unpadded `UNet`.
        image: `[C, H, W]`.
        tile: largest side, in pixels, computed at once.
    """
    training = model.training
    model.eval()
    try:
        if not isinstance(model, UNet):
            return _run(model, image)
        source = image if model.padded else _mirror(model, image)
        return _tiles(model, source, image.shape[-2:], tile)
    finally:
        model.train(training)


def predict(model: nn.Module, image: Tensor, tile: int = MAX_TILE) -> Tensor:
    """Class of every pixel, int64 `[H, W]`, on the CPU (see `predict_scores`)."""
    return predict_scores(model, image, tile).argmax(0)


def channels_last(model: Module) -> Module:
    """The model with its weights in channels_last, which its activations then follow."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _run(model: nn.Module, image: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return main_scores(model(image[None].to(device)))[0].float().cpu()


def _mirror(model: UNet, image: Tensor) -> Tensor:
    """The image with its mirror images around it: `margin` and whatever makes every pooling come out even."""
    margin, divisor = model.margin, model.size_divisor
    pads = [(0, 0)]
    for length in image.shape[-2:]:
        # The smallest output is 4; others differ from it by multiples of the divisor.
        steps = max(0, -(-(length - 4) // divisor))
        pads.append((margin, 4 + steps * divisor - length + margin))
    return torch.from_numpy(np.pad(image.cpu().numpy(), pads, mode="symmetric"))


def _tiles(model: UNet, source: Tensor, size: torch.Size, tile: int) -> Tensor:
    """Fill `[K, *size]` tile by tile; around an unpadded network's `source` lies its margin."""
    divisor = model.size_divisor
    step = max(divisor, tile // divisor * divisor)
    output: Tensor | None = None
    for top in range(0, size[0], step):
        for left in range(0, size[1], step):
            region = tuple(
                slice(start, min(start + step, n)) for start, n in zip((top, left), size, strict=True)
            )
            scores = _tile(model, source, size, region)
            if output is None:
                output = scores.new_empty(len(scores), *size)
            output[(slice(None), *region)] = scores
    assert output is not None
    return output


def _tile(model: UNet, source: Tensor, size: torch.Size, region: tuple[slice, ...]) -> Tensor:
    divisor, margin = model.size_divisor, model.margin
    window, inner = [], []
    for span, length, stored in zip(region, size, source.shape[-2:], strict=True):
        if model.padded:
            # Starts on multiples of the divisor keep the poolings where they are in the whole image.
            halo = -(-margin // divisor) * divisor + divisor
            if model.config["up"] == "upsample":
                halo += 2 * divisor  # its convolutions look a pixel further at every level
            start = max(0, span.start - halo)
            window.append(slice(start, min(length, span.stop + halo)))
            inner.append(slice(span.start - start, span.stop - start))
        else:
            # Output sizes are 4 more than a multiple of the divisor, as in `_mirror`.
            stop = stored if span.stop == length else span.stop + 2 * margin + 4
            window.append(slice(span.start, stop))
            inner.append(slice(0, span.stop - span.start))
    return _run(model, source[(slice(None), *window)])[(slice(None), *inner)]
