"""The search for a dense CRF's parameters on labeled images, and what it says of its result.

At random, then along one coordinate at a time.
Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (2011),
section 4, set theirs by a grid search on a validation set; a random one covers more values of each parameter
in as many trials (Bergstra and Bengio, "Random Search for Hyper-Parameter Optimization", 2012).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._errors import UserError
from .._table import format_table
from ..data import Sample
from ..train import confusion_matrix, predict_scores, scores
from ._crf_parameters import NO_CRF, TEXTBOOK, Parameters, refine

# Where values are drawn, evenly on a logarithmic scale.
RANGES = {
    "theta_alpha": (4.0, 160.0),
    "theta_beta": (2.0, 80.0),
    "theta_gamma": (0.7, 8.0),
    "bilateral_weight": (0.1, 20.0),
    "spatial_weight": (0.1, 20.0),
}
ITERATIONS = (1, 2, 3, 5, 10)
# How often a term is left out.
WITHOUT = 0.15
# The first factor by which the refinement moves a value; it takes the root of it until nothing would move.
STEP, LAST_STEP = 1.6, 1.03
# What share of the pixels more another order of the classes must get right to be thought the one meant.
FAR_BETTER = 0.25


class Labeled(NamedTuple):
    """A network's probabilities, float32 `[K, H, W]`, the image `[C, H, W]` in 0..255, the truth `[H, W]`."""

    probabilities: Tensor
    image: Tensor
    target: Tensor


class Accuracy(NamedTuple):
    """Over all pixels that are scored; 1 is perfect. The first counts, the second decides between equals."""

    mean_iou: float
    pixel_accuracy: float


def labeled(model: nn.Module, sample: Sample) -> Labeled:
    """The sample with the model's probabilities, on its device; the image's [0, 1] becomes 0..255."""
    device = next(model.parameters()).device
    probabilities = predict_scores(model, sample.image).softmax(0)
    return Labeled(probabilities.to(device), 255 * sample.image.to(device), sample.target)


def split(samples: Sequence[Labeled], holdout: float, seed: int = 0) -> tuple[list[Labeled], list[Labeled]]:
    """A part to fit and a part held out: whole images drawn by `seed`, or the last rows of a single one.

    Raises:
        UserError: `holdout` is not between 0 and 1, or leaves nothing on one side.
    """
    if not 0 < holdout < 1:
        raise UserError(f"--holdout {holdout}: expected a fraction between 0 and 1")
    if len(samples) == 1:
        [sample] = samples
        height = sample.target.shape[0]
        row = round(height * (1 - holdout))
        if not 0 < row < height:
            raise UserError(f"--holdout {holdout}: an image {height} rows high cannot be split so")
        top, bottom = (
            Labeled(*(tensor[..., rows, :] for tensor in sample))
            for rows in (slice(None, row), slice(row, None))
        )
        return [top], [bottom]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[: min(max(1, round(holdout * len(samples))), len(samples) - 1)])
    return [s for i, s in enumerate(samples) if i not in held], [samples[i] for i in sorted(held)]


def accuracy(samples: Sequence[Labeled], parameters: Parameters, method: str = "auto") -> Accuracy:
    """The accuracy of the most probable classes after the CRF."""
    classes = samples[0].probabilities.shape[0]
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for probabilities, image, target in samples:
        labels = refine(probabilities, image, parameters, method).argmax(0).cpu()
        confusion += confusion_matrix(labels, target, classes)
    return Accuracy(scores(confusion).miou, (confusion.diagonal().sum() / confusion.sum()).item())


def permutation_note(samples: Sequence[Labeled]) -> str | None:
    """One line if the probabilities' classes, taken in another order, would fit the masks far better."""
    classes = samples[0].probabilities.shape[0]
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for probabilities, _, target in samples:
        confusion += confusion_matrix(probabilities.argmax(0).cpu(), target, classes)
    # Largest counts first, every class once.
    meant: dict[int, int] = {}
    for place in confusion.flatten().argsort(descending=True).tolist():
        true, predicted = divmod(place, classes)
        if predicted not in meant and true not in meant.values():
            meant[predicted] = true
    total = confusion.sum().item()
    right = confusion.diagonal().sum().item() / total
    reordered = sum(confusion[true, predicted].item() for predicted, true in meant.items()) / total
    if reordered < right + FAR_BETTER:
        return None
    order = ", ".join(f"{p} as {t}" for p, t in sorted(meant.items()) if p != t)
    return (
        "the probabilities' classes seem to be in another order than the masks': "
        f"{100 * right:.1f} % of the pixels are right, with class {order} it were {100 * reordered:.1f} %"
    )


