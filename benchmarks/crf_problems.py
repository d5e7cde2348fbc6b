"""The dense CRF's inputs, and its formulas: every pair of pixels, in plain torch."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.case import Case

Tensors = dict[str, torch.Tensor]
# Of points [N, D], divided by their standard deviations, what maps values [N, C] to K values.
MakeFilter = Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]

_CHUNK = 1 << 24  # pairs that exist at a time


def all_pairs(points: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """`exp(-|f_i - f_j|^2 / 2)` between all points, a chunk of rows at a time."""
    points = points - points.mean(0)
    half, one = points.square().sum(1, keepdim=True) / 2, torch.ones_like(points[:, :1])
    # Their product is the exponent, -|f_i|^2 / 2 + f_i f_j - |f_j|^2 / 2.
    left, right = torch.cat([points, -half, one], 1), torch.cat([points, one, -half], 1).T.contiguous()

    def filtered(values: torch.Tensor) -> torch.Tensor:
        parts = left.split(max(1, _CHUNK // left.shape[0]))
        return torch.cat([(part @ right).clamp_(-80, 0).exp_() @ values for part in parts])

    return filtered


def separable(size: tuple[int, int], sigma: float, like: torch.Tensor):
    """The same between the pixels of an image of their places alone: rows, then columns."""
    down, across = (_line(n, sigma, like) for n in size)

    def filtered(values: torch.Tensor) -> torch.Tensor:
        image = torch.tensordot(down, values.reshape(*size, -1), 1)
        return (across @ image).reshape(values.shape)

    return filtered


def _line(count: int, sigma: float, like: torch.Tensor) -> torch.Tensor:
    places = torch.arange(count, device=like.device, dtype=like.dtype) / sigma
    return torch.exp(-0.5 * (places[:, None] - places).square())


def bilateral_features(image: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """[N, 5] of an image [3, H, W] in 0..255: x, y over alpha, colours over beta."""
    places = [torch.arange(n, device=image.device, dtype=image.dtype) / alpha for n in image.shape[1:]]
    y, x = torch.meshgrid(*places, indexing="ij")
    return torch.cat([x[None], y[None], image / beta]).flatten(1).T


def mean_field(
    unary: torch.Tensor,
    image: torch.Tensor,
    *,
    iterations: int,
    bilateral: tuple[float, float, float],
    spatial: tuple[float, float],
    make_filter: MakeFilter = all_pairs,
) -> torch.Tensor:
    """Dense-CRF mean field with pydensecrf's symmetric normalisation and Potts weights; exact by default.

    `unary` [labels, H, W] are negative log probabilities, `image` [3, H, W] in 0..255; bilateral (alpha,
    beta, weight), spatial (gamma, weight). Kraehenbuehl and Koltun, 2011.
    """
    alpha, beta, bilateral_weight = bilateral
    features = bilateral_features(image.to(unary.dtype), alpha, beta)
    terms = [
        (symmetric(make_filter(features), unary), bilateral_weight),
        (symmetric(separable(tuple(unary.shape[1:]), spatial[0], unary), unary), spatial[1]),
    ]
    flat = unary.flatten(1).T
    q = torch.softmax(-flat, 1)
    for _ in range(iterations):
        q = torch.softmax(sum(weight * filtered(q) for filtered, weight in terms) - flat, 1)
    return q.T.reshape(unary.shape)


def symmetric(filtered: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor):
    """The filter with the root of its row sums divided out on both sides; of images like `like`."""
    ones = torch.ones(math.prod(like.shape[1:]), 1, device=like.device, dtype=like.dtype)
    scale = filtered(ones).rsqrt()
    return lambda values: scale * filtered(scale * values)


def dense_crf(case: Case, make_filter: MakeFilter = all_pairs) -> Callable[[Tensors], torch.Tensor]:
    def formula(t: Tensors) -> torch.Tensor:
        images = [
            mean_field(
                unary,
                image,
                iterations=case["iterations"],
                bilateral=(case["alpha"], case["beta"], case["bilateral_weight"]),
                spatial=(case["gamma"], case["gaussian_weight"]),
                make_filter=make_filter,
            )
            for unary, image in zip(t["unary"], t["image"], strict=True)
        ]
        return torch.stack(images)

    return formula


def gaussian_filter(case: Case, make_filter: MakeFilter = all_pairs) -> Callable[[Tensors], torch.Tensor]:
    def formula(t: Tensors) -> torch.Tensor:
        images = []
        for values, features in zip(t["values"], t["features"], strict=True):
            filtered = symmetric(make_filter(features.flatten(1).T.contiguous()), values)
            images.append(filtered(values.flatten(1).T).T.reshape(values.shape))
        return torch.stack(images)

    return formula


def inputs(case: Case, device: torch.device, generator: torch.Generator) -> Tensors:
    """Photographs, one after the other in a batch, and energies as smooth as a network's."""
    from benchmarks.crf_cases import PHOTOS

    n, labels, size = case["n"], case["labels"], (case["h"], case["w"])
    first = PHOTOS.index(case["image"])
    names = [PHOTOS[(first + i) % len(PHOTOS)] for i in range(n)]
    image = torch.cat([photograph(name, size) for name in names]).to(device)
    coarse = [max(2, side // 8) for side in size]
    logits = 2 * torch.randn(n, labels, *coarse, device=device, generator=generator)
    unary = -F.interpolate(logits, size, mode="bilinear").log_softmax(1)
    if case.op == "dense_crf":
        return {"unary": unary, "image": image}
    features = [bilateral_features(one, case["alpha"], case["beta"]).T.reshape(5, *size) for one in image]
    return {"values": (-unary).exp(), "features": torch.stack(features)}


def photograph(name: str, size: tuple[int, int]) -> torch.Tensor:
    """[1, 3, H, W] in 0..255, whole numbers: one of scikit-image's, resized, or a synthetic one."""
    if name.startswith("synthetic"):
        generator = torch.Generator().manual_seed(int(name.removeprefix("synthetic")))
        # Smooth blobs of colour with noise: about as many similar pixels as a photograph has.
        coarse = 255 * torch.rand(1, 3, 12, 12, generator=generator)
        noise = 4 * torch.randn(1, 3, *size, generator=generator)
        return (F.interpolate(coarse, size, mode="bicubic") + noise).clamp(0, 255).round()
    from skimage import data

    image = torch.from_numpy(getattr(data, name)()).movedim(2, 0)[None].float()
    return F.interpolate(image, size, mode="bilinear", antialias=True).clamp(0, 255).round()
