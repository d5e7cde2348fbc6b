"""How far a network's output pixels look: measured, by an image some of whose pixels are not a number.

A NaN spreads to whatever is computed from it, also through weights and activations that are 0: no chance of
random values is involved, as there would be in a gradient.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from segfast.models import UNet
from segfast.models._base import main_scores

from ._windows import Reach, tiles

# Images for measuring are strips, for their cost: so high, and ever longer until one shows the whole reach.
STRIP = 64
LENGTHS_OF_STRIPS = (256, 512, 1024, 2048, 4096)
# Two of whose lengths the features' lengths are compared; their difference is a multiple of many strides.
LENGTHS = (256, 256 + 960)
# Tiles are right if their scores are those of the whole strip to this share of the largest.
TOLERANCE = 1e-3


class NoReach(ValueError):
    """The network's output pixels look at the whole image, or depend on its size."""


def measure_reach(model: nn.Module, channels: int) -> Reach:
    """The reach of the output pixels of `model`, found by running it on a few narrow images.

    Args:
        model: `[N, channels, H, W]` -> `[N, K, H, W]`, or a dictionary with that under "out", for any H and W
            from 64 on; or a `UNet`, whose reach is known. Its mode is left as it was.
        channels: of its images.

    Raises:
        NoReach: there is none, such as where a layer pools the whole image; the message names it.
        ValueError: the model does not run on such images, its scores have another size or are not finite.
    """
    if isinstance(model, UNet):
        return _reach_of_unet(model)
    with evaluating(model), torch.no_grad():
        stride = _stride(model, channels)
        margin = max(_margin(model, channels, stride, upright) for upright in (False, True))
        for rounded in (False, True):
            reach = Reach(margin, stride, rounded=rounded)
            if _holds(model, channels, reach):
                return reach
    raise NoReach(
        "a pixel's scores depend on the image's size, as after an interpolation with align_corners=True: "
        "tiles cannot give exactly the whole image's"
    )


def measure_stride(model: nn.Module, channels: int) -> int:
    """The pixels of the image that become one in the coarsest features of `model` (see `measure_reach`).

    Raises:
        ValueError: as `measure_reach`.
    """
    if isinstance(model, UNet):
        return model.size_divisor
    with evaluating(model), torch.no_grad():
        return _stride(model, channels)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_scores(model: nn.Module, images: Tensor) -> Tensor:
    """The scores of images `[N, C, H, W]`, in the model's dtype and on its device."""
    like = next(model.parameters(), images)
    return main_scores(model(images.to(like.device, like.dtype)))


