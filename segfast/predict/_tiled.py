"""A network over images of any size: whole, in tiles with exactly the whole image's scores, or blended."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.models import UNet

from ._reach import NoReach, evaluating, measure_reach, measure_stride, run_scores
from ._windows import Reach, Tile, tile_count, tiles

METHODS = ("auto", "exact", "blend")
AVERAGES = ("scores", "probabilities")
# The dimensions that are flipped, beside none.
FLIPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": (),
    "horizontal": ((-1,),),
    "vertical": ((-2,),),
    "both": ((-1,), (-2,), (-2, -1)),
}
# Without overlap=, tiles that are blended share this part of their side.
USUAL_OVERLAP = 4


class TiledPredictor:
    """A network that runs over images of any size in tiles, in memory that the tile's size decides.

    An image whose sides are no longer than a tile is run whole. Larger ones:

    - "exact": of each tile the network sees a window larger by its `Reach`, which is measured at the first
      such image, and the tile has the scores that the whole image would give it, up to rounding. Networks
      that look at the whole image, such as one with image pooling, have no reach and are refused.
    - "blend": the network sees the tile alone, and where neighbors overlap their scores fade into each other
      along a cosine. This runs for any network; at a tile's border it knows nothing of what lies beyond.
    - "auto": "exact" where there is a reach, else "blend".

    Args:
        model: `[N, C, H, W]` -> `[N, K, H, W]`, or a dictionary with that under "out", or an unpadded `UNet`,
            for which images are mirrored at their borders. Its modules keep the mode they are in.
        tile: side of a tile, pixels; a multiple of the network's stride. Of "exact" the window is larger.
        method: see above.
        overlap: pixels that neighboring tiles share, of "blend": a multiple of the stride, at most half a
            tile (a quarter of the tile).
        flips: scores are averaged over the image and its mirror images: "none", "horizontal", "vertical" or
            "both", which are three. Exact tiles are then those of the image mirrored up to a multiple of the
            stride.
        scales: the image's sizes to average over, 1 being its own; others than 1 are not for exact tiles.
        average: of "scores", or "probabilities" (softmax; of a single class the sigmoid), which then are what
            is returned, without flips and scales too.

    Raises:
        ValueError: an argument out of range; when called, as described there.
    """

    def __init__(
        self,
        model: nn.Module,
        tile: int = 1024,
        *,
        method: str = "auto",
        overlap: int | None = None,
        flips: str = "none",
        scales: Sequence[float] = (1.0,),
        average: str = "scores",
    ) -> None:
        for name, value, known in (
            ("method", method, METHODS),
            ("flips", flips, tuple(FLIPS)),
            ("average", average, AVERAGES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if tile < 1:
            raise ValueError(f"tile must be at least 1, got {tile}")
        if overlap is not None and not 0 <= 2 * overlap <= tile:
            raise ValueError(f"overlap must be from 0 to half of tile={tile}, {tile // 2}; got {overlap}")
        if overlap is not None and method == "exact":
            raise ValueError(
                f"overlap is of method='blend', got {overlap} with method='exact', which measures its own"
            )
        if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise ValueError(f"scales must be positive numbers, at least one; got {tuple(scales)}")
        if method == "exact" and any(scale != 1 for scale in scales):
            raise ValueError(f"scales other than 1 are not for method='exact', got {tuple(scales)}")
        self.model, self.tile, self.method, self.overlap = model, tile, method, overlap
        self.flips, self.scales, self.average = flips, tuple(scales), average
        self._found: tuple[Reach, int] | None = None

    def __call__(self, image: Any) -> Iterator[Tile]:
        """The scores of an image, tile by tile, from left to right and from top to bottom.

        Args:
            image: `[C, H, W]`, floating point: a tensor, an array that may be memory-mapped, or an object
                with `shape` that returns either for `image[:, rows, columns]`. Read window by window.

        Yields:
            `Tile`s that cover the image, each pixel once.

        Raises:
            ValueError: `image` is not `[C, H, W]`, or empty; with an image larger than a tile, `tile` or
                `overlap` is not a multiple of the network's stride, or the network cannot be measured.
            NoReach: a ValueError: of `method="exact"`, the network looks at the whole image.
        """
        if len(image.shape) != 3 or 0 in image.shape:
            raise ValueError(f"image must be [C, H, W] and not empty, got shape {list(image.shape)}")
        reach, overlap = self._plan(image)
        return self._run_tiles(image, reach, overlap)

    def count(self, image: Any) -> int:
        """How many tiles there are of an image (see `__call__`, whose errors it raises)."""
        _, overlap = self._plan(image)
        return tile_count(tuple(image.shape[1:]), self.tile, overlap)

    def _run_tiles(self, image: Any, reach: Reach, overlap: int) -> Iterator[Tile]:
        found = tiles(self._average, image, self.tile, overlap, reach)
        while True:
            # Between two tiles the caller's model is in its own mode.
            with evaluating(self.model), torch.no_grad():
                tile = next(found, None)
            if tile is None:
                return
            yield tile

    def _plan(self, image: Any) -> tuple[Reach, int]:
        """The reach by which windows are cut, and the overlap."""
        shrinks = isinstance(self.model, UNet) and not self.model.padded
        if shrinks and any(scale != 1 for scale in self.scales):
            raise ValueError(f"scales other than 1 are for padded networks, got {self.scales}")
        if max(image.shape[1:]) <= self.tile:
            return (measure_reach(self.model, image.shape[0]) if shrinks else Reach(0, 1)), 0
        if self._found is None:
            self._found = self._measured(image.shape[0])
            stride, overlap = self._found[0].stride, self._found[1]
            for name, value in (("tile", self.tile), ("overlap", overlap)):
                if value % stride or (name == "tile" and value < stride):
                    nearest = max(stride, round(value / stride) * stride)
                    raise ValueError(
                        f"{name} must be a multiple of the network's stride, {stride}, got {value}; "
                        f"the nearest is {nearest}"
                    )
        return self._found

    def _measured(self, channels: int) -> tuple[Reach, int]:
        scaled = any(scale != 1 for scale in self.scales)
        if self.method == "exact" or (self.method == "auto" and self.overlap is None and not scaled):
            try:
                reach = measure_reach(self.model, channels)
                return reach._replace(rounded=reach.rounded or self.flips != "none"), 0
            except NoReach:
                if self.method == "exact":
                    raise
        stride = measure_stride(self.model, channels)
        if self.overlap is None:
            return Reach(0, stride, rounded=True), self.tile // (USUAL_OVERLAP * stride) * stride
        return Reach(0, stride, rounded=True), self.overlap

    def _average(self, images: Tensor) -> Tensor:
        """The scores of images, or their probabilities, averaged over flips and scales."""
        total: Tensor | None = None
        size = images.shape[2:]
        for scale in self.scales:
            scaled = _resized(images, [max(1, round(scale * side)) for side in size])
            for dims in ((), *FLIPS[self.flips]):
                scores = run_scores(self.model, scaled.flip(dims)).flip(dims).float()
                scores = scores if scale == 1 else _resized(scores, size)
                if self.average == "probabilities":
                    scores = scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(1)
                total = scores if total is None else total + scores
        assert total is not None
        return total / (len(self.scales) * (1 + len(FLIPS[self.flips])))


def predict_tiled(model: nn.Module, image: Any, tile: int = 1024, **options: Any) -> Tensor:
    """The class of every pixel, uint8 `[H, W]`, on the CPU: a byte a pixel beside the tiles in memory.

    Args:
        model, tile, options: of `TiledPredictor`.
        image: see `TiledPredictor.__call__`.

    Raises:
        ValueError: as `TiledPredictor`; more than 256 classes.

    >>> from segfast.models import UNet
    >>> labels = predict_tiled(UNet(width=2, depth=2), torch.rand(1, 70, 100), tile=32)
    >>> labels.shape, labels.dtype
    (torch.Size([70, 100]), torch.uint8)
    """
    predictor = TiledPredictor(model, tile, **options)
    labels = torch.empty(tuple(image.shape[1:]), dtype=torch.uint8, device="cpu")
    for rows, columns, scores in predictor(image):
        labels[rows, columns] = classes(scores, predictor.average)
    return labels


def classes(scores: Tensor, average: str = "scores") -> Tensor:
    """The class of the largest score, uint8 `[H, W]`, of `[K, H, W]`; of one class 1 where it is probable.

    Raises:
        ValueError: more than 256 classes.
    """
    if len(scores) > 256:
        raise ValueError(f"expected at most 256 classes, got {len(scores)}")
    if len(scores) == 1:
        return (scores[0] > (0.5 if average == "probabilities" else 0)).byte().cpu()
    return scores.argmax(0).byte().cpu()


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(size) == tuple(images.shape[2:]):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True)
