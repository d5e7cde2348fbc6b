"""The dense CRF's cases: mean field with its set-up, and one bilateral filter."""

import importlib.util
from collections.abc import Iterator

from benchmarks.case import Case

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


def crf(name: str, layer: str, size: str, thetas: tuple[int, int, int], **more: int | str) -> Case:
    """Ten iterations on one photograph with 21 labels, but for what `more` replaces."""
    height, width = _SIZES[size]
    alpha, beta, weight = thetas
    params = {"n": 1, "labels": 21, "h": height, "w": width, "iterations": 10, "alpha": alpha, "beta": beta}
    params |= {"bilateral_weight": weight, "gamma": 3, "gaussian_weight": 3, "image": PHOTOS[0], **more}
    small = {"n": 1, "h": 24, "w": 32, "labels": min(params["labels"], 21)}
    small["iterations"] = min(params["iterations"], 3)
    return Case(name, FAMILY, "dense_crf", layer, params, small, dtype="float32")


def further(known: frozenset[str]) -> list[Case]:
    """Both thetas on four photographs, then one thing at a time; without the names that are known."""
    return [case for case in _cases() if case.name not in known]


def _cases() -> Iterator[Case]:
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


def _named(size: str, thetas: tuple[int, int, int], ending: str = "", **more: int | str) -> Case:
    alpha, beta, _ = thetas
    return crf(f"crf_{size}_{alpha}_{beta}{ending}", f"dense CRF, {size} pixels", size, thetas, **more)


def _once(size: str, thetas: tuple[int, int, int]) -> Iterator[Case]:
    """One iteration, and one filter by itself."""
    once = _named(size, thetas, "_1iteration", iterations=1)
    yield once
    yield _filter(once)


def _filter(case: Case) -> Case:
    name = case.name.replace("crf_", "filter_", 1).removesuffix("_1iteration")
    params = {**case.params, "iterations": 1}
    return case.replace(name=name, op="gaussian_filter", layer="one bilateral filter", params=params)
