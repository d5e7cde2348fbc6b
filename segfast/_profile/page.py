"""A profile as one HTML page that needs nothing else: drawings, a table that sorts, before and after."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from .charts import (
    Classes,
    layer_bars,
    legend,
    name_html,
    roofline_svg,
    stacked,
    sum_bars,
    timeline_html,
    tip,
)
from .colors import colors, layers
from .quantities import (
    advice,
    at_the_roof,
    column_ms,
    digits,
    kind_of,
    kinds_of,
    label,
    microseconds,
    milliseconds,
    scaled,
    shape,
    shortened,
)
from .rows import Profile, Row
from .table import gain_sentence, roof_sentence, sums_sentence

# Layers that changed the most, and sentences of advice that stand without being asked for.
_CHANGES = 20
_ADVICE = 8


class Column(NamedTuple):
    """A column of the table: header, unit, the cell's text, and the value to sort by (of a number)."""

    name: str
    unit: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | None] | None = None


def html_page(profile: Profile) -> str:
    """The page. It loads nothing, names are escaped, and it can be read without JavaScript."""
    views = [("a", profile)] + ([("b", profile.optimized)] if profile.optimized is not None else [])
    hues = colors([row for _, each in views for row in each.rows])
    classes = {kind: f"k{i}" for i, kind in enumerate(hues)}
    body = [_header(profile), _advice(profile)]
    if profile.optimized is not None:
        body.append(_comparison(profile, profile.optimized, classes))
        body.append(
            '<div class="switch"><button data-view="a">before</button>'
            '<button data-view="b">after</button></div>'
        )
    body += [_view(each, view, classes) for view, each in views]
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"segfast profile: {profile.title}"),
        light="".join(f".{classes[kind]}{{--c:{light}}}" for kind, (light, _) in hues.items()),
        dark="".join(f".{classes[kind]}{{--c:{dark}}}" for kind, (_, dark) in hues.items()),
        body="\n".join(body),
    )


def _header(profile: Profile) -> str:
    rows = profile.rows
    flops, moved = sum(row.flops for row in rows), sum(row.bytes for row in rows)
    seconds = profile.plain_us / 1e6
    ideal = at_the_roof(rows)
    images = f"{digits(profile.batch / seconds)} images/s"
    tiles = [
        (
            "a pass, forward and backward" if profile.train else "a forward pass",
            milliseconds(profile.plain_us),
            images,
        ),
        ("arithmetic", scaled(flops, "FLOP"), f"{scaled(flops / seconds, 'FLOP/s')} on average"),
        ("memory traffic at least", scaled(moved, "B"), f"{scaled(moved / seconds, 'B/s')} on average"),
    ]
    if any(row.roof_share is not None for row in rows):
        times = f"{microseconds(rows) / ideal:.2f} times as fast" if ideal else ""
        tiles.append(("if every row reached its roof", milliseconds(ideal), times))
    if profile.optimized is not None:
        after = profile.optimized.plain_us
        tiles.append(("optimized", milliseconds(after), f"{profile.plain_us / after:.2f} times as fast"))
    elif profile.expected_gain is not None and profile.expected_gain > 1:
        after = profile.plain_us / profile.expected_gain
        gain = f"{profile.expected_gain:.2f} times as fast"
        tiles.append(("expected of segfast.optimize", milliseconds(after), gain))
    cells = "".join(
        f'<div class="tile"><span>{name}</span><strong>{value}</strong><span>{note}</span></div>'
        for name, value, note in tiles
    )
    remarks = "".join(f'<p class="note">{escape(remark)}</p>' for remark in profile.remarks)
    return (
        f"<header><h1>{escape(profile.title)}</h1><p>{escape(roof_sentence(profile.roof))}</p></header>"
        f'<div class="tiles">{cells}</div><p class="note">{sums_sentence(profile)}</p>{remarks}'
    )