def search(
    samples: Sequence[Labeled],
    trials: int = 100,
    seed: int = 0,
    seconds: float = math.inf,
    method: str = "auto",
    on_trial: Callable[[Accuracy], None] | None = None,
) -> tuple[Parameters, int]:
    """The parameters of the best accuracy on `samples`, and how many were tried.

    "No CRF" is tried first and only given up for something better, so the accuracy on `samples` never falls;
    on other images it may. Then come the textbook values, random ones until half of the trials are spent, and
    steps from the best ones, a coordinate at a time. Equal seeds try equal values, unless time runs out.

    Args:
        trials: at most so many, those two included, which are always tried.
        seconds: no other trial starts later.
        on_trial: called after each with the best accuracy so far.
    """
    deadline = time.monotonic() + seconds
    tried: dict[Parameters, Accuracy] = {}

    def best() -> Parameters:
        return max(tried, key=tried.__getitem__)  # of equals the first

    def attempt(parameters: Parameters) -> bool:
        """True if there was a trial left for it."""
        if parameters in tried:
            return True
        # What the result is compared with is always tried.
        if len(tried) > 1 and (len(tried) >= trials or time.monotonic() >= deadline):
            return False
        tried[parameters] = accuracy(samples, parameters, method)
        if on_trial is not None:
            on_trial(tried[best()])
        return True

    generator = torch.Generator().manual_seed(seed)
    attempt(NO_CRF)
    attempt(TEXTBOOK)
    for _ in range(trials // 2 - 2):
        attempt(_draw(generator))

    step = STEP
    while step > LAST_STEP:
        # Steps from "no CRF" lead nowhere.
        start = max((p for p in tried if p != NO_CRF), key=tried.__getitem__, default=NO_CRF)
        if not all(attempt(neighbor) for neighbor in _neighbors(start, step)):
            break
        if not any(tried[p] > tried[start] for p in tried if p != NO_CRF):
            step = math.sqrt(step)
    return best(), len(tried)


def accuracy_table(before: dict[str, Accuracy], others: dict[str, dict[str, Accuracy]]) -> str:
    """Percent on every part of the data, and how many points each CRF changes it."""
    rows = [["network alone", *(f"{100 * value:.2f}" for part in before.values() for value in part)]]
    for name, parts in others.items():
        cells = [
            f"{100 * value:.2f} ({100 * (value - old):+.2f})"
            for part, found in parts.items()
            for value, old in zip(found, before[part], strict=True)
        ]
        rows.append([name, *cells])
    headers = [f"{part}: {measure}" for part in before for measure in ("mean IoU %", "pixels right %")]
    return format_table(["", *headers], rows)


def describe(parameters: Parameters) -> str:
    """The parameters as `mean_field` takes them."""
    return ", ".join(f"{name}={value:g}" for name, value in parameters._asdict().items())


def verdict(best: Parameters, before: Accuracy, after: Accuracy) -> str:
    """One plain sentence about the part that was not fitted."""
    if best == NO_CRF:
        return "No CRF that was tried is better than none: these parameters change nothing."
    change = 100 * (after.mean_iou - before.mean_iou)
    if change > 0:
        return f"On the held-out part the fitted CRF raises the mean IoU by {change:.2f} points."
    if change == 0:
        return "On the held-out part the fitted CRF leaves the mean IoU as it is."
    return (
        f"On the held-out part the fitted CRF LOWERS the mean IoU by {-change:.2f} points: "
        "do without it, or fit it on more images."
    )


def _draw(generator: torch.Generator) -> Parameters:
    def uniform() -> float:
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    values = {
        name: _rounded(math.exp(math.log(low) + uniform() * math.log(high / low)))
        for name, (low, high) in RANGES.items()
    }
    left_out = uniform()
    if left_out < WITHOUT:
        values["bilateral_weight"] = 0.0
    elif left_out < 2 * WITHOUT:
        values["spatial_weight"] = 0.0
    return Parameters(**values, iterations=ITERATIONS[int(uniform() * len(ITERATIONS))])


def _neighbors(parameters: Parameters, step: float) -> Iterator[Parameters]:
    """One coordinate changed, up or down, each."""
    for name in RANGES:
        for factor in (step, 1 / step):
            changed = {name: _rounded(getattr(parameters, name) * factor)}
            yield Parameters(**{**parameters._asdict(), **changed})
    place = ITERATIONS.index(parameters.iterations) if parameters.iterations in ITERATIONS else 0
    for other in (place - 1, place + 1):
        if 0 <= other < len(ITERATIONS):
            yield parameters._replace(iterations=ITERATIONS[other])


def _rounded(value: float) -> float:
    """To three digits: more would be beyond what a validation split can tell."""
    return float(f"{value:.3g}")
