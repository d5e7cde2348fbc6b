"""The dense CRF's calls for `segfast tune`: ours by their launchers, and the same in PyTorch's operations."""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tune_layers import Call, Calls, Draw, Image

_THETAS = (80.0, 13.0)  # of places, of colours in 0..255
_GAMMA = (3.0, 3.0)
_TOLERANCE = 1e-2
_WEIGHT = 3.0


def _rows(image: Image, draw: Draw) -> Tensor:
    """Probabilities fp32 [B, H W, L]."""
    logits = torch.randn(
        image.batch, image.height * image.width, image.labels, device=draw.device, generator=draw.generator
    )
    return logits.softmax(2)


def _features(image: Image, draw: Draw) -> Tensor:
    """fp32 [B, H W, 5]: places, and smooth blobs of colour with noise, about as alike as a photograph's."""
    size, (alpha, beta) = (image.height, image.width), _THETAS
    colours = 255 * torch.rand(image.batch, 3, 12, 12, device=draw.device, generator=draw.generator)
    noise = torch.randn(image.batch, 3, *size, device=draw.device, generator=draw.generator)
    colours = F.interpolate(colours, size, mode="bicubic") + 4 * noise
    y, x = torch.meshgrid(*(torch.arange(n, device=draw.device) / alpha for n in size), indexing="ij")
    places = torch.stack([x, y]).expand(image.batch, -1, -1, -1)
    return torch.cat([places, colours.clamp(0, 255) / beta], 1).flatten(2).transpose(1, 2).contiguous()


def _each(make: Callable[[Tensor], Callable[[Tensor], Tensor]], features: Tensor, values: Tensor) -> Call:
    """Images one by one, by filters that the first call makes."""
    filters = cache(lambda: [make(points) for points in features])
    return lambda: torch.stack([run(v) for run, v in zip(filters(), values, strict=True)])


def _gaussian_filter(image: Image, draw: Draw) -> Calls:
    """The sums over the pairs that the lists hold; the unpacking counts as well."""
    from .kernels import build_exact, exact_filter, exact_pack, exact_unpack
    from .ops.dense_crf.exact import AllPairsFilter

    features, values = _features(image, draw), _rows(image, draw)
    pairs = build_exact(features, _TOLERANCE, True)
    packed = exact_pack(pairs, values)

    def ours() -> Call:
        return partial(exact_unpack, pairs, exact_filter(pairs, packed), image.labels)

    return Calls(ours, _each(AllPairsFilter, features, values))


def _permutohedral_filter(image: Image, draw: Draw) -> Calls:
    from .kernels import build_permutohedral, permutohedral_blur, permutohedral_slice
    from .ops.dense_crf.lattice import Lattice, LatticeFilter

    features, values = _features(image, draw), _rows(image, draw)
    lattice = build_permutohedral(features)
    return Calls(
        lambda: permutohedral_slice(lattice, permutohedral_blur(lattice, values)),
        _each(lambda points: LatticeFilter(Lattice(points)), features, values),
    )


def _spatial_gaussian(image: Image, draw: Draw) -> Calls:
    from .kernels import spatial_gaussian
    from .ops.dense_crf.exact import SeparableFilter

    size, values = (image.height, image.width), _rows(image, draw)
    aten = SeparableFilter(size, _GAMMA, values)
    return Calls(partial(spatial_gaussian, values, size, _GAMMA), lambda: aten(values))


def _mean_field_update(image: Image, draw: Draw) -> Calls:
    from .kernels import Message, mean_field_update

    unary = draw(image.batch, image.labels, image.height, image.width)
    values = [_rows(image, draw) for _ in range(2)]
    messages = tuple(Message("raster", rows, compatibility=_WEIGHT) for rows in values)

    def ours() -> Tensor:
        q = torch.empty_like(values[0])
        mean_field_update(unary, messages, q=q)
        return q

    def aten() -> Tensor:
        logits = -unary.float().flatten(2).transpose(1, 2)
        for rows in values:
            logits = logits + _WEIGHT * rows
        return logits.softmax(2)

    return Calls(ours, aten)


CRF_OPERATIONS = {
    "gaussian_filter": _gaussian_filter,
    "permutohedral_filter": _permutohedral_filter,
    "spatial_gaussian": _spatial_gaussian,
    "mean_field_update": _mean_field_update,
}
# A table holds for up to four times the pixels: up to 512 x 512, and larger batches of it. All pairs of more
# would take ATen seconds.
IMAGES = tuple(Image(*sizes, 256, 256) for sizes in ((1, 21), (1, 2), (1, 150), (4, 21)))