def _advice(profile: Profile) -> str:
    told = advice(profile)
    if not told:
        return ""
    places = {id(row): index for index, row in enumerate(profile.rows)}
    items = []
    for sentence, rows, us in told:
        names = label(rows[0]) + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
        items.append(
            f'<li data-r="a{places[id(rows[0])]}"><span class="time">{milliseconds(us)}</span>'
            f"{name_html(names)}<span>{escape(sentence)}</span></li>"
        )
    text = f'<ul class="advice">{"".join(items[:_ADVICE])}</ul>'
    if items[_ADVICE:]:
        more = f"<summary>{len(items) - _ADVICE} more</summary>"
        text += f'<details>{more}<ul class="advice">{"".join(items[_ADVICE:])}</ul></details>'
    gain = "" if profile.optimized is not None else gain_sentence(profile)
    return _card("What segfast would do", text + (f'<p class="note">{gain}</p>' if gain else ""))


def _comparison(profile: Profile, after: Profile, classes: Classes) -> str:
    """Before and after: the whole by kind, and the layers whose time changed the most."""
    longest = max(microseconds(profile.rows), microseconds(after.rows)) or 1.0
    bars = "".join(
        f'<div class="bar"><span>{name}</span>{stacked(each.rows, longest, classes)}'
        f"<span>{milliseconds(microseconds(each.rows))}</span></div>"
        for name, each in (("before", profile), ("after", after))
    )
    befores, afters = dict(layers(profile.rows)), dict(layers(after.rows))
    pairs = [(name, befores.get(name, []), afters.get(name, [])) for name in {**befores, **afters}]
    pairs.sort(key=lambda pair: -abs(microseconds(pair[1]) - microseconds(pair[2])))
    lines = [_change(profile.whole_us, *pair) for pair in pairs[:_CHANGES]]
    rest = pairs[_CHANGES:]
    if rest:
        was = [row for _, rows, _ in rest for row in rows]
        now = [row for _, _, rows in rest for row in rows]
        lines.append(_change(profile.whole_us, f"{len(rest)} more", was, now, kinds=False))
    head = (
        '<tr><th class="t">layer</th><th class="t">kind before</th><th class="t">kind after</th>'
        "<th>before<small>ms</small></th><th>after<small>ms</small></th><th>change<small>ms</small></th>"
        "<th>times as fast</th></tr>"
    )
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'
    note = f'<p class="note">{gain_sentence(profile)}</p>'
    return _card("Before and after", f'{legend(classes)}<div class="bars compare">{bars}</div>{note}{table}')


def _change(
    whole_us: float, name: str, before: Sequence[Row], after: Sequence[Row], kinds: bool = True
) -> str:
    was, now = microseconds(before), microseconds(after)
    cells = [escape(kinds_of(rows)) or "none" for rows in (before, after)] if kinds else ["", ""]
    sign = "+" if now > was else ""
    figures = [column_ms(us, whole_us) for us in (was, now, now - was)]
    figures[-1] = sign + figures[-1]
    figures.append(f"{was / now:.2f}" if was and now else "")
    return (
        f'<tr><th class="t">{name_html(shortened(name, 60))}</th>'
        + "".join(f'<td class="t">{cell}</td>' for cell in cells)
        + "".join(f"<td>{figure}</td>" for figure in figures)
        + "</tr>"
    )


def _view(profile: Profile, view: str, classes: Classes) -> str:
    if not profile.rows:
        return f'<section id="view-{view}">{_card("Rows", "No call of a layer was measured.")}</section>'
    mine = {kind: css for kind, css in classes.items() if any(kind_of(row) == kind for row in profile.rows)}
    zoom = "".join(f'<button data-zoom="{times}">{times}x</button>' for times in (1, 4, 16))
    cards = [
        '<div class="pair">'
        + _card("By kind of operation", sum_bars(profile, kind_of, mine))
        + _card("By what bounds it", sum_bars(profile, lambda row: row.bound or "not known", mine))
        + "</div>",
        _card("Roofline", roofline_svg(profile, view, mine), "A point a row; its area is its time."),
        _card(
            "By layer",
            layer_bars(profile, view, mine),
            "The tick is the time at the roof." + " Backward is lighter." * profile.train,
        ),
        _card(f'Timeline<span class="zoom">{zoom}</span>', timeline_html(profile, view, mine)),
        _card("All rows", _table(profile, view), "In the order of the calls. A click on a header sorts."),
    ]
    if profile.kernels:
        cards.append(_card("Operators and kernels", _kernels(profile)))
    return f'<section id="view-{view}">{"".join(cards)}</section>'


