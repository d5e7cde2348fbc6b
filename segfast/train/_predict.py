"""Whole images through a network, of any size, in overlapping tiles where they are large."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from segfast.models import UNet
from segfast.predict._reach import evaluating, measure_reach, run_scores
from segfast.predict._windows import tiles

MAX_TILE = 1024
Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def predict_scores(model: nn.Module, image: Tensor, tile: int = MAX_TILE) -> Tensor:
    """Class scores of one image, float32 `[K, H, W]`, on the CPU; the model is left in the mode it was in.

    An unpadded `UNet` sees the image mirrored beyond its border (Ronneberger et al. 2015, figure 2). Images
    larger than `tile` go through in tiles whose overlap covers what an output pixel looks at, so the result
    is that of the whole image up to rounding; models other than `UNet` are run whole.
    `segfast.predict.TiledPredictor` takes these in tiles too.

    Args:
        model: `[N, C, H, W]` -> `[N, K, H, W]`, or a dictionary with that under "out", or an unpadded `UNet`.
        image: `[C, H, W]`.
        tile: largest side, in pixels, computed at once.
    """
    with evaluating(model):
        if not isinstance(model, UNet):
            return run_scores(model, image[None])[0].float().cpu()
        reach = measure_reach(model, len(image))
        step = max(1, tile // reach.stride) * reach.stride
        output: Tensor | None = None
        for rows, columns, scores in tiles(lambda x: run_scores(model, x), image, step, 0, reach):
            if output is None:
                output = torch.empty(len(scores), *image.shape[1:], dtype=torch.float32, device="cpu")
            output[:, rows, columns] = scores
        assert output is not None
        return output


def predict(model: nn.Module, image: Tensor, tile: int = MAX_TILE) -> Tensor:
    """Class of every pixel, int64 `[H, W]`, on the CPU (see `predict_scores`)."""
    return predict_scores(model, image, tile).argmax(0)


def channels_last(model: Module) -> Module:
    """The model with its weights in channels_last, which its activations then follow."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
