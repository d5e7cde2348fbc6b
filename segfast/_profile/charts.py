"""The drawings of a profile's page as HTML and SVG: roofline, bars, timeline. What they say is escaped.

A mark bears the id of its row in the table (`data-r`), where the text that is shown on hovering stands.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from .colors import layers
from .quantities import (
    at_the_roof,
    digits,
    kind_of,
    kinds_of,
    label,
    microseconds,
    milliseconds,
    percent,
    scaled,
    shape,
    sums,
    timeline,
)
from .roofline import (
    LABELS,
    LONGEST_NAME,
    NO_POINTS,
    Roofline,
    name_of,
    place_labels,
    plots,
    pointer,
    radius,
    roofline,
    spread,
    tick_name,
    ticks,
)
from .rows import Profile, Row
from .table import above_sentence

_WIDTH, _HEIGHT = 1180, 500
_LEFT, _TOP, _RIGHT, _BOTTOM = 96, 8, 1005, 452
_TEXT_WIDTH, _TEXT_HEIGHT = 6.6, 15.0
# Layers that have bars of their own.
_BARS = 20

Classes = Mapping[str, str]  # the CSS class of each kind's color


def roofline_svg(profile: Profile, view: str, classes: Classes) -> str:
    """The layers' points under the measured roofs."""
    plot = roofline(profile)
    longest = plot.points[0].us if plot.points else 0.0
    parts = _axes(plot)
    lines = _roofs(plot, parts)
    circles = [(*_place(plot, p.intensity, p.rate), radius(p.us, longest)) for p in plot.points]
    names = [name_of(profile.rows[point.place], LONGEST_NAME) for point in plot.points[:LABELS]]
    sizes = [(_TEXT_WIDTH * len(name), _TEXT_HEIGHT) for name in names]
    corners = place_labels(circles, sizes, (_LEFT, _TOP, _RIGHT, _BOTTOM), lines)
    texts = []
    for name, size, circle, corner in zip(names, sizes, circles, corners, strict=False):
        if corner is not None:
            line = pointer(circle, corner, size)
            parts.append(_line("pointer", *line))
            # Text is narrower than its box: it begins or ends at the side that the pointer comes from.
            anchor, left = ("end", corner[0] + size[0]) if line[2] < circle[0] else ("start", corner[0])
            texts.append(_text("", left, corner[1] + 12, name, anchor))
    for point, (x, y, r) in zip(plot.points, circles, strict=True):
        kind = classes[kind_of(profile.rows[point.place])]
        parts.append(
            f'<circle class="{kind}" data-r="{view}{point.place}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
        )
    if not plot.points:
        texts.append(_text("", (_LEFT + _RIGHT) / 2, _BOTTOM - 60, NO_POINTS, "middle"))
    kinds = {kind_of(profile.rows[point.place]) for point in plot.points}
    plotted = {kind: css for kind, css in classes.items() if kind in kinds}
    what = f"Roofline of {len(plot.points)} rows: FLOP a second over FLOP a byte, both logarithmic."
    return (
        f'{legend(plotted)}<div class="scroll"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{what}">{"".join([*parts, *texts])}</svg></div>{_notes(profile.rows, profile.whole_us)}'
    )


def _place(plot: Roofline, intensity: float, rate: float) -> tuple[float, float]:
    right = math.log(intensity / plot.x[0]) / math.log(plot.x[1] / plot.x[0])
    up = math.log(rate / plot.y[0]) / math.log(plot.y[1] / plot.y[0])
    return _LEFT + right * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)


def _axes(plot: Roofline) -> list[str]:
    parts = []
    for tick in ticks(plot.x):
        x, _ = _place(plot, tick, plot.y[0])
        parts += [
            _line("grid", x, _TOP, x, _BOTTOM),
            _text("note", x, _BOTTOM + 18, f"{tick:,.10g}", "middle"),
        ]
    for tick in ticks(plot.y):
        _, y = _place(plot, plot.x[0], tick)
        parts += [
            _line("grid", _LEFT, y, _RIGHT, y),
            _text("note", _LEFT - 8, y + 4, tick_name(tick), "end"),
        ]
    middle = (_LEFT + _RIGHT) / 2
    parts.append(_text("note", middle, _BOTTOM + 40, "arithmetic intensity, FLOP/B", "middle"))
    return parts


