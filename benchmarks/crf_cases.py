"""The dense CRF's cases: mean field with its set-up, and one bilateral filter; over every pair of pixels."""

import importlib.util
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from segfast.ops._case import Case, Tensors

FAMILY = "dense_crf"
# Where scikit-image is not installed, smooth images of our own, called what they are.
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")
if importlib.util.find_spec("skimage") is None:
    PHOTOS = tuple(f"synthetic{i}" for i in range(len(PHOTOS)))

_SIZES = {"321": (321, 321), "512": (512, 512), "1024x512": (512, 1024)}
# theta_alpha, theta_beta and the weight that goes with them: DeepLabV2's and pydensecrf's manual's.
_DEEPLAB, _MANUAL = (67, 3, 4), (80, 13, 10)

# Goals, not measurements, which the report sets beside them: milliseconds of the median photograph on an
# H200, set-up included; and KeOps' time on the same pairs of tiles over ours.
GOALS_MS = {
    ("crf_512_67_3", "segfast_lattice"): 15,
    ("crf_512_80_13", "segfast_lattice"): 10,
    ("crf_512_67_3", "segfast_exact"): 20,
}
GOAL_OVER_KEOPS = 3


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
    """[N, 5] of an image [3, H, W] in 0..255: x, y over alpha, colors over beta."""
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
    """Dense-CRF mean field with pydensecrf's symmetric normalization and Potts weights; exact by default.

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


class DenseCrf(Case):
    """Mean field with so many `labels` on photographs, of which `image` is the first."""

    family, op = FAMILY, "dense_crf"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Photographs, one after the other in a batch, and energies as smooth as a network's."""
        n, labels, size = self["n"], self["labels"], (self["h"], self["w"])
        first = PHOTOS.index(self["image"])
        names = [PHOTOS[(first + i) % len(PHOTOS)] for i in range(n)]
        image = torch.cat([photograph(name, size) for name in names]).to(device)
        coarse = [max(2, side // 8) for side in size]
        logits = 2 * torch.randn(n, labels, *coarse, device=device, generator=generator)
        return {"unary": -F.interpolate(logits, size, mode="bilinear").log_softmax(1), "image": image}

    def formula(self, t: Tensors, make_filter: MakeFilter = all_pairs) -> torch.Tensor:
        options = {
            "iterations": self["iterations"],
            "bilateral": (self["alpha"], self["beta"], self["bilateral_weight"]),
            "spatial": (self["gamma"], self["gaussian_weight"]),
            "make_filter": make_filter,
        }
        pairs = zip(t["unary"], t["image"], strict=True)
        return torch.stack([mean_field(unary, image, **options) for unary, image in pairs])

    @property
    def exponentials(self) -> float:
        return self["n"] * (self["h"] * self["w"]) ** 2 * self["iterations"]

    def count_flops(self, useful: bool) -> float:
        # Exponent and filter, each a dot over 32 columns.
        return 128.0 * self.exponentials


class GaussianFilter(DenseCrf):
    """One bilateral filter of the energies' probabilities."""

    op = "gaussian_filter"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        t, size = super().inputs(device, dtype, generator), (self["h"], self["w"])
        found = [bilateral_features(image, self["alpha"], self["beta"]) for image in t["image"]]
        features = torch.stack([points.T.reshape(5, *size) for points in found])
        return {"values": (-t["unary"]).exp(), "features": features}

    def formula(self, t: Tensors, make_filter: MakeFilter = all_pairs) -> torch.Tensor:
        images = []
        for values, features in zip(t["values"], t["features"], strict=True):
            filtered = symmetric(make_filter(features.flatten(1).T.contiguous()), values)
            images.append(filtered(values.flatten(1).T).T.reshape(values.shape))
        return torch.stack(images)


def photograph(name: str, size: tuple[int, int]) -> torch.Tensor:
    """[1, 3, H, W] in 0..255, whole numbers: one of scikit-image's, resized, or a synthetic one."""
    if name.startswith("synthetic"):
        generator = torch.Generator().manual_seed(int(name.removeprefix("synthetic")))
        # Smooth blobs of color with noise: about as many similar pixels as a photograph has.
        coarse = 255 * torch.rand(1, 3, 12, 12, generator=generator)
        noise = 4 * torch.randn(1, 3, *size, generator=generator)
        return (F.interpolate(coarse, size, mode="bicubic") + noise).clamp(0, 255).round()
    from skimage import data

    image = torch.from_numpy(getattr(data, name)()).movedim(2, 0)[None].float()
    return F.interpolate(image, size, mode="bilinear", antialias=True).clamp(0, 255).round()


def _crf(
    name: str, layer: str, size: str, thetas: tuple[int, int, int], uses=("benchmark",), **more: int | str
) -> DenseCrf:
    """Ten iterations on one photograph with 21 labels, but for what `more` replaces."""
    height, width = _SIZES[size]
    alpha, beta, weight = thetas
    params = {"n": 1, "labels": 21, "h": height, "w": width, "iterations": 10, "alpha": alpha, "beta": beta}
    params |= {"bilateral_weight": weight, "gamma": 3, "gaussian_weight": 3, "image": PHOTOS[0], **more}
    small = {"n": 1, "h": 24, "w": 32, "labels": min(params["labels"], 21)}
    small["iterations"] = min(params["iterations"], 3)
    return DenseCrf(name, layer, params, small, uses=uses, dtype="float32")


def _cases() -> Iterator[DenseCrf]:
    """The most important first, the longest last: a GPU run's time may end in between."""
    both = (_DEEPLAB, _MANUAL)
    for thetas in both:
        yield _named("512", thetas)
        for photo in PHOTOS[1:]:
            yield _named("512", thetas, f"_{photo}", image=photo)
    for thetas in both:
        yield _named("321", thetas)
    for size in ("512", "321"):
        for thetas in both:
            yield from _once(size, thetas)
    for labels in (2, 150):
        many = _named("512", _DEEPLAB, f"_{labels}labels", labels=labels)
        yield many
        yield _filter(many)
    for size, thetas in (("321", _DEEPLAB), ("512", _DEEPLAB), ("512", _MANUAL)):
        yield _named(size, thetas, "_n16", n=16)
    yield _filter(_named("512", _DEEPLAB, "_n16", n=16))
    yield from _once("1024x512", _DEEPLAB)
    for thetas in both:
        yield _named("1024x512", thetas)


def _named(size: str, thetas: tuple[int, int, int], ending: str = "", **more: int | str) -> DenseCrf:
    alpha, beta, _ = thetas
    return _crf(f"crf_{size}_{alpha}_{beta}{ending}", f"dense CRF, {size} pixels", size, thetas, **more)


def _once(size: str, thetas: tuple[int, int, int]) -> Iterator[DenseCrf]:
    """One iteration, and one filter by itself."""
    once = _named(size, thetas, "_1iteration", iterations=1)
    yield once
    yield _filter(once)


def _filter(case: DenseCrf) -> DenseCrf:
    name = case.name.replace("crf_", "filter_", 1).removesuffix("_1iteration")
    params = {**case.params, "iterations": 1}
    return case.become(GaussianFilter, name=name, layer="one bilateral filter", params=params)


# Published settings first; `_cases` has both thetas on four photographs, and changes one thing at a time.
_QUICK = ("benchmark", "quick")
_TABLED = [
    _crf("crf_512_67_3", "DeepLabV2 CRF", "512", _DEEPLAB, _QUICK),
    _crf("crf_321_160_3", "CRF-RNN", "321", (160, 3, 5), _QUICK),
    _crf("crf_1024x512_80_13", "pydensecrf README, wide image", "1024x512", _MANUAL, _QUICK),
]
_NAMES = [case.name for case in _TABLED]
CASES = [*_TABLED, *(case for case in _cases() if case.name not in _NAMES)]
