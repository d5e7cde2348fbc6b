"""The roofline of a profile as a picture, for reports."""

import math
from collections.abc import Sequence
from typing import Any

from ..train._figures import new_figure
from .colors import colors
from .quantities import kind_of, scaled
from .roofline import (
    LABELS,
    LONGEST_NAME,
    NO_POINTS,
    Box,
    Roofline,
    name_of,
    place_labels,
    pointer,
    radius,
    roofline,
    spread,
    tick_name,
    ticks,
)
from .rows import Profile
from .table import roof_sentence

_INK, _MUTED, _GRID = "#1c1c1a", "#6b6a65", "#e7e6e2"
_SMALL = 8.5
_NOTE = {"fontsize": _SMALL, "color": _MUTED}


def roofline_figure(profile: Profile) -> Any:
    """The layers' points under the measured roofs, as a matplotlib figure.

    Raises:
        UserError: the package matplotlib is missing.
    """
    figure = new_figure(figsize=(10, 6))
    axes = figure.subplots()
    plot = roofline(profile)
    axes.set(xscale="log", yscale="log", xlim=plot.x, ylim=plot.y)
    axes.set_xlabel("arithmetic intensity, FLOP/B", color=_MUTED)
    axes.set_xticks(ticks(plot.x), [f"{tick:,.10g}" for tick in ticks(plot.x)])
    axes.set_yticks(ticks(plot.y), [tick_name(tick) for tick in ticks(plot.y)])
    axes.minorticks_off()
    axes.tick_params(length=0, colors=_MUTED, labelsize=_SMALL)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    title = figure.suptitle(profile.title, ha="left", fontsize=12, color=_INK)
    axes.set_title(roof_sentence(profile.roof), loc="left", fontsize=_SMALL, color=_MUTED)
    longest = plot.points[0].us if plot.points else 0.0
    hues = colors(profile.rows)
    for point in plot.points:
        size = (2 * radius(point.us, longest) * 72 / figure.dpi) ** 2
        hue = hues[kind_of(profile.rows[point.place])][0]
        axes.scatter(point.intensity, point.rate, size, hue, edgecolors="white", linewidths=0.8, alpha=0.85)
    kinds = dict.fromkeys(kind_of(profile.rows[point.place]) for point in plot.points)
    for kind in kinds:
        axes.scatter([], [], 40, hues[kind][0], label=kind)
    if plot.points:
        columns = 6 if max(map(len, kinds)) < 18 else 3
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=_SMALL)
    else:
        axes.text(0.5, 0.2, NO_POINTS, transform=axes.transAxes, ha="center", color=_INK)
    _draw_roofs(axes, plot)
    figure.draw_without_rendering()  # lays the axes out: from here on places in pixels are known
    title.set_x(axes.get_position().x0)
    lines = [(*_pixels(axes, *start), *_pixels(axes, *end)) for start, end in plot.roofs()]
    _name_slope(axes, plot, lines[0])
    _name_points(axes, profile, plot, lines)
    return figure


def _draw_roofs(axes: Any, plot: Roofline) -> None:
    """Draw the slope and the levels."""
    for (x0, y0), (x1, y1) in plot.roofs():
        axes.plot((x0, x1), (y0, y1), color=_MUTED, linewidth=1.4, zorder=1)
    # In shares of the height, downward.
    heights = [math.log(plot.y[1] / rate) / math.log(plot.y[1] / plot.y[0]) for _, rate in plot.levels]
    for (name, _), height in zip(plot.levels, spread(heights, 0.04), strict=True):
        axes.text(1.01, 1 - height, name, transform=axes.transAxes, va="center", **_NOTE)


def _pixels(axes: Any, x: float, y: float) -> tuple[float, float]:
    """Where a point of the data is, y downward."""
    right, up = axes.transData.transform((x, y))
    return right, -up


def _name_slope(axes: Any, plot: Roofline, line: Box) -> None:
    angle = math.degrees(math.atan2(line[1] - line[3], line[2] - line[0]))
    name = f"memory {scaled(plot.bytes_per_s, 'B/s')}"
    axes.annotate(
        name,
        plot.roofs()[0][0],
        (8, 12),
        textcoords="offset points",
        rotation=angle,
        rotation_mode="anchor",
        **_NOTE,
    )


def _name_points(axes: Any, profile: Profile, plot: Roofline, lines: Sequence[Box]) -> None:
    """The names of the layers that take the longest, where there is room for them."""
    names = [name_of(profile.rows[point.place], LONGEST_NAME) for point in plot.points[:LABELS]]
    texts = [axes.text(0, 0, name, fontsize=8.5, color=_INK, va="top") for name in names]
    sizes = [(extent.width, extent.height) for extent in (text.get_window_extent() for text in texts)]
    circles = [
        (*_pixels(axes, point.intensity, point.rate), radius(point.us, plot.points[0].us))
        for point in plot.points
    ]
    box = axes.get_window_extent()
    corners = place_labels(circles, sizes, (box.x0, -box.y1, box.x1, -box.y0), lines)
    inverse = axes.transAxes.inverted()
    for text, size, circle, corner in zip(texts, sizes, circles, corners, strict=False):
        if corner is None:
            text.remove()
            continue
        text.set_transform(axes.transAxes)
        text.set_position(inverse.transform((corner[0], -corner[1])))
        x0, y0, x1, y1 = pointer(circle, corner, size)
        ends = inverse.transform([(x0, -y0), (x1, -y1)])
        axes.plot(*ends.T, color=_MUTED, linewidth=0.6, zorder=1, transform=axes.transAxes)