def _roofs(plot: Roofline, parts: list[str]) -> list[tuple[float, float, float, float]]:
    """Add the slope, the levels and their names to `parts`; the ends of each line."""
    lines = [(*_place(plot, *first), *_place(plot, *last)) for first, last in plot.roofs()]
    parts += [_line("roof", *line) for line in lines]
    heights = spread([line[1] for line in lines[1:]], _TEXT_HEIGHT)
    for (name, _), y in zip(plot.levels, heights, strict=True):
        parts.append(_text("note", _RIGHT + 8, y + 4, name))
    x0, y0, x1, y1 = lines[0]
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    turn = f' transform="rotate({angle:.2f} {x0:.1f} {y0:.1f}) translate(10 -7)"'
    parts.append(_text("note", x0, y0, f"memory {scaled(plot.bytes_per_s, 'B/s')}", more=turn))
    return lines


def _line(kind: str, x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line class="{kind}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _notes(rows: Sequence[Row], whole_us: float) -> str:
    """Sentences on the points above the roof and the rows without a point."""
    left = [row for row in rows if not plots(row)]
    notes = [above_sentence([row for row in rows if plots(row)])]
    if left:
        us = microseconds(left)
        share = f"{milliseconds(us)} ({percent(us / whole_us)})"
        count = f"{len(left)} of {len(rows)} rows"
        notes.append(f"Not in the plot, as no arithmetic is counted: {count}, {share}: {kinds_of(left)}.")
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes if note)


def legend(classes: Classes) -> str:
    """The colors of the kinds."""
    items = "".join(f'<li><i class="{css}"></i>{escape(kind)}</li>' for kind, css in classes.items())
    return f'<ul class="legend">{items}</ul>'


def name_html(name: str) -> str:
    """A name that is cut at its beginning where there is no room for it."""
    return f'<span class="name" title="{escape(name)}"><bdi>{escape(name)}</bdi></span>'


def sum_bars(profile: Profile, key: Callable[[Row], str], classes: Classes) -> str:
    """A bar for all rows that share a key, in the colors of their kinds."""
    bars = [(name, f"{len(rows)}", rows, "") for name, rows in sums(profile.rows, key)]
    return _bars(profile, bars, classes)


def layer_bars(profile: Profile, view: str, classes: Classes) -> str:
    """A bar for each of the layers that take the longest, and one for the rest."""
    found = layers(profile.rows)
    # A bar stands for the row of its layer that takes the longest.
    ascending = sorted(enumerate(profile.rows), key=lambda item: item[1].us)
    of_layer = {label(row): place for place, row in ascending}
    bars = [(name, kinds_of(rows), rows, f"{view}{of_layer[name]}") for name, rows in found[:_BARS]]
    rest = [row for _, rows in found[_BARS:] for row in rows]
    if rest:
        bars.append((f"{len(found) - _BARS} more", "", rest, ""))
    return _bars(profile, bars, classes, roofs=True)


def _bars(
    profile: Profile, bars: Sequence[tuple[str, str, list[Row], str]], classes: Classes, roofs: bool = False
) -> str:
    """Bars: name, note, rows and the row that a bar stands for, "" if for none; ticks at their roofs."""
    longest = max((microseconds(rows) for _, _, rows, _ in bars), default=0.0) or 1.0
    parts = []
    for name, note, rows, row_id in bars:
        us = microseconds(rows)
        pieces = "".join(
            f'<i class="{classes[kind]}{" back" * (direction == "backward")}" '
            f'style="width:{100 * microseconds(part) / longest:.3f}%"></i>'
            for direction in ("forward", "backward")
            for kind, part in sums([row for row in rows if row.direction == direction], kind_of)
        )
        known = roofs and all(row.roof_share is not None for row in rows)
        tick = f'<b style="left:{100 * at_the_roof(rows) / longest:.3f}%"></b>' if known else ""
        mark = f' data-r="{row_id}"' if row_id else ""
        parts.append(
            f'<div class="bar"{mark}>{name_html(name)}'
            f'<span class="note">{escape(note)}</span><span class="track">{pieces}{tick}</span>'
            f"<span>{milliseconds(us)}</span><span>{percent(us / profile.whole_us)}</span></div>"
        )
    return f'<div class="bars">{"".join(parts)}</div>'


