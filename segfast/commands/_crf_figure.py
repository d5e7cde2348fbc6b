"""The picture of what a dense CRF does to a mask: photo, network's mask, refined mask, difference."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..train._figures import FALSE_NEGATIVE, FALSE_POSITIVE, new_figure

# What the CRF adds to the mask, and what it takes away: Okabe and Ito's orange and blue.
ADDED, REMOVED = FALSE_POSITIVE, FALSE_NEGATIVE
# A panel is drawn from no more pixels than this along a side.
LONGEST = 700


class Refined(NamedTuple):
    """A row of the picture: image `[C, H, W]` in 0..255 (gray or RGB), masks `[H, W]` in [0, 1], titles."""

    image: Tensor
    before: Tensor
    after: Tensor
    titles: tuple[str, str, str] = ("photo", "network's mask", "refined by the CRF")


def crf_figure(rows: Sequence[Refined], title: str) -> Any:
    """Four panels a row, as a matplotlib figure."""
    from matplotlib.patches import Patch

    rows = [_shrunk(row) for row in rows]
    shares = [row.before.shape[0] / row.before.shape[1] for row in rows]
    height = sum(2.7 * min(max(share, 0.3), 2.0) + 0.3 for share in shares)
    figure = new_figure(figsize=(11, height + 0.7))
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(len(rows), 4, squeeze=False, height_ratios=shares)
    for axes_row, row in zip(grid, rows, strict=True):
        photo = row.image.byte().movedim(0, -1).expand(-1, -1, 3)
        panels = (photo, row.before, row.after, difference_rgb(*row[:3]))
        for axes, name, panel in zip(axes_row, (*row.titles, "difference"), panels, strict=True):
            axes.imshow(panel.numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_title(name, fontsize=10)
            axes.axis("off")
    legend = [Patch(color=ADDED, label="added by the CRF"), Patch(color=REMOVED, label="taken away")]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    return figure


def difference_rgb(image: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The image in dim gray, the more covered by a color the more the mask changes there: `[H, W, 3]`."""
    from matplotlib.colors import to_rgb

    shown = (0.5 / 255 * image.float().mean(0))[..., None].expand(-1, -1, 3)
    change = (after - before)[..., None]
    color = torch.where(change > 0, torch.tensor(to_rgb(ADDED)), torch.tensor(to_rgb(REMOVED)))
    return shown + change.abs() * (color - shown)


def _shrunk(row: Refined) -> Refined:
    height, width = row.before.shape
    factor = LONGEST / max(height, width)
    if factor >= 1:
        return row._replace(image=row.image.float().clamp(0, 255))
    size = [max(1, round(side * factor)) for side in (height, width)]
    image, before, after = (
        F.interpolate(tensor[None].float(), size, mode="bilinear", antialias=True)[0]
        for tensor in (row.image, row.before[None], row.after[None])
    )
    return row._replace(image=image.clamp(0, 255), before=before[0].clamp(0, 1), after=after[0].clamp(0, 1))
