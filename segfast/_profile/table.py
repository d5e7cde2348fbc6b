"""A profile as text for a terminal: the rows that take the longest, their sums, and what could be done."""

from collections.abc import Sequence

from .._table import format_table
from .quantities import (
    advice,
    column_ms,
    digits,
    kind_of,
    label,
    microseconds,
    milliseconds,
    percent,
    scaled,
    shape,
    shortened,
)
from .rows import Profile, Roof, Row

# Rows of their own, and sentences.
_TOP = 15
_LONGEST_NAME = 40
_TEXT = ("layer", "kind", "pass", "bound by", "output", "layout")


def profile_text(profile: Profile) -> str:
    """The table, the sums and the sentences; of an optimized model as well, where there is one."""
    parts = [profile.title, roof_sentence(profile.roof), "", _table(profile), "", *sentences(profile)]
    if profile.kernels:
        parts += ["", _kernels(profile)]
    if profile.optimized is not None:
        parts += ["", "Optimized", "", _table(profile.optimized), "", *sentences(profile.optimized)]
        parts += ["", gain_sentence(profile)]
    return "\n".join(parts)


def roof_sentence(roof: Roof) -> str:
    """The device and the rates that were measured on it."""
    threads = "" if roof.threads is None else f", {roof.threads} thread{'s' * (roof.threads != 1)}"
    rates = ", ".join(f"{scaled(rate, 'FLOP/s')} in {dtype}" for dtype, rate in roof.flops_per_s.items())
    return f"{roof.device}{threads}. Measured roof: {rates}; {scaled(roof.bytes_per_s, 'B/s')} of memory."


def gain_sentence(profile: Profile) -> str:
    """How much faster the optimized model is, or is expected to be; "" where nothing is known."""
    before = profile.plain_us
    if profile.optimized is not None:
        after = profile.optimized.plain_us
        times = f"{milliseconds(before)} before, {milliseconds(after)} after"
        return f"Optimized: {times}, {before / after:.2f} times as fast."
    if profile.expected_gain is None:
        return ""
    if profile.expected_gain <= 1:
        return "segfast.optimize is not expected to make it faster."
    expected = milliseconds(before / profile.expected_gain)
    return f"Expected of segfast.optimize: {profile.expected_gain:.2f} times as fast, {expected} a pass."


def sums_sentence(profile: Profile) -> str:
    """The measured whole, how much of it the rows are, and what watching costs."""
    more = profile.whole_us - profile.plain_us
    slower = f"watching makes it {percent(more / profile.plain_us)} slower"
    cost = slower if more > 0 else "watching costs less than the times vary"
    rows = percent(microseconds(profile.rows) / profile.whole_us)
    return (
        f"A pass takes {milliseconds(profile.plain_us)}, watched {milliseconds(profile.whole_us)}: "
        f"{cost}. The rows add up to {rows} of the watched pass."
    )


def above_sentence(rows: Sequence[Row]) -> str:
    """The reasons why rows reach more than their roof; "" if none does."""
    above = sum(row.roof_share is not None and row.roof_share > 1.05 for row in rows)
    if not above:
        return ""
    return (
        f"{above} of {len(rows)} rows are above the roof: caches are faster than memory, and Winograd's "
        "method and padding take fewer operations than are counted."
    )


def sentences(profile: Profile) -> list[str]:
    """The sums, the advice about the rows that take the longest, the expected gain, and the remarks."""
    lines = [sums_sentence(profile), *filter(None, [above_sentence(profile.rows)])]
    told = advice(profile)
    if told:
        lines += ["", "What segfast would do:"]
        for sentence, rows, us in told[:_TOP]:
            first = shortened(label(rows[0]), _LONGEST_NAME)
            names = first if len(rows) == 1 else f"{first} and {len(rows) - 1} more"
            lines.append(f"  {names} ({milliseconds(us)}): {sentence}")
        if len(told) > _TOP:
            rest = sum(us for *_, us in told[_TOP:])
            lines.append(f"  and of {len(told) - _TOP} more, {milliseconds(rest)} in all, in the files.")
    if profile.optimized is None and profile.expected_gain is not None:
        lines += ["", gain_sentence(profile)]
    return [*lines, *profile.remarks]


def _table(profile: Profile) -> str:
    ordered = sorted(profile.rows, key=lambda row: -row.us)
    top, rest = ordered[:_TOP], ordered[_TOP:]
    lines = [_cells(row, profile) for row in top]
    if rest:
        lines.append(_sum(f"{len(rest)} more", rest, profile))
    lines.append(_sum("all rows", ordered, profile))
    headers = list(lines[0])
    # A column in which nothing stands says nothing.
    kept = [header for header in headers if header == "layer" or any(line[header] for line in lines)]
    cells = [[line[header] for header in kept] for line in lines]
    return format_table(kept, cells, right=[header for header in kept if header not in _TEXT])


def _cells(row: Row, profile: Profile) -> dict[str, str]:
    return {
        "layer": shortened(label(row), _LONGEST_NAME),
        "kind": kind_of(row),
        "pass": row.direction if profile.train else "",
        "ms": column_ms(row.us, profile.whole_us),
        "p20 to p80": f"{digits(row.p20_us / 1000)} to {digits(row.p80_us / 1000)}",
        "share": percent(row.us / profile.whole_us),
        "GFLOP": f"{row.flops / 1e9:,.3f}" if row.flops else "",
        "MB": f"{row.bytes / 1e6:,.2f}" if row.bytes else "",
        "FLOP/B": digits(row.intensity) if row.flops else "",
        "of roof": "" if row.roof_share is None else percent(row.roof_share),
        "bound by": row.bound,
        "output": shape(row),
        "layout": row.memory_format,
        "peak MB": "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.2f}",
    }


def _sum(name: str, rows: Sequence[Row], profile: Profile) -> dict[str, str]:
    us = microseconds(rows)
    total = Row(name, "", "", 0.0, us, us, us, sum(row.flops for row in rows), sum(row.bytes for row in rows))
    return {**_cells(total, profile), "pass": "", "p20 to p80": ""}


def _kernels(profile: Profile) -> str:
    kernels, whole = profile.kernels, profile.whole_us
    lines = [(shortened(name, 80), calls, column_ms(us, whole)) for name, calls, us in kernels[:_TOP]]
    text = format_table(["operator or kernel", "calls", "ms a pass"], lines, right=["calls", "ms a pass"])
    left = len(kernels) - _TOP
    return f"{text}\nand {left} more, in the files." if left > 0 else text
