"""The report: one self-contained HTML page (tables, inline PNG plots), and the same as text and Markdown.

Every measured row is in it, those where a peer wins too. Ratios are within one run, against the fastest peer.
"""

import base64
import collections
import html
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import ALONE
from benchmarks.crf_report import photographs
from benchmarks.network_report import network_tables
from benchmarks.rows import VERSIONS, geometric_mean, time_us
from segfast._files import atomic_write

Row = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # title, headers, lines
NO_GPU = "no GPU figure was taken"
# Ours made to run one way whichever is chosen: in the tables, but no ratio's numerator or denominator.
FORMS = ("segfast_fused", "segfast_two_kernels")
FORCED = (*FORMS, "segfast_lattice", "segfast_exact")
COLORS = {"ours": "#1b6ca8", "peer": "#b8b8b8", "floor": "#d1495b"}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em}img{max-width:100%}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;white-space:nowrap}
td,th{padding:3px 9px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,td.t{text-align:left}tr.ours td{font-weight:600;background:#eef5fb}
p.note{background:#fff6e0;border-left:4px solid #e0a800;padding:.5em 1em}
"""


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each case, dtype, direction, size and candidate: a later run replaces an earlier."""
    names = ("case", "dtype", "direction", "size", "candidate")
    kept = {tuple(row[name] for name in names): row for row in rows}
    return list(kept.values())


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows by (case, dtype, direction, size), fastest first, those without a time last."""
    groups = collections.defaultdict(list)
    for row in latest(rows):
        groups[row["case"], row["dtype"], row["direction"], row["size"]].append(row)
    for members in groups.values():
        members.sort(key=lambda row: time_us(row) if row["status"] == "ok" else math.inf)
    return dict(groups)


def best(members: Sequence[Row], ours: bool) -> Row | None:
    """The fastest measured row of ours (forced ways apart), or of the peers; None if there is none."""
    timed = [row for row in members if row["status"] == "ok" and row["ours"] == ours and time_us(row) > 0]
    return min((row for row in timed if row["candidate"] not in FORCED), key=time_us, default=None)


def ratio(members: Sequence[Row]) -> float:
    """Time of the fastest peer over ours: above 1, ours is faster; NaN where one of them is missing."""
    mine, theirs = best(members, True), best(members, False)
    return time_us(theirs) / time_us(mine) if mine and theirs else math.nan


def _figure(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def summary(rows: Sequence[Row]) -> str:
    """A short table for a terminal: one line a case. A dry run has no figures worth a table."""
    from segfast._table import format_table

    if any(row["dry_run"] for row in rows):
        counts = collections.Counter(row["status"] for row in latest(rows))
        return ", ".join(f"{count} {status}" for status, count in counts.items()) + "\n" + caveat(rows)
    lines = []
    for (case, dtype, direction, _), members in grouped(rows).items():
        mine, theirs = best(members, True), best(members, False)
        floor = members[0]["floor_us"]
        lines.append(
            (
                case,
                dtype,
                direction,
                _figure(floor),
                f"{_figure(time_us(theirs))} {theirs['candidate']}" if theirs else members[-1]["status"],
                _figure(time_us(mine)) if mine else "",
                _figure(ratio(members)),
            )
        )
    headers = ("case", "dtype", "direction", "floor us", "fastest peer us", "segfast us", "ratio")
    text = format_table(headers, lines)
    mean = geometric_mean([ratio(members) for members in grouped(rows).values()])
    if not math.isnan(mean) and not on_cpu(rows):
        text += f"\ngeometric mean of the ratios: {mean:.3g}"
    return text + "\n" + caveat(rows)


def on_cpu(rows: Sequence[Row]) -> bool:
    """True if no row was measured on a GPU."""
    return not any(row["gpu"] not in ("", "cpu") for row in rows)


def caveat(rows: Sequence[Row]) -> str:
    """A sentence on how the figures were taken."""
    if any(row["dry_run"] for row in rows):
        return f"Dry run on a CPU: the control flow was walked, {NO_GPU}."
    if on_cpu(rows):
        return (
            f"CPU figures (batch 1, fp32, small sizes, one thread, but where a row says so): {NO_GPU}. "
            "segfast.optimize, which chooses on a CPU by timing, is no part of these calls: they run ATen's "
            "operations, or what it chose here before; others of ATen's, or fewer, with fixed bilinear "
            "weights, with a batch norm that folds into a filter, in a segmentation head and in a dense CRF. "
            "Elsewhere expect ratios near 1 and noise."
        )
    return f"Measured on {', '.join(sorted({row['gpu'] for row in rows if row['gpu']}))}."


def markdown(rows: Sequence[Row]) -> str:
    """The table of all rows as Markdown, and those of layer and block and of the forms."""
    groups = grouped(rows)
    lines = [[cell(row) for _, cell in COLUMNS] for members in groups.values() for row in members]
    return markdown_tables([("", [header for header, _ in COLUMNS], lines), *_special_tables(groups)])


def markdown_tables(tables: Iterable[Table]) -> str:
    """Tables with their titles."""
    text = ""
    for title, headers, body in tables:
        text += f"\n## {title}\n\n" if title else ""
        text += "".join("| " + " | ".join(line) + " |\n" for line in (headers, ["---"] * len(headers), *body))
    return text


def _special_tables(groups: Mapping[tuple, Sequence[Row]]) -> list[Table]:
    """The tables that set cases or candidates side by side."""
    tables = [
        ("Depthwise: the layer alone, and with batch norm and activation", *_layer_and_block(groups)),
        ("Separable convolution: both forms, and the memory of a call", *_forms(groups)),
        ("Dense CRF: the median and the worst photograph", *photographs(groups)),
        *network_tables(row for members in groups.values() for row in members),
    ]
    return [table for table in tables if table[2]]


def _layer_and_block(groups: Mapping[tuple, Sequence[Row]]) -> tuple[list[str], list[list[str]]]:
    figures = ("peer us", "segfast us", "ratio")
    columns = ["case", "dtype", "direction"]
    columns += [f"{part} {name}" for part in ("layer", "block") for name in figures]
    lines = []
    for (case, *key), block in groups.items():
        layer = groups.get((ALONE.get(case), *key))
        if layer is None:
            continue
        line = [case, key[0], key[1]]
        for members in (layer, block):
            pair = best(members, False), best(members, True)
            line += [*(_figure(time_us(row)) if row else "" for row in pair), _figure(ratio(members))]
        lines.append(line)
    return columns, lines


def _forms(groups: Mapping[tuple, Sequence[Row]]) -> tuple[list[str], list[list[str]]]:
    columns = ["case", "dtype", "direction", "fused us", "two kernels us", "chosen us", "peer us"]
    columns += ["segfast peak MB", "fused peak MB", "unfused pair's peak MB"]
    lines = []
    for (case, dtype, direction, _), members in groups.items():
        named = {row["candidate"]: row for row in members if row["status"] == "ok"}
        if not named.keys() & set(FORMS):
            continue
        timed = [named.get(name) for name in (*FORMS, "segfast")] + [best(members, False)]
        weighed = [named.get(name) for name in ("segfast", FORMS[0], "aten_nhwc")]
        line = [case, dtype, direction, *(_figure(time_us(row)) if row else "" for row in timed)]
        lines.append(line + [_figure(row["peak_mb"]) if row else "" for row in weighed])
    return columns, lines


COLUMNS = (
    ("candidate", lambda row: row["candidate"] or "(case)"),
    ("case", lambda row: f"{row['case']} {row['dtype']} {row['direction']}"),
    ("gpu us", lambda row: _figure(row["gpu_us"])),
    ("p20", lambda row: _figure(row["gpu_p20"] if row["gpu_us"] > 0 else row["wall_p20"])),
    ("p80", lambda row: _figure(row["gpu_p80"] if row["gpu_us"] > 0 else row["wall_p80"])),
    ("wall us", lambda row: _figure(row["wall_us"])),
    ("graph us", lambda row: _figure(row["graph_us"])),
    ("floor us", lambda row: f"{_figure(row['floor_us'])} {row['floor_by']}".strip()),
    ("of floor", lambda row: "" if math.isnan(row["fraction"]) else f"{100 * row['fraction']:.0f} %"),
    ("error", lambda row: "" if math.isnan(row["error"]) else f"{row['error']:.1e}"),
    ("peak MB", lambda row: _figure(row["peak_mb"])),
    ("first call ms", lambda row: _figure(row["cold_ms"])),
    ("status", lambda row: " ".join(filter(None, [row["status"], row["note"]]))),
)
_TEXT = ("candidate", "case", "status")


def _case_table(rows: Sequence[Row]) -> str:
    # Columns in which no row has a figure (device times on a CPU) are left out.
    columns = [
        (header, cell)
        for header, cell in COLUMNS
        if header != "case" and (header in _TEXT or any(cell(row) for row in rows))
    ]
    lines = [[cell(row) for _, cell in columns] for row in rows]
    ours = {i for i, row in enumerate(rows) if row["ours"]}
    return _table([header for header, _ in columns], lines, left=1, marked=ours)


def _overview(groups: Mapping[tuple, Sequence[Row]]) -> str:
    """One line a case: the fastest peer, ours, the ratio."""
    floors = any(members[0]["floor_us"] > 0 for members in groups.values())
    columns = ["case", "dtype", "direction", "fastest peer", "us", "segfast us", "ratio"]
    lines = []
    for (case, dtype, direction, _), members in groups.items():
        mine, theirs = best(members, True), best(members, False)
        line = [case, dtype, direction]
        line.append(theirs["candidate"] if theirs else members[-1]["status"])
        line += [_figure(time_us(row)) if row else "" for row in (theirs, mine)]
        line.append(_figure(ratio(members)))
        lines.append(line + ([_figure(members[0]["floor_us"])] if floors else []))
    return _table(columns + ["floor us"] * floors, lines, left=4)


def _table(
    columns: Sequence[str], lines: Sequence[Sequence[str]], left: int, marked: Collection[int] = ()
) -> str:
    """An HTML table; the first `left` columns and "status" are text, the lines `marked` are ours."""
    kinds = [" class=t" if i < left or column == "status" else "" for i, column in enumerate(columns)]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = []
    for i, line in enumerate(lines):
        cells = "".join(f"<td{kind}>{html.escape(text)}</td>" for kind, text in zip(kinds, line, strict=True))
        body.append(f"<tr{' class=ours' if i in marked else ''}>{cells}</tr>")
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def plot(groups: Mapping[tuple, Sequence[Row]], family: str) -> bytes:
    """A PNG of one family: a bar for each candidate's time, with the floor where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars: list[tuple[float, str, Row]] = []
    place = 0.0
    for (case, dtype, direction, _), members in groups.items():
        timed = [row for row in members if row["status"] == "ok" and time_us(row) > 0]
        for i, row in enumerate(timed):
            label = f"{case}, {dtype}, {direction}: {row['candidate']}" if i == 0 else row["candidate"]
            bars.append((place, label, row))
            place += 1
        place += 0.7 if timed else 0
    figure = Figure(figsize=(10, 1.2 + 0.2 * max(1.0, place)))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, _, row in bars:
        clock = "gpu" if row["gpu_us"] > 0 else "wall"
        low, high, floor = row[f"{clock}_p20"], row[f"{clock}_p80"], row["floor_us"]
        axes.barh(y, time_us(row), color=COLORS["ours" if row["ours"] else "peer"])
        if not math.isnan(low):
            axes.plot([low, high], [y, y], color="#444", linewidth=1)
        if not math.isnan(floor):
            axes.plot([floor, floor], [y - 0.45, y + 0.45], color=COLORS["floor"], linewidth=2)
    axes.set_yticks([y for y, *_ in bars], [label for _, label, _ in bars], fontsize=8)
    axes.set_ylim(place, -1)
    axes.set_xscale("log")
    axes.set_xlabel("microseconds, log scale (blue: segfast, gray: peers, line: p20 to p80, red: floor)")
    axes.set_title(family)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def html_page(rows: Sequence[Row], title: str = "segfast benchmark") -> str:
    """The whole report as one page without outside references."""
    groups = grouped(rows)
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p class=note>{html.escape(caveat(rows))}</p>"]
    if rows:
        last = rows[-1]
        parts.append("<p>" + html.escape(", ".join(f"{n} {last[n]}" for n in VERSIONS if last[n])) + "</p>")
    parts.append(
        "<p>Times are medians. The ratio is the fastest peer's time over ours, within one run: above 1, ours "
        "is faster. The floor is the largest of FLOPs, bytes, L2 reads (as tiles of 128x256 need them) and "
        "exponentials, over ceilings measured in the same run.</p>"
    )
    mean = geometric_mean([ratio(members) for members in groups.values()])
    if not math.isnan(mean) and not on_cpu(rows):
        parts.append(f"<p>Geometric mean of the ratios: {mean:.3g}.</p>")
    parts.append(_overview(groups))
    for heading, columns, lines in _special_tables(groups):
        parts += [f"<h2>{heading}</h2>", _table(columns, lines, left=3)]
    for family in dict.fromkeys(row["family"] for row in latest(rows)):
        mine = {key: members for key, members in groups.items() if members[0]["family"] == family}
        parts.append(f"<h2>{html.escape(family or 'died')}</h2>")
        if any(row["status"] == "ok" and time_us(row) > 0 for members in mine.values() for row in members):
            image = base64.b64encode(plot(mine, family)).decode()
            parts.append(f'<img alt="times of {html.escape(family)}" src="data:image/png;base64,{image}">')
        for (case, dtype, direction, size), members in mine.items():
            layer = members[0]["layer"]
            parts.append(f"<h3>{html.escape(f'{case}: {layer} ({dtype}, {direction}, {size})')}</h3>")
            parts.append(_case_table(members))
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def write_report(rows: Sequence[Row], path: Path, title: str = "segfast benchmark") -> None:
    """Write the HTML page, whole or not at all."""
    page = html_page(rows, title)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
