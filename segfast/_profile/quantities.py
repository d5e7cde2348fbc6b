"""Figures as the table and the pages of a profile show them, and the sums and places that they share."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .facts import BETWEEN
from .rows import Profile, Row

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def digits(value: float) -> str:
    """Three digits, never more than five decimals: 1234 is "1,234", 0.01234 is "0.0123"."""
    limits = (99.95, 9.995, 0.9995, 0.09995, 0.009995)
    decimals = next((n for n, limit in enumerate(limits) if abs(value) >= limit), len(limits))
    return f"{value:,.{decimals}f}" if value else "0"


def scaled(value: float, unit: str) -> str:
    """Three digits, a decimal prefix and the unit: 12345678 FLOP is "12.3 MFLOP"."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * factor:
            return f"{digits(value / factor)} {prefix}{unit}"
    return f"{digits(value)} {unit}"


def milliseconds(us: float) -> str:
    """Microseconds as milliseconds, three digits."""
    return f"{digits(us / 1000)} ms"


def column_ms(us: float, whole_us: float) -> str:
    """Microseconds as milliseconds with the decimals of a whole column, four where all take less than 10."""
    return f"{us / 1000:,.{3 if whole_us >= 10_000 else 4}f}"


def percent(share: float) -> str:
    """A share as per cent, one decimal."""
    return f"{100 * share:.1f} %"


def shape(row: Row) -> str:
    """The output's shape, such as "1x64x128x128"."""
    return "x".join(map(str, row.output))


def label(row: Row) -> str:
    """The layer's name; where it is no layer, its kind in parentheses."""
    return row.name or f"({kind_of(row)})"


def kind_of(row: Row) -> str:
    """The row's kind, that of a fused layer in short: "conv2d+bn+act"."""
    parts = row.kind.split(" + ")
    short = {"batch_norm": "bn", "activation": "act"} if len(parts) > 1 else {}
    return "+".join(short.get(part, part) for part in parts)


def shortened(name: str, longest: int) -> str:
    """The end of a name, which tells layers apart, after an ellipsis if it is longer than `longest`."""
    return name if len(name) <= longest else "…" + name[1 - longest :]


def sums(rows: Sequence[Row], key: Callable[[Row], str]) -> list[tuple[str, list[Row]]]:
    """The rows that share a key, those that take the longest first."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return sorted(groups.items(), key=lambda item: -microseconds(item[1]))


def kinds_of(rows: Sequence[Row]) -> str:
    """The kinds of the rows, those that take the longest first."""
    return ", ".join(kind for kind, _ in sums(rows, kind_of))


def microseconds(rows: Sequence[Row]) -> float:
    """The sum of the medians."""
    return sum(row.us for row in rows)


def at_the_roof(rows: Sequence[Row]) -> float:
    """Microseconds that the rows would take at their roofs, those without a known roof as long as they do."""
    return sum(row.us * (1.0 if row.roof_share is None else min(1.0, row.roof_share)) for row in rows)


def missing_flops(rows: Sequence[Row], flops: int) -> str:
    """A sentence where the rows' FLOPs are not those of the whole model; "" where they are."""
    counted = sum(row.flops for row in rows)
    if abs(counted - flops) <= 0.01 * flops:
        return ""
    return f"The rows have {scaled(counted, 'FLOP')} of the {scaled(flops, 'FLOP')} that the whole model has."


class Advice(NamedTuple):
    """One sentence, the rows that it is about, those that take the longest first, and what they take."""

    sentence: str
    rows: list[Row]
    us: float


def advice(profile: Profile) -> list[Advice]:
    """All sentences of advice, those about the most time first."""
    told = sums([row for row in profile.rows if row.advice], lambda row: row.advice)
    return [
        Advice(sentence, sorted(rows, key=lambda row: -row.us), microseconds(rows)) for sentence, rows in told
    ]


class Span(NamedTuple):
    """A row of a profile, by its place in it, on a time axis in microseconds."""

    place: int
    start_us: float
    us: float


def timeline(rows: Sequence[Row]) -> list[Span]:
    """Every row that runs, in the order of time, the backward pass after the forward pass.

    Starts and times are medians of their own, so that a row could begin before the one before it is over: it
    is moved behind that. Where nothing runs, between the layers, are gaps.
    """
    spans = []
    cursor = 0.0
    for direction in ("forward", "backward"):
        begin = cursor
        mine = [(row.start_us, i) for i, row in enumerate(rows) if row.direction == direction]
        for start_us, place in sorted(mine):
            if rows[place].kind != BETWEEN:
                start = max(begin + start_us, cursor)
                cursor = start + rows[place].us
                spans.append(Span(place, start, rows[place].us))
    return spans
