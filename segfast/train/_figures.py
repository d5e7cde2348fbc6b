"""Pictures of a training run and of a prediction."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segfast._errors import UserError
from segfast._files import atomic_write

# Color-blind safe (Okabe and Ito).
FALSE_NEGATIVE, FALSE_POSITIVE = "#56b4e9", "#e69f00"


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


def loss_figure(losses: Sequence[float], title: str) -> Any:
    """The loss of every step, and its running mean over a twentieth of the run."""
    figure = new_figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 20)
    mean = torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(1)
    axes.plot(range(window, len(losses) + 1), mean, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="cross-entropy", title=title, ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def errors_rgb(image: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """The image in gray with wrong pixels colored, float32 `[H, W, 3]`."""
    from matplotlib.colors import to_rgb

    shown = (0.6 * image)[..., None].repeat(1, 1, 3)
    for mask, color in (((prediction < target), FALSE_NEGATIVE), ((prediction > target), FALSE_POSITIVE)):
        shown[mask] = torch.tensor(to_rgb(color))
    return shown
