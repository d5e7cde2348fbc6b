"""Where a roofline plot has its points, roofs and labels: the same in the page and in the figure.

A point is a row: floating-point operations a byte to the right, those a second upward, both logarithmic. No
row is above the roof: below the ridge memory limits it (the slope), beyond it arithmetic (the level).
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .quantities import label, scaled, shortened
from .rows import Profile, Row

# Left, top, right, bottom; of a line the ends. In pixels, y downward, as a circle's center and radius.
Box = tuple[float, float, float, float]
Circle = tuple[float, float, float]
# So many points bear names, of so many characters.
LABELS = 8
LONGEST_NAME = 32
NO_POINTS = "No row does arithmetic that is counted."


class Point(NamedTuple):
    """A row, by its place in the profile; FLOP a byte, FLOP a second, microseconds."""

    place: int
    intensity: float
    rate: float
    us: float


class Roofline(NamedTuple):
    """The points, those that take the longest first, the roofs, and limits with room around them all."""

    points: list[Point]
    # Each level's name and rate, from the highest down; dtypes that are near one another share one.
    levels: list[tuple[str, float]]
    bytes_per_s: float
    x: tuple[float, float]
    y: tuple[float, float]

    def roofs(self) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """The ends of the slope, then of each level, in FLOP a byte and FLOP a second."""
        start, top = max(self.x[0], self.y[0] / self.bytes_per_s), self.levels[0][1]
        slope = (start, start * self.bytes_per_s), (top / self.bytes_per_s, top)
        return [slope, *[((rate / self.bytes_per_s, rate), (self.x[1], rate)) for _, rate in self.levels]]


def plots(row: Row) -> bool:
    """True if the row does arithmetic that is counted, and has a place in the plot."""
    return row.flops > 0 and row.bytes > 0 and row.us > 0


def roofline(profile: Profile) -> Roofline:
    """The plot of a profile."""
    roof = profile.roof
    points = [
        Point(place, row.intensity, row.flops / row.us * 1e6, row.us)
        for place, row in enumerate(profile.rows)
        if plots(row)
    ]
    points.sort(key=lambda point: -point.us)
    levels = _levels(profile)
    rates = [rate for _, rate in levels]
    x = _limits([point.intensity for point in points] + [rate / roof.bytes_per_s for rate in rates])
    y = _limits([point.rate for point in points] + rates)
    return Roofline(points, levels, roof.bytes_per_s, x, y)


def _levels(profile: Profile) -> list[tuple[str, float]]:
    levels: list[tuple[list[str], float]] = []
    for dtype, rate in sorted(profile.roof.flops_per_s.items(), key=lambda item: -item[1]):
        name = dtype.replace("float", "f" if dtype.startswith("b") else "fp")
        if levels and rate > 0.9 * levels[-1][1]:
            levels[-1][0].append(name)
        else:
            levels.append(([name], rate))
    return [(f"{', '.join(names)} {scaled(rate, 'FLOP/s')}", rate) for names, rate in levels]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Half a decade around the values, so that there is a power of ten within."""
    return min(values) / 3.2, max(values) * 3.2


def ticks(limits: tuple[float, float]) -> list[float]:
    """The powers of ten between the limits."""
    low, high = math.ceil(math.log10(limits[0])), math.floor(math.log10(limits[1]))
    return [10.0**exponent for exponent in range(low, high + 1)]


def tick_name(rate: float) -> str:
    """A power of ten of FLOP a second: "10 GFLOP/s"."""
    return re.sub(r"\.0+ ", " ", scaled(rate, "FLOP/s"))


def pointer(circle: Circle, corner: tuple[float, float], size: tuple[float, float]) -> Box:
    """The line from a circle's edge to the nearest place of a label's."""
    x, y, r = circle
    right = max(corner[0], min(x, corner[0] + size[0]))
    down = max(corner[1], min(y, corner[1] + size[1]))
    part = min(1.0, r / (math.hypot(right - x, down - y) or r))
    return x + part * (right - x), y + part * (down - y), right, down


def name_of(row: Row, longest: int) -> str:
    """A point's name, of its end at most `longest` characters."""
    return shortened(label(row), longest) + (" backward" if row.direction == "backward" else "")


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Ascending places, each at least `apart` from the one before it."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + apart) if moved else place)
    return moved


def radius(us: float, longest: float) -> float:
    """The radius of a point whose area is its time: 3.5 to 20 pixels."""
    return max(3.5, 20 * math.sqrt(us / longest))


def place_labels(
    circles: Sequence[Circle],
    sizes: Sequence[tuple[float, float]],
    within: Box,
    lines: Sequence[Box],
) -> list[tuple[float, float] | None]:
    """Left upper corners of labels that cover no circle, line or label, nor leave the box; None without room.

    `circles` are x, y and radius of all points, y downward, those first that have labels; `sizes` are the
    labels' widths and heights; `lines` go from the first to the second of two points.
    """
    covered: list[Box] = [(x - r, y - r, x + r, y + r) for x, y, r in circles]
    covered += [box for line in lines for box in _along(line, 4)]
    labels: list[Box] = []
    corners: list[tuple[float, float] | None] = []
    for circle, size in zip(circles, sizes, strict=False):
        found = None
        for box in _around(*circle, *size):
            leader = _along(pointer(circle, box[:2], size), 0)
            inside = (
                box[0] >= within[0] and box[1] >= within[1] and box[2] <= within[2] and box[3] <= within[3]
            )
            if inside and not _meet([box], covered) and not _meet(leader, labels):
                found = box[:2]
                labels.append(box)
                covered += [box, *leader]
                break
        corners.append(found)
    return corners


def _around(x: float, y: float, r: float, width: float, height: float) -> Iterator[Box]:
    """Boxes of a size around a circle, the nearest first."""
    for gap in (4, 12, 22, 34, 48):
        away = r + gap
        slant = 0.7 * away
        for left, top in (
            (x + away, y - height / 2),
            (x + slant, y - slant - height),
            (x + slant, y + slant),
            (x - width / 2, y - away - height),
            (x - width / 2, y + away),
            (x - away - width, y - height / 2),
            (x - slant - width, y - slant - height),
            (x - slant - width, y + slant),
        ):
            yield left, top, left + width, top + height


def _along(line: Box, half: float) -> list[Box]:
    """Boxes of twice `half` a side every eight pixels along a line."""
    x0, y0, x1, y1 = line
    steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / 8))
    places = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
    return [(x - half, y - half, x + half, y + half) for x, y in places]


def _meet(boxes: Sequence[Box], others: Sequence[Box]) -> bool:
    return any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a in boxes for b in others)
