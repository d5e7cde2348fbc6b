"""Pictures of a training run and of a prediction."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segfast._errors import UserError
from segfast._files import atomic_write
from segfast.data import IGNORE_INDEX, Sample

# Color-blind safe (Okabe and Ito).
FALSE_NEGATIVE, FALSE_POSITIVE = "#56b4e9", "#e69f00"
WRONG = (0.9, 0.62, 0.0)
# Pixels that are not scored, and the most classes whose names and shares fit into a confusion matrix.
UNSCORED = (128, 128, 128)
MOST_NAMED = 12
# Of a panel, inches: its title's.
NARROWEST = 1.2
LABELS = {"miou": "mean IoU", "rmse": "RMSE", "r2": "R2"}


def save_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a matplotlib figure as PNG, marked as ours (see `segfast.commands._output`)."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": "segfast"})


def new_figure(**options: Any) -> Any:
    """A matplotlib figure that belongs to no window.

    Raises:
        UserError: the package matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("pictures need the package matplotlib (the extra 'demo' has it)") from error
    return Figure(layout="constrained", **options)


def curves_figure(
    rows: Sequence[Mapping[str, str]], loss: str, title: str, confusion: Tensor | None, names: Sequence[str]
) -> Any:
    """The loss of every step with its running mean, the scores held out, and the confusion matrix.

    Args:
        rows: of `metrics.csv`.
        loss: its name.
        confusion: `[K, K]`, drawn as shares of each true class; None for real values.
        names: of the K classes.
    """
    scored = {
        name: [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        for name in ("miou", "pixel_accuracy", "boundary_accuracy", "rmse", "r2")
        if any(row.get(name) for row in rows)
    }
    widths = (6, 6, 5)[: 2 + (confusion is not None)]
    figure = new_figure(figsize=(sum(widths), 4))
    figure.suptitle(title)
    left, middle, *right = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_loss(left, rows, loss)
    for name, points in scored.items():
        middle.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=3,
            label=LABELS.get(name, name.replace("_", " ")),
        )
    middle.set(xlabel="step", title="held out", ylim=(None, None) if confusion is None else (0, 1.02))
    middle.xaxis.get_major_locator().set_params(integer=True)
    middle.grid(alpha=0.3)
    middle.legend(frameon=False)
    if confusion is not None:
        _draw_confusion(figure, right[0], confusion, names)
    return figure


def _draw_loss(axes: Any, rows: Sequence[Mapping[str, str]], loss: str) -> None:
    steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 20)
    mean = torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(1)
    axes.plot(steps[window - 1 :], mean.tolist(), color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel=loss.replace("_", "-"), title="loss", ylim=(min(0, *losses), None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_confusion(figure: Any, axes: Any, confusion: Tensor, names: Sequence[str]) -> None:
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp_min(1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class")
    if few := len(names) <= MOST_NAMED:
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        for place, share in enumerate(shares.flatten().tolist()):
            row, column = divmod(place, len(names))
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share:.1%}", ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="predicted" if few else "predicted class", ylabel="truth", title="confusion, held out")


def predictions_figure(
    samples: Sequence[Sample], predictions: Sequence[Tensor], colors: Sequence[Sequence[int]] | None
) -> Any:
    """Image, truth, prediction and its errors, a row for each sample.

    Args:
        samples: held out.
        predictions: classes `[H, W]`, or real values `[K, H, W]`, whose first plane is drawn.
        colors: of the classes, 0..255; None for real values.
    """
    largest = max(max(sample.image.shape[1:]) for sample in samples)
    width = sum(4 * 2.6 * s.image.shape[2] / largest for s in samples) / len(samples)
    width = max(width, 4 * NARROWEST)
    height = sum(2.6 * s.image.shape[1] / largest for s in samples)
    figure = new_figure(figsize=(width + 0.6, height + 0.7))
    grid = figure.subplots(len(samples), 4, squeeze=False)
    for index, (row, (image, target), prediction) in enumerate(zip(grid, samples, predictions, strict=True)):
        shown = image.mean(0) if len(image) != 3 else image.movedim(0, -1)
        panels: dict[str, tuple[Any, dict[str, Any]]] = {"image": (shown, {"cmap": "gray"})}
        if colors is None:
            truth, found = target.reshape(-1, *target.shape[-2:])[0], prediction[0]
            limits = {"vmin": truth.nan_to_num().min().item(), "vmax": truth.nan_to_num().max().item()}
            panels |= {"truth": (truth, limits), "prediction": (found, limits)}
            panels["difference"] = (found - truth, {"cmap": "RdBu"})
        else:
            table = torch.tensor([*colors, *[UNSCORED] * (256 - len(colors))], dtype=torch.uint8)
            panels |= {"truth": (table[target], {}), "prediction": (table[prediction], {})}
            panels["wrong pixels"] = (_wrong(image.mean(0), prediction, target), {})
        for axes, (title, (panel, options)) in zip(row, panels.items(), strict=True):
            axes.imshow(panel.numpy(), interpolation="nearest", **options)
            axes.axis("off")
            if index == 0:
                axes.set_title(title, fontsize=10)
    return figure


def _wrong(image: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    shown = (0.6 * image)[..., None].repeat(1, 1, 3)
    shown[(prediction != target) & (target != IGNORE_INDEX)] = torch.tensor(WRONG)
    return shown


def errors_rgb(image: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """The image in gray with wrong pixels colored, float32 `[H, W, 3]`."""
    from matplotlib.colors import to_rgb

    shown = (0.6 * image)[..., None].repeat(1, 1, 3)
    for mask, color in (((prediction < target), FALSE_NEGATIVE), ((prediction > target), FALSE_POSITIVE)):
        shown[mask] = torch.tensor(to_rgb(color))
    return shown