def stacked(rows: Sequence[Row], longest: float, classes: Classes) -> str:
    """All rows in one bar by kind, as long as their time is of `longest`."""
    pieces = "".join(
        f'<i class="{classes[kind]}" style="width:{100 * microseconds(part) / longest:.3f}%" '
        f'title="{escape(kind)}: {milliseconds(microseconds(part))}"></i>'
        for kind, part in sums(rows, kind_of)
    )
    return f'<span class="track tall">{pieces}</span>'


def timeline_html(profile: Profile, view: str, classes: Classes) -> str:
    """A block for each row from left to right as time goes; a scroll bar once it is zoomed."""
    spans = timeline(profile.rows)
    if not spans:
        return '<p class="note">No row has a time.</p>'
    whole = spans[-1].start_us + spans[-1].us or 1.0
    marks = []
    start = 0.0
    for direction in ("forward", "backward"):
        mine = [span for span in spans if profile.rows[span.place].direction == direction]
        if mine:
            us = mine[-1].start_us + mine[-1].us - start
            name = f"{direction}, {milliseconds(us)}"
            marks.append(f'<div class="pass" style="{_extent(start, us, whole)}">{name}</div>')
            start += us
    blocks = [
        f'<div class="block" data-r="{view}{span.place}" style="{_extent(span.start_us, span.us, whole)}">'
        f'<span class="{classes[kind_of(row)]}">{escape(label(row))}</span></div>'
        for span in spans
        for row in [profile.rows[span.place]]
    ]
    step = 10.0 ** math.floor(math.log10(whole / 1000))
    step = next(s for s in (step / 10, step / 5, step / 2, step) if whole / 1000 / s <= 12)
    axis = "".join(
        f'<div class="{"fine" if i % 5 else "coarse"}" style="left:{100 * i * step * 200 / whole:.3f}%">'
        f"{f'{i * step / 5:,.6g}'} ms</div>"
        # The last ones have no room for their text.
        for i in range(int(0.97 * whole / 1000 / step * 5) + 1)
    )
    return (
        '<div class="timeline"><div class="zoomed"><div class="passes">'
        f'{"".join(marks)}</div><div class="lane">{"".join(blocks)}</div><div class="axis">{axis}</div>'
        "</div></div>"
    )


def _extent(start: float, length: float, whole: float) -> str:
    return f"left:{100 * start / whole:.4f}%;width:{100 * length / whole:.4f}%"


def tip(row: Row, whole_us: float) -> str:
    """All there is to say of a row, a line each."""
    facts = [kind_of(row), row.direction, shape(row), row.dtype, row.memory_format]
    lines = [label(row), ", ".join(filter(None, facts))]
    lines.append(
        f"{milliseconds(row.us)} (p20 {milliseconds(row.p20_us)}, p80 {milliseconds(row.p80_us)}), "
        f"{percent(row.us / whole_us)} of the pass"
    )
    if row.bytes:
        arithmetic = f"{scaled(row.flops, 'FLOP')}, " if row.flops else ""
        intensity = f", {digits(row.intensity)} FLOP/B" if row.flops else ""
        lines.append(f"{arithmetic}{scaled(row.bytes, 'B')} at least{intensity}")
    rates = [scaled(row.flops / row.us * 1e6, "FLOP/s")] if row.flops and row.us else []
    rates += [scaled(row.bytes / row.us * 1e6, "B/s")] if row.bytes and row.us else []
    rates += [] if row.roof_share is None else [f"{percent(row.roof_share)} of the roof"]
    rates += [f"bound by {row.bound}"] if row.bound else []
    lines += [", ".join(rates)] if rates else []
    if row.peak_bytes is not None:
        lines.append(f"peak memory {scaled(row.peak_bytes, 'B')}")
    if row.candidates:
        lines.append("candidates: " + ", ".join(f"{name} {milliseconds(us)}" for name, us in row.candidates))
    return "\n".join([*lines, *filter(None, [row.advice])])
