"""Profiles written by hand: times in whole milliseconds, rates that divide without a rest."""

import dataclasses

from segfast._profile.rows import Profile, Roof, Row

ROOF = Roof("A made-up CPU", 2, {"float32": 100e9, "bfloat16": 400e9}, 10e9)
NASTY = 'block.<script>alert("1")</script>&\'s'


def row(name="conv", kind="conv2d", direction="forward", start_ms=0.0, ms=1.0, **others) -> Row:
    us = 1000.0 * ms
    return Row(name, kind, direction, 1000.0 * start_ms, us, 0.9 * us, 1.2 * us, **others)


def profile(rows, **others) -> Profile:
    rows = tuple(rows)
    whole = sum(row.us for row in rows) or 1000.0
    facts = {"train": False, "batch": 2, "whole_us": whole, "plain_us": whole / 1.25, **others}
    return Profile("net, 2x3x8x8, float32", rows, ROOF, **facts)


def conv(number: int, ms: float, start_ms: float, direction: str = "forward", **others) -> Row:
    """A layer of 20 MFLOP and 1 MB a millisecond: 20 FLOP a byte, 20 GFLOP/s, a fifth of the roof."""
    facts = {"bound": "compute", "roof_share": 0.2, "output": (2, 8, 16, 16), "dtype": "float32", **others}
    flops, moved = round(20e6 * ms), round(1e6 * ms)
    return row(f"stage.{number}", "conv2d", direction, start_ms, ms, flops=flops, bytes=moved, **facts)


def network(layers: int = 20, backward: bool = False) -> Profile:
    """Convolutions of 1, 2, 3 ... ms, a copy before the first, 2 ms between the layers."""
    copy = row("", "layout copy", ms=1, bytes=4_000_000, bound="layout copy", advice="Keep channels_last.")
    rows = [copy]
    start = 1.0
    for number in range(1, layers + 1):
        facts = {"advice": "oneDNN takes half.", "candidates": (("aten", 1e3 * number), ("onednn", 500.0))}
        facts = facts if number % 2 else {"memory_format": "channels_last", "peak_bytes": 3_000_000}
        rows.append(conv(number, float(number), start, **facts))
        start += number
    if backward:
        start = 0.0
        for number in range(layers, 0, -1):
            rows.append(conv(number, 2.0 * number, start, "backward"))
            start += 2.0 * number
    rows.append(row("", "between layers", ms=2))
    return profile(rows, train=backward)


def optimized() -> Profile:
    """A network of three layers, and what it is afterwards: the copy is gone, the rest twice as fast."""
    before = network(3)
    after = [
        dataclasses.replace(each, us=each.us / 2, start_us=(each.start_us - 1000) / 2)
        for each in before.rows
        if each.kind != "layout copy"
    ]
    return dataclasses.replace(before, optimized=profile(after))
