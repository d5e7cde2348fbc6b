"""Mean field on our kernels, in Triton's interpreter, against PyTorch's operations: options in odd company.

Values and every gradient there is. All pairs are compared in float64; the lattice in float32, where rounding
decides what vertices there are.
"""

import math
from typing import Any

import pytest
import torch

import segfast
from segfast.functional import mean_field

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_empty")]

SIZE = (7, 9)


def weights(kind: str, labels: int, scale: float, generator: torch.Generator) -> float | torch.Tensor:
    """A number, what single labels weigh, or how they mix, which is not symmetric."""
    if kind == "vector":
        return scale * (0.5 + torch.rand(labels, generator=generator))
    if kind == "matrix":
        return scale * (torch.eye(labels) + torch.rand(labels, labels, generator=generator) / labels)
    return scale * (kind == "number")


def arguments(
    labels=3,
    batch=2,
    channels=3,
    size=SIZE,
    dtype=torch.float32,
    memory_format=torch.contiguous_format,
    bilateral="number",
    spatial="number",
    compatibility="number",
    thetas="tensors",
    image=True,
    normalization: str | None = "symmetric",
    seed=0,
) -> dict[str, Any]:
    """Those of `mean_field` by their names."""
    generator = torch.Generator().manual_seed(seed)
    unary = 2 * torch.rand(batch, labels, *size, generator=generator)
    # Of many labels a pixel has one of two, or averages would change nothing.
    likely = (labels - 1) * torch.randint(2, (batch, 1, *size), generator=generator)
    unary.scatter_add_(1, likely, torch.full(likely.shape, -math.log(labels)))
    scale = 0.15 if normalization is None else 1.0
    energies = weights(compatibility, labels, 1.0, generator)
    found = {
        "unary": unary.to(dtype).contiguous(memory_format=memory_format),
        "image": 255 * torch.rand(batch, channels, *size, generator=generator) if image else None,
        "bilateral_weight": weights(bilateral, labels, 2 * scale, generator),
        "spatial_weight": weights(spatial, labels, scale, generator),
        "compatibility": -energies if isinstance(energies, torch.Tensor) else energies,
        "theta_alpha": (5.0, 6.5),
        "theta_beta": tuple(50.0 + 7 * i for i in range(channels)),
        "theta_gamma": (2.0, 1.5),
    }
    if not image:
        del found["theta_beta"]
    if thetas == "tensors":
        found |= {name: torch.tensor(found[name]) for name in found if name.startswith("theta")}
    return found | {"normalization": normalization}


def run(given: dict[str, Any], wide: bool, weigh: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The probabilities, and the gradients of all tensors in their sum weighed by `weigh`."""
    given = {
        name: (value.double() if wide else value).detach() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    if weigh is None:
        return {"q": mean_field(**given)}
    inputs = {name: t.requires_grad_() for name, t in given.items() if isinstance(t, torch.Tensor)}
    q = mean_field(**given)
    found = torch.autograd.grad((q * weigh.to(q.dtype)).sum(), inputs.values(), allow_unused=True)
    return {"q": q.detach(), **dict(zip(inputs, found, strict=True))}


def compare(given: dict[str, Any], method: str, tolerance=0.0, iterations=2, learns=True) -> None:
    given = {**given, "method": method, "tolerance": tolerance, "iterations": iterations}
    unary = given["unary"]
    weigh = torch.randn(unary.shape, generator=torch.Generator().manual_seed(7)).half() if learns else None
    with segfast.backend("triton"):
        actual = run(given, False, weigh)
    with segfast.backend("aten"):
        expected = run(given, method == "exact", weigh)
    start = (-unary.double()).softmax(1)
    assert actual["q"].dtype == unary.dtype and actual["q"].stride() == unary.stride()
    assert (expected["q"] - start).abs().max() > 0.05, "the CRF changed next to nothing"
    for name, found in actual.items():
        wanted = expected[name]
        assert (found is None) == (wanted is None), name
        if found is None:
            continue
        # Kernel values in half precision; a theta's gradient sums either sign over all pairs, and cancels.
        exactly = {"q": 1e-3, "theta_alpha": 5e-3, "theta_beta": 5e-3}.get(name, 2e-3)
        allowed = 1e-4 if method == "lattice" else exactly
        largest = 1.0 if name == "q" else float(wanted.abs().max())
        difference = (found.double() - wanted.double()).abs().max()
        assert largest > 0 and difference <= allowed * largest, name


LAST = torch.channels_last
CASES = {
    "two labels, mixed weights": {"labels": 2, "bilateral": "matrix", "spatial": "vector"},
    "all matrices": {"bilateral": "matrix", "spatial": "matrix", "compatibility": "matrix"},
    "21 labels, before": {"labels": 21, "normalization": "before", "compatibility": "matrix", "batch": 1},
    "65 labels, after": {"labels": 65, "normalization": "after", "bilateral": "vector", "batch": 1},
    "plain sums, channels last": {"normalization": None, "memory_format": LAST, "spatial": "vector"},
    "halves, channels last": {"dtype": torch.float16, "memory_format": LAST, "compatibility": "vector"},
    "no image": {"image": False, "spatial": "matrix", "memory_format": LAST},
    "no spatial term": {"spatial": "zero", "compatibility": "matrix", "normalization": "before"},
    "thetas that are numbers": {"thetas": "numbers", "bilateral": "matrix", "normalization": "after"},
    "six channels, a column": {"channels": 6, "size": (13, 1), "normalization": "after"},
}
# With many labels the lattice's kernels take the interpreter long.
ON_THE_LATTICE = ("two labels, mixed weights", "plain sums, channels last", "no spatial term")


@pytest.mark.parametrize("name", CASES)
def test_all_pairs(name):
    compare(arguments(**CASES[name]), "exact")


@pytest.mark.parametrize("name", ON_THE_LATTICE)
def test_the_lattice(name):
    images = 2 if name == "two labels, mixed weights" else 1
    compare(arguments(**{**CASES[name], "batch": images}), "lattice", iterations=1)


FUSED = ("all matrices", "65 labels, after", "plain sums, channels last", "halves, channels last")


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "exact") for name in FUSED), ("two labels, mixed weights", "lattice")]
)
def test_without_gradients(name, method):
    """Iterations are fused then, where thetas are numbers."""
    compare(arguments(**{**CASES[name], "thetas": "numbers"}), method, iterations=2, learns=False)


def test_auto_is_exact_for_small_images():
    given = arguments(thetas="numbers") | {"method": "auto", "iterations": 1}
    with segfast.backend("triton"):
        assert torch.equal(mean_field(**given), mean_field(**{**given, "method": "exact"}))


def test_tolerance_is_a_small_change_only():
    given = arguments(thetas="numbers", bilateral="matrix")
    compare(given, "exact", tolerance=1e-3)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("learns", [False, True])
def test_colors_that_outgrow_half_precision(learns):
    """Far from each other for one image of the batch, and a broken pixel in it."""
    given = arguments(thetas="numbers")
    noise = given["image"][0] / 10
    given["image"][0] = torch.where(given["image"][0, :1] > 128, 3e4, 0.0) + noise
    given["image"][0, 0, 3, 4] = 1e6
    compare(given, "exact", learns=learns)