def _card(heading: str, content: str, note: str = "") -> str:
    told = f'<span class="note">{note}</span>' if note else ""
    return f'<div class="card"><h2>{heading}{told}</h2>{content}</div>'


def _columns(profile: Profile) -> list[Column]:
    def number(digits: int, scale: float, value: Callable[[Row], float | None]) -> dict:
        def text(row: Row) -> str:
            figure = value(row)
            return "" if not figure else f"{figure / scale:,.{digits}f}"

        return {"text": text, "value": value}

    whole = profile.whole_us
    return [
        Column("pass", "", lambda row: row.direction if profile.train else ""),
        Column("kind", "", kind_of),
        Column("time", "ms", lambda row: column_ms(row.us, whole), lambda row: row.us),
        Column("p20", "ms", lambda row: column_ms(row.p20_us, whole), lambda row: row.p20_us),
        Column("p80", "ms", lambda row: column_ms(row.p80_us, whole), lambda row: row.p80_us),
        Column("share", "%", lambda row: f"{100 * row.us / whole:.1f}", lambda row: row.us),
        Column("arithmetic", "GFLOP", **number(3, 1e9, lambda row: row.flops)),
        Column("moves", "MB", **number(2, 1e6, lambda row: row.bytes)),
        Column("intensity", "FLOP/B", **number(1, 1, lambda row: row.intensity)),
        Column("rate", "GFLOP/s", **number(1, 1e3, lambda row: row.flops / row.us if row.us else None)),
        Column("rate", "GB/s", **number(2, 1e3, lambda row: row.bytes / row.us if row.us else None)),
        Column("of roof", "%", **number(1, 0.01, lambda row: row.roof_share)),
        Column("bound by", "", lambda row: row.bound),
        Column("output", "", shape),
        Column("dtype", "", lambda row: row.dtype),
        Column("layout", "", lambda row: row.memory_format),
        Column("peak", "MB", **number(2, 1e6, lambda row: row.peak_bytes)),
        Column("what segfast would do", "", lambda row: row.advice),
    ]


def _table(profile: Profile, view: str) -> str:
    # A column in which nothing stands says nothing.
    columns = [column for column in _columns(profile) if any(column.text(row) for row in profile.rows)]
    heads = ['<th data-n class="n"><button>#</button></th>', '<th class="t"><button>layer</button></th>']
    for column in columns:
        kind = ' class="t"' if column.value is None else " data-n"
        unit = f"<small>{column.unit}</small>" if column.unit else ""
        heads.append(f"<th{kind}><button>{column.name}{unit}</button></th>")
    longest = max((row.us for row in profile.rows), default=0.0) or 1.0
    lines = []
    for index, row in enumerate(profile.rows):
        name = escape(label(row))
        cells = [
            f'<td class="n" data-v="{index}">{index + 1}</td>',
            f'<th class="t" title="{name}"><bdi>{name}</bdi></th>',
        ]
        cells += [_cell(column, row, longest) for column in columns]
        text = escape(tip(row, profile.whole_us))
        lines.append(f'<tr id="{view}{index}" data-us="{row.us:.3f}" data-tip="{text}">{"".join(cells)}</tr>')
    find = '<input type="search" placeholder="filter: name, kind, bound ..." aria-label="filter the rows">'
    return (
        f'<div class="find">{find}<output></output></div><div class="scroll rows"><table class="sorts">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(column: Column, row: Row, longest: float) -> str:
    text = escape(column.text(row))
    if column.value is None:
        return f'<td class="t">{text}</td>'
    value = column.value(row)
    bar = f' class="share" style="--w:{100 * row.us / longest:.1f}%"' if column.name == "share" else ""
    return f'<td{bar} data-v="{-1 if value is None else value:.6g}">{text}</td>'


def _kernels(profile: Profile) -> str:
    lines: Sequence[str] = [
        f'<tr><th class="t" title="{escape(name)}">{escape(name)}</th><td data-v="{calls}">{calls}</td>'
        f'<td data-v="{us:.6g}">{column_ms(us, profile.whole_us)}</td></tr>'
        for name, calls, us in profile.kernels
    ]
    head = (
        '<th class="t"><button>name</button></th><th data-n><button>calls</button></th>'
        "<th data-n><button>time<small>ms a pass</small></button></th>"
    )
    return (
        f'<div class="scroll rows"><table class="sorts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
