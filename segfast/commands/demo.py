"""`segfast demo`: train a small U-Net on a real microscope image, predict what it never saw, compare.

And find the person in a portrait, with a pretrained network; refine both by mean field in a dense CRF.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from .._errors import UserError
from .._table import format_table
from ..data import Sample, astronaut
from ..models import UNet
from ..train import Options, PatchSampler, confusion_matrix, fit, predict, save_checkpoint, scores
from ..train._figures import FALSE_NEGATIVE, FALSE_POSITIVE, errors_rgb, new_figure, save_figure
from ..train._predict import channels_last
from ..train._progress import progress
from ._crf_figure import Refined, crf_figure
from ._crf_parameters import NO_CRF, TEXTBOOK, refine
from ._crf_search import (
    Accuracy,
    Labeled,
    accuracy,
    accuracy_table,
    describe,
    labeled,
    search,
    split,
    verdict,
)
from ._load_model import add_device, check_seed, parse_device
from ._output import claim
from ._threads import one_thread
from ._train_data import nuclei_samples
from .check import check_model
from .segment import load_segmenter, overlay, person_mask, refined_mask

REPORT = Path("benchmark", "quick", "report.html")
STEPS = 350
BATCH = 4
PATCH = 128
WIDTH = 16
# Held-out foreground IoU below which the demo has failed. Seeds 0 to 2 give 0.905 to 0.908.
REQUIRED_IOU = 0.86
# Of the search for the CRF's parameters.
CRF_TRIALS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast demo`."""
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps ({STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and patches (0)")
    add_device(parser)
    parser.add_argument("--out", default="out", metavar="FOLDER", help="where the results go (out)")
    parser.add_argument("--force", action="store_true", help="replace files that segfast did not write")


@one_thread()
def run(args: argparse.Namespace) -> int:
    """0 if the network reaches `REQUIRED_IOU` on the held-out region, else 1."""
    if args.steps < 1:
        raise UserError(f"--steps must be at least 1, got {args.steps}")
    check_seed(args.seed)
    device = parse_device(args.device)
    out = Path(args.out)
    names = ("demo.png", "demo.safetensors", "segment.png", "crf.png", REPORT)
    picture, checkpoint, portrait, refined, _ = (claim(out / name, force=args.force) for name in names)
    start = time.perf_counter()
    train, [test] = nuclei_samples()
    print(
        "A 512x512 microscope image of 125 nuclei (BBBC038, Caicedo et al. 2019): "
        "training on columns 0 to 383, testing on 384 to 511."
    )
    model = trained_model(train, args.steps, args.seed, device)
    prediction = predict(model, test.image)
    threshold = best_threshold(test)
    baseline = (test.image[0] >= threshold).long()
    iou, baseline_iou = (foreground_iou(labels, test.target) for labels in (prediction, baseline))
    rows = [
        [f"U-Net, width {WIDTH}, {args.steps} steps", f"{iou:.3f}"],
        ["best global threshold (chosen on this very region)", f"{baseline_iou:.3f}"],
        ["required", f"{REQUIRED_IOU:.2f}"],
    ]
    print(format_table(["held-out region", "foreground IoU"], rows))
    save_checkpoint(model, checkpoint)
    save_figure(comparison_figure(test, (prediction, iou), (baseline, baseline_iou)), picture)
    print(f"wrote {picture} and {checkpoint}\n")
    mask = segment_portrait(portrait, device)
    refine_masks(refined, labeled(model, test), mask, device)
    write_quick_report(out, device)
    # Last, and its last line says what was gained here.
    checked = check_model(model, test.image[None].to(device), budget_s=2)
    print(f"\nsegfast check on the trained network: {checked}\n")
    print(f"{time.perf_counter() - start:.0f} s in all.")
    if iou < REQUIRED_IOU:
        print(f"FAILED: foreground IoU {iou:.3f} is below {REQUIRED_IOU}", file=sys.stderr)
        return 1
    return 0


def trained_model(
    train: list[Sample], steps: int = STEPS, seed: int = 0, device: torch.device | str = "cpu"
) -> UNet:
    """The demo's network after `steps` steps. It starts from the same weights on every device."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        model = channels_last(UNet(width=WIDTH, norm="batch").to(device))
    sampler = PatchSampler(train, PATCH, BATCH, seed)
    with progress(steps) as on_step:
        fit(model, sampler, Options(steps=steps), on_step)
    return model.eval()


def best_threshold(sample: Sample) -> float:
    """The gray value that, as a threshold over the whole sample, gives the highest foreground IoU."""
    values = sample.image[0].flatten()
    order = values.argsort(descending=True, stable=True)
    hits = sample.target.flatten()[order].cumsum(0)
    predicted = torch.arange(1, len(values) + 1)
    iou = hits / (predicted + hits[-1] - hits)
    # Pixels of equal value fall on the same side: only the last of each value is a threshold.
    ordered = values[order]
    last = torch.cat((ordered[:-1] != ordered[1:], torch.tensor([True])))
    return ordered[iou.masked_fill(~last, 0).argmax()].item()


def foreground_iou(prediction: Tensor, target: Tensor) -> float:
    """IoU of class 1."""
    return scores(confusion_matrix(prediction, target, 2)).iou[1].item()


def comparison_figure(sample: Sample, ours: tuple[Tensor, float], baseline: tuple[Tensor, float]):
    """Image, truth, prediction, its errors, and the errors of the baseline, side by side."""
    from matplotlib.patches import Patch

    image = sample.image[0] ** 0.5  # dim nuclei show
    height, width = image.shape
    panels = [
        ("image", image),
        ("truth", sample.target),
        (f"U-Net\nIoU {ours[1]:.3f}", ours[0]),
        ("U-Net's errors", errors_rgb(image, ours[0], sample.target)),
        (f"best threshold's errors\nIoU {baseline[1]:.3f}", errors_rgb(image, baseline[0], sample.target)),
    ]
    figure = new_figure(figsize=(2.2 * len(panels), 2.2 * height / width + 1.1))
    figure.suptitle("The region that was never trained on", fontsize=13)
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(panel.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    legend = [
        Patch(color=FALSE_NEGATIVE, label="missed (false negative)"),
        Patch(color=FALSE_POSITIVE, label="invented (false positive)"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    return figure


def segment_portrait(path: Path, device: torch.device | str = "cpu") -> Tensor:
    """Run the pretrained segmenter on the portrait that is shipped, and draw the result; the mask."""
    photo = astronaut()
    mask = person_mask(load_segmenter(device), photo)
    print(
        f"The pretrained portrait segmenter (MediaPipe, Apache-2.0) on a photo of NASA's: {mask.mean():.0%} "
        f"of it is person.\nwrote {path}; `segfast segment PHOTO` does the same for yours\n"
    )
    figure = new_figure(figsize=(9.5, 3.7))
    figure.suptitle("The pretrained portrait segmenter on a photo", fontsize=13)
    panels = {
        "photo": photo.movedim(0, -1),
        "mask: probability of a person": mask,
        "overlay": overlay(photo, mask).movedim(0, -1),
    }
    for axes, (title, panel) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(panel.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    save_figure(figure, path)
    return mask


def refine_masks(path: Path, nuclei: Labeled, portrait: Tensor, device: torch.device | str = "cpu") -> None:
    """Mean field in a dense CRF on both masks, measured where there is a truth, and drawn.

    The upper half of the nuclei is for fitting the parameters, the lower for measuring.
    """
    [upper], [lower] = split([nuclei], 0.5)
    best, trials = search([upper], CRF_TRIALS)
    before, textbook, after = (
        {"lower half": accuracy([lower], parameters)} for parameters in (NO_CRF, TEXTBOOK, best)
    )
    print(
        "Mean field in a dense CRF on the nuclei's held-out region, "
        f"fitted to its upper half ({trials} trials):\n"
        f"{describe(best)}\n{accuracy_table(before, {'textbook CRF': textbook, 'fitted CRF': after})}\n"
        f"{verdict(best, before['lower half'], after['lower half'])}"
    )
    print(
        "On the portrait, for which there is no truth, with values fitted to nothing: judge by the picture.\n"
        f"wrote {path}; `segfast crf-fit` fits a CRF to your data, `segfast segment --crf` uses it\n"
    )
    photo = astronaut()
    rows = [
        Refined(photo, portrait, refined_mask(portrait, photo, device=device)),
        _nuclei_row(lower, refine(lower.probabilities, lower.image, best), before, after),
    ]
    save_figure(crf_figure(rows, "Mean field in a dense CRF"), path)


def _nuclei_row(sample: Labeled, refined: Tensor, *scores: dict[str, Accuracy]) -> Refined:
    """The picture's row for the nuclei, turned on its side, as their region is tall."""
    image = (sample.image.cpu() / 255) ** 0.5 * 255  # dim nuclei show
    names = [f"{100 * found.mean_iou:.2f} %" for part in scores for found in part.values()]
    titles = "nuclei", f"network, mean IoU {names[0]}", f"fitted CRF, {names[1]}"
    return Refined(image.mT, sample.probabilities[1].mT.cpu(), refined[1].mT.cpu(), titles)


def write_quick_report(out: Path, device: torch.device) -> None:
    """Write the benchmark report's short form, measured on `device`, where the checkout has `benchmarks/`."""
    checkout = Path(__file__).parent.parent.parent
    if not (checkout / "benchmarks" / "quick.py").exists():
        print("no benchmark report: it needs the folder benchmarks/ of a source checkout")
        return
    sys.path.insert(0, str(checkout))
    try:
        quick = importlib.import_module("benchmarks.quick")
    finally:
        sys.path.remove(str(checkout))
    # Not where `pytest --benchmark` leaves the long form.
    print(f"wrote {quick.quick_report(out / REPORT.parent, device)}")
