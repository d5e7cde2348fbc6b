"""Random crops with flips, rotation, elastic deformation and intensity changes."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segfast.data import Sample

# Of the coarse displacement grid, in pixels: standard deviation of a node's move, distance of the nodes.
ELASTIC_SIGMA = 4.0
ELASTIC_SPACING = 32


class PatchSampler:
    """Draws augmented batches from a list of samples; equal seeds draw equal batches.

    A patch is read through a grid: a random center, a rotation by any angle, a flip, a scale of 0.8 to 1.25,
    and smooth displacements interpolated from a coarse grid (Ronneberger et al. 2015, section 3.1). The
    image is read bilinearly, as are real values, the classes to the nearest pixel, beyond the border by
    reflection. Then gain, offset and gamma of the intensities are changed and noise is added.

    Args:
        samples: images `[C, H, W]` in [0, 1] with classes `[H, W]`, or real values `[H, W]` or `[K, H, W]`;
            of any sizes.
        size: height and width of a patch, pixels.
        batch_size: patches a batch.
        seed: of the generator, which lives on the CPU.
        augment: False takes random crops only.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        size: int = 128,
        batch_size: int = 4,
        seed: int = 0,
        augment: bool = True,
    ) -> None:
        self.samples = list(samples)
        self.size = size
        self.batch_size = batch_size
        self.augment = augment
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """A batch: float32 `[N, C, size, size]` and int64 `[N, size, size]`, or real values in float32."""
        images, targets = zip(*(self._patch() for _ in range(self.batch_size)), strict=True)
        return torch.stack(images), torch.stack(targets)

    def _uniform(self, low: float, high: float) -> float:
        draw = torch.rand((), generator=self.generator, dtype=torch.float32, device="cpu")
        return low + (high - low) * draw.item()

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")

    def _below(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self.generator, device="cpu"))

    def _patch(self) -> Sample:
        index = self._below(len(self.samples))
        image, target = self.samples[index]
        grid = self._grid(*target.shape[-2:])[None]
        patch = _read(image, grid, "bilinear")
        patch = self._intensity(patch) if self.augment else patch
        planes = target.reshape(-1, *target.shape[-2:]).float()
        if target.is_floating_point():
            values = _read(planes, grid, "bilinear")
        else:
            # Classes as floating point: exact up to 2**24.
            values = _read(planes, grid, "nearest").long()
        return Sample(patch, values.reshape(*target.shape[:-2], *values.shape[-2:]))

    def _grid(self, height: int, width: int) -> Tensor:
        """Where each pixel of a patch is read, `[size, size, 2]`, x and y in [-1, 1] over the image."""
        offsets = torch.arange(self.size, dtype=torch.float32, device="cpu") - (self.size - 1) / 2
        y, x = torch.meshgrid(offsets, offsets, indexing="ij")
        if self.augment:
            angle, scale = self._uniform(0, 2 * math.pi), 2 ** self._uniform(-0.32, 0.32)
            flip = 1 if self._uniform(0, 1) < 0.5 else -1
            displacement = self._displacement()
            x, y = flip * x + displacement[0], y + displacement[1]
            cos, sin = scale * math.cos(angle), scale * math.sin(angle)
            x, y = cos * x - sin * y, sin * x + cos * y
        x = x + self._center(width)
        y = y + self._center(height)
        return torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)

    def _center(self, length: int) -> float:
        """A center that keeps an unrotated patch inside, on whole pixels; the middle if it does not fit."""
        half = (self.size - 1) / 2
        room = length - self.size
        if room <= 0:
            return (length - 1) / 2
        return half + self._below(room + 1)

    def _displacement(self) -> Tensor:
        nodes = max(2, self.size // ELASTIC_SPACING + 1)
        coarse = ELASTIC_SIGMA * self._normal((1, 2, nodes, nodes))
        return F.interpolate(coarse, size=(self.size, self.size), mode="bicubic", align_corners=True)[0]

    def _intensity(self, patch: Tensor) -> Tensor:
        gain, offset, gamma = (
            self._uniform(0.8, 1.25),
            self._uniform(-0.05, 0.05),
            2 ** self._uniform(-0.5, 0.5),
        )
        noise = self._uniform(0, 0.03) * self._normal(patch.shape)
        return gain * patch.clamp(0, 1) ** gamma + offset + noise


def _read(image: Tensor, grid: Tensor, mode: str) -> Tensor:
    return F.grid_sample(image[None], grid, mode=mode, padding_mode="reflection", align_corners=False)[0]


def center_crop(target: Tensor, size: Sequence[int]) -> Tensor:
    """The middle `size` of the last two dimensions: the classes of an unpadded network's output."""
    top, left = ((have - want) // 2 for have, want in zip(target.shape[-2:], size, strict=True))
    return target[..., top : top + size[0], left : left + size[1]]