def _reach_of_unet(model: UNet) -> Reach:
    stride, margin = model.size_divisor, model.margin
    if not model.padded:
        return Reach(margin, stride, shrinks=True)
    margin = -(-margin // stride) * stride + stride
    # The convolutions after its upsampling look a pixel further at every level.
    return Reach(margin + 2 * stride * (model.config["up"] == "upsample"), stride)


def _stride(model: nn.Module, channels: int) -> int:
    """The least common multiple of what all layers' maps shrink by."""
    short, long = (_lengths_of_maps(model, channels, length) for length in LENGTHS)
    grown = LENGTHS[1] - LENGTHS[0]
    stride = 1
    for place in short.keys() & long.keys():
        # Padding makes a map longer, but not by more where the image is longer.
        longer = long[place] - short[place]
        if longer > 0 and grown % longer == 0:
            stride = math.lcm(stride, grown // longer)
    return stride


def _lengths_of_maps(model: nn.Module, channels: int, length: int) -> dict[tuple[str, int, int, int], int]:
    """Height and width of what goes into and out of each layer, by its name and its call's number."""
    found: dict[tuple[str, int, int, int], int] = {}
    calls: Counter[str] = Counter()

    def see(name: str, *sides: Any) -> None:
        maps = [t for t in tree_leaves(sides) if isinstance(t, Tensor) and t.dim() == 4]
        calls[name] += 1
        for index, each in enumerate(maps):
            found[name, calls[name], index, 2], found[name, calls[name], index, 3] = each.shape[2:]

    with _watched(model, see):
        _strip_scores(model, _random_strip(channels, length), finite=True)
    return found


@contextmanager
def _watched(model: nn.Module, see: Callable[..., None]) -> Iterator[None]:
    """Call `see` with each layer's name, arguments and output, that of a layer within another first."""

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, args, output)

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _margin(model: nn.Module, channels: int, stride: int, upright: bool) -> int:
    """How many pixels away from a block of `stride` ones scores still change, a multiple of `stride`."""
    pooled: list[str] = []
    for length in (-(-length // stride) * stride for length in LENGTHS_OF_STRIPS):
        start = length // 2 // stride * stride
        strip = _random_strip(channels, length)
        strip[..., start : start + stride] = math.nan
        pooled.clear()
        with _watched(model, lambda *seen: pooled.extend(_pooling(model, *seen))):
            scores = _strip_scores(model, strip, upright)
        reached = scores.isnan().any(2).flatten(0, 1).any(0).nonzero().flatten().tolist()
        if not reached:
            raise NoReach("the model replaces pixels that are not a number: how far it looks is not seen")
        if reached[0] > 0 and reached[-1] < length - 1:
            margin = max(start - reached[0], reached[-1] - (start + stride - 1), 0)
            return -(-margin // stride) * stride
    name = f"{pooled[0]} looks" if pooled else "a pixel's scores look further than 2000 pixels,"
    raise NoReach(f"{name} at the whole image: tiles cannot give exactly the whole image's scores")


def _pooling(model: nn.Module, name: str, args: Any, output: Any) -> list[str]:
    """The layer's name, if it makes of a map partly of NaN one of nothing else."""
    before, after = (
        [t.isnan().any(1) for t in tree_leaves(side) if isinstance(t, Tensor) and t.dim() > 2]
        for side in (args, output)
    )
    if not (any(nan.any() and not nan.all() for nan in before) and after and all(nan.all() for nan in after)):
        return []
    return [f"{name} ({type(model.get_submodule(name)).__name__})" if name else "the model"]


def _holds(model: nn.Module, channels: int, reach: Reach) -> bool:
    """True if tiles have the whole strip's scores, also where its length is no multiple of the stride."""
    step = reach.margin + 2 * reach.stride
    length = 4 * step
    odd = length + reach.stride // 2 + (reach.stride > 2)
    for upright in (False, True):
        for strip in (_random_strip(channels, n) for n in ((length,) if reach.rounded else (length, odd))):
            strip = strip.mT if upright else strip

            def run(images: Tensor) -> Tensor:
                return run_scores(model, images)

            (whole,) = tiles(run, strip[0], max(strip.shape[2:]), 0, reach)
            error = max(
                (tile.scores - whole.scores[:, tile.rows, tile.columns]).abs().max().item()
                for tile in tiles(run, strip[0], step, 0, reach)
            )
            if not error <= TOLERANCE * whole.scores.abs().max().item():
                return False
    return True


def _random_strip(channels: int, length: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.rand(1, channels, STRIP, length, generator=generator, dtype=torch.float32, device="cpu")


def _strip_scores(model: nn.Module, strip: Tensor, upright: bool = False, finite: bool = False) -> Tensor:
    """The scores of a strip, lying as it does; the model sees it upright if told to."""
    images = strip.mT.contiguous() if upright else strip
    size = f"{images.shape[2]}x{images.shape[3]}"
    try:
        scores = run_scores(model, images)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the model cannot be measured on an image of {size}: {type(error).__name__}: {reason}"
        ) from error
    if scores.dim() != 4 or scores.shape[2:] != images.shape[2:]:
        raise ValueError(
            f"of an image of {size} expected scores [1, K, {images.shape[2]}, {images.shape[3]}], "
            f"got shape {list(scores.shape)}"
        )
    if finite and not scores.isfinite().all():
        raise ValueError("the model's scores of an image with values in [0, 1] are not finite")
    return scores.mT if upright else scores
