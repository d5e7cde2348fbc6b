"""Convolutions that no table holds: what "auto" makes of layers nobody tuned for, beside ATen.

The shapes are drawn with a seed from the sizes that networks have, and none is a measured bucket's: neither
one that `segfast tune` measures nor one of the benchmark's cases.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.baselines import Peer
from benchmarks.case import Case, output_size
from benchmarks.cases import CASES
from benchmarks.ours import on_auto, ours
from benchmarks.problems import Problem
from benchmarks.report import best, grouped, ratio
from benchmarks.rows import geometric_mean
from benchmarks.timing import Candidate
from segfast._tune_calls import FAMILIES
from segfast._tune_layers import Layer

COUNT = 300
LEAST = 0.97  # of ATen's speed: a call below it counts as slower
_CHANNELS = (3, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
_SIDES = (8, 14, 17, 20, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 200, 256)
# Kernel, stride, dilation; the common ones more often.
_KERNELS = (*2 * [(1, 1, 1), (3, 1, 1)], (3, 2, 1), *((3, 1, d) for d in (2, 4, 6, 12)), (5, 1, 1), (7, 2, 1))
_EPILOGUES = (
    ("bn", "relu"),
    ("bn", "relu"),
    ("bias", "relu"),
    ("bn", "silu"),
    ("bn", "add", "relu"),
    ("bias",),
)
_MOST_FLOPS, _MOST_BYTES = 3e11, 2e9


def unseen_cases(count: int = COUNT, seed: int = 0) -> list[Case]:
    """So many different ones, the same for the same seed."""
    draw, seen, found = random.Random(seed), _measured(), []
    while len(found) < count:
        (k, s, d), side = draw.choice(_KERNELS), draw.choice(_SIDES)
        ci, co = draw.choice(_CHANNELS), draw.choice(_CHANNELS[1:])
        params = {"n": draw.choice((1, 2, 4, 8)), "ci": ci, "co": co, "h": side, "w": side}
        params |= {"k": k, "s": s, "p": d * (k // 2), "d": d, "g": 1}
        epilogue = draw.choice(_EPILOGUES)
        name = f"unseen_{len(found):03}"
        layer = " ".join(f"{key}{value}" for key, value in params.items())
        small = {"n": 1, "ci": min(ci, 8), "co": min(co, 8), "h": min(side, 16), "w": min(side, 16)}
        case = Case(name, "dilated_conv2d", "conv2d", layer, params, small, epilogue=epilogue)
        key = _key(ci, co, k, s, d)
        if (
            key in seen
            or min(output_size(case)) < 1
            or case.flops > _MOST_FLOPS
            or case.min_bytes > _MOST_BYTES
        ):
            continue
        seen.add(key)
        found.append(case)
    return found


def _key(ci: int, co: int, k: int, s: int, d: int) -> tuple[int, ...]:
    """What a table tells layers apart by, image sizes aside: another size might still share a row."""
    return ci, co, k, s, d


def _measured() -> set[tuple[int, ...]]:
    layers = [layer for layer in FAMILIES["dilated_conv2d"].layers if isinstance(layer, Layer)]
    tuned = {_key(t.c_in, t.c_out, t.kernel, t.stride, t.dilation) for t in layers}
    cases = [case for case in CASES if case.op == "conv2d"]
    return tuned | {_key(*(case[name] for name in ("ci", "co", "k", "s", "d"))) for case in cases}


def candidates_of(problem: Problem) -> list[Peer]:
    """ATen in both layouts, and ours on backend "auto"."""
    return [
        Candidate("aten_nhwc", problem.bind(problem.formula)),
        Candidate("aten_nchw", problem.bind(problem.formula, problem.contiguous())),
        *(on_auto(candidate) for candidate in ours(problem) if candidate.name == "segfast"),
    ]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """How "auto" did beside ATen, the faster of its two layouts, over those that were measured."""
    ratios = []
    for members in grouped(rows).values():
        own = [row for row in members if not row["ours"] or row["candidate"].endswith("_auto")]
        if best(own, True) is not None:
            ratios.append(ratio(own))
    if not ratios:
        return "no unseen shape was measured"
    mean, share = geometric_mean(ratios), sum(value >= LEAST for value in ratios) / len(ratios)
    return (
        f"{len(ratios)} unseen shapes: ATen's time over auto's {mean:.3f} in the geometric mean, "
        f"{100 * share:.1f} % at {LEAST} or more, least {min(ratios):.2f}"
    )
