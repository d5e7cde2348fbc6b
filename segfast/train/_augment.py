"""Random crops with flips, rotation, scale, elastic deformation and changes of color."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segfast.data import Sample

AUGMENTATIONS = ("flip", "flip-vertical", "rotate", "scale", "elastic", "color")
# Of the coarse displacement grid, in pixels: standard deviation of a node's move, distance of the nodes.
ELASTIC_SIGMA = 4.0
ELASTIC_SPACING = 32


class PatchSampler:
    """Draws augmented patches from samples: each by its number, so that equal seeds draw equal ones.

    The samples come in a random order, each once, then in another, and so on. A patch is read through a grid:
    a random center, a rotation by any angle, flips, a scale of 0.8 to 1.25, and smooth displacements
    interpolated from a coarse grid (Ronneberger et al. 2015, section 3.1). The image is read bilinearly, as
    are real values, the classes to the nearest pixel, beyond the border by reflection. Then gain, offset and
    gamma of the intensities are changed, of colors also their saturation and each one's gain, and noise is
    added.

    Args:
        samples: images `[C, H, W]` in [0, 1] with classes `[H, W]`, or real values `[H, W]` or `[K, H, W]`;
            of any sizes.
        size: height and width of a patch, pixels.
        batch_size: patches a batch.
        seed: of all that is drawn.
        augment: True for all of `AUGMENTATIONS`, or some of them; False takes random crops only.

    Raises:
        ValueError: an augmentation of another name.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int = 128,
        batch_size: int = 4,
        seed: int = 0,
        augment: bool | Sequence[str] = True,
    ) -> None:
        self.samples = samples
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.augment = AUGMENTATIONS if augment is True else tuple(augment or ())
        if unknown := set(self.augment) - set(AUGMENTATIONS):
            raise ValueError(f"augment must be among {', '.join(AUGMENTATIONS)}, got {sorted(unknown)[0]!r}")
        self.drawn = 0
        self._order: tuple[int, Sequence[int]] | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The next batch: float32 `[N, C, size, size]` and int64 `[N, size, size]`, or real values."""
        numbers = range(self.drawn, self.drawn + self.batch_size)
        images, targets = zip(*map(self.patch, numbers), strict=True)
        self.drawn += self.batch_size
        return torch.stack(images), torch.stack(targets)

    def patch(self, number: int, instead: int = 0) -> Sample:
        """The patch of that number, counted from 0; of the sample so many places further, if not 0."""
        draw = _Draw(self.seed, 0, number)
        image, target = self.samples[self._index(number, instead)]
        grid = self._grid(draw, *target.shape[-2:])[None]
        patch = _read(image, grid, "bilinear")
        patch = _recolored(draw, patch) if "color" in self.augment else patch
        planes = target.reshape(-1, *target.shape[-2:]).float()
        if target.is_floating_point():
            values = _read(planes, grid, "bilinear")
        else:
            # Classes as floating point: exact up to 2**24.
            values = _read(planes, grid, "nearest").long()
        return Sample(patch, values.reshape(*target.shape[:-2], *values.shape[-2:]))

    def _index(self, number: int, instead: int) -> int:
        epoch, place = divmod(number, len(self.samples))
        if self._order is None or self._order[0] != epoch:
            generator = _Draw(self.seed, 1, epoch).generator
            order = torch.randperm(len(self.samples), generator=generator, device="cpu")
            self._order = epoch, order.tolist()
        return self._order[1][(place + instead) % len(self.samples)]

    def _grid(self, draw: "_Draw", height: int, width: int) -> Tensor:
        """Where each pixel of a patch is read, `[size, size, 2]`, x and y in [-1, 1] over the image."""
        offsets = torch.arange(self.size, dtype=torch.float32, device="cpu") - (self.size - 1) / 2
        y, x = torch.meshgrid(offsets, offsets, indexing="ij")
        if "flip" in self.augment and draw.uniform(0, 1) < 0.5:
            x = -x
        if "flip-vertical" in self.augment and draw.uniform(0, 1) < 0.5:
            y = -y
        if "elastic" in self.augment:
            displacement = self._displacement(draw)
            x, y = x + displacement[0], y + displacement[1]
        angle = draw.uniform(0, 2 * math.pi) if "rotate" in self.augment else 0.0
        scale = 2 ** draw.uniform(-0.32, 0.32) if "scale" in self.augment else 1.0
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        x, y = cos * x - sin * y, sin * x + cos * y
        x = x + self._center(draw, width)
        y = y + self._center(draw, height)
        return torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)

    def _center(self, draw: "_Draw", length: int) -> float:
        """A center that keeps an unrotated patch inside, on whole pixels; the middle if it does not fit."""
        half = (self.size - 1) / 2
        room = length - self.size
        if room <= 0:
            return (length - 1) / 2
        return half + draw.below(room + 1)

    def _displacement(self, draw: "_Draw") -> Tensor:
        nodes = max(2, self.size // ELASTIC_SPACING + 1)
        coarse = ELASTIC_SIGMA * draw.normal((1, 2, nodes, nodes))
        return F.interpolate(coarse, size=(self.size, self.size), mode="bicubic", align_corners=True)[0]


class _Draw:
    """Random numbers that depend on `key` alone, from a generator on the CPU."""

    def __init__(self, *key: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed_of(*key))

    def uniform(self, low: float, high: float) -> float:
        draw = torch.rand((), generator=self.generator, dtype=torch.float32, device="cpu")
        return low + (high - low) * draw.item()

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")

    def below(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self.generator, device="cpu"))


def seed_of(*key: int) -> int:
    """A seed for torch's generators, in which each number of `key` counts."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _recolored(draw: _Draw, patch: Tensor) -> Tensor:
    gain, offset, gamma = draw.uniform(0.8, 1.25), draw.uniform(-0.05, 0.05), 2 ** draw.uniform(-0.5, 0.5)
    noise = draw.uniform(0, 0.03) * draw.normal(patch.shape)
    patch = patch.clamp(0, 1)
    if len(patch) > 1:
        gray = patch.mean(0, keepdim=True)
        patch = (gray + draw.uniform(0.7, 1.3) * (patch - gray)).clamp(0, 1)
        patch = patch * (1 + 0.05 * draw.normal((len(patch), 1, 1)))
        patch = patch.clamp_min(0)
    return gain * patch**gamma + offset + noise


def _read(image: Tensor, grid: Tensor, mode: str) -> Tensor:
    return F.grid_sample(image[None], grid, mode=mode, padding_mode="reflection", align_corners=False)[0]


def center_crop(target: Tensor, size: Sequence[int]) -> Tensor:
    """The middle `size` of the last two dimensions: the classes of an unpadded network's output."""
    top, left = ((have - want) // 2 for have, want in zip(target.shape[-2:], size, strict=True))
    return target[..., top : top + size[0], left : left + size[1]]
