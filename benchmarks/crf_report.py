"""The dense CRF's table: every way's median and worst photograph, beside what was aimed at."""

import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.crf_cases import FAMILY, GOAL_OVER_KEOPS, GOALS_MS, PHOTOS
from benchmarks.rows import time_us

COLUMNS = [
    "case", "candidate", "photographs", "median ms", "worst ms", "images a second", "goal ms",
    f"times as fast as KeOps on its tiles (goal: {GOAL_OVER_KEOPS})",
]  # fmt: skip

_PHOTO = re.compile("_(" + "|".join(PHOTOS[1:]) + ")$")
_BATCH = re.compile(r"_n(\d+)$")


def photographs(
    groups: Mapping[tuple, Sequence[Mapping[str, Any]]],
) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of the measured cases in full size; the photographs of a case share its lines."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (case, _, _, size), members in groups.items():
        for row in members:
            if row["family"] == FAMILY and size == "full" and time_us(row) > 0:
                found[_PHOTO.sub("", case), row["candidate"]].append(time_us(row) / 1e3)
    lines = []
    for (case, candidate), times in found.items():
        median, batch, goal = statistics.median(times), _BATCH.search(case), GOALS_MS.get((case, candidate))
        keops = found.get((case, "keops_blocks")) if candidate == "segfast_exact" else None
        line = [case, candidate, str(len(times)), *(f"{ms:.4g}" for ms in (median, max(times)))]
        line.append(f"{1e3 * (int(batch[1]) if batch else 1) / median:.4g}")
        line.append(str(goal or ""))
        line.append(f"{statistics.median(keops) / median:.3g}" if keops else "")
        lines.append(line)
    return COLUMNS, lines
