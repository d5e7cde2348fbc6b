"""The picture of the roofline: its points, roofs and units, and labels that have room."""

import dataclasses
import sys

import pytest

from segfast._errors import UserError
from segfast._profile.figure import roofline_figure
from segfast._profile.roofline import place_labels, radius, roofline, spread, tick_name, ticks
from segfast._profile.rows import Roof
from tests.profile.profiles import conv, network, profile, row

BOX = (0.0, 0.0, 400.0, 300.0)


def meet(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def boxes(corners, sizes):
    placed = zip(corners, sizes, strict=True)
    return [(*c, c[0] + s[0], c[1] + s[1]) for c, s in placed if c is not None]


def test_a_point_is_where_its_rates_are():
    plot = roofline(network(3))
    # Those that take the longest first; the copy and the gap do no arithmetic.
    assert [point.us for point in plot.points] == [3000.0, 2000.0, 1000.0]
    assert all((point.intensity, point.rate) == (20.0, pytest.approx(20e9)) for point in plot.points)
    assert plot.bytes_per_s == 10e9
    assert plot.levels == [("bf16 400 GFLOP/s", 400e9), ("fp32 100 GFLOP/s", 100e9)]
    # Half a decade around the ridges (10 and 40 FLOP a byte) and the point.
    assert plot.x == pytest.approx((10 / 3.2, 40 * 3.2)) and plot.y == pytest.approx(
        (20e9 / 3.2, 400e9 * 3.2)
    )


def test_dtypes_with_about_the_same_rate_share_a_level():
    roof = Roof("GPU", None, {"float16": 700e12, "bfloat16": 690e12, "float32": 300e12}, 3e12)
    levels = roofline(dataclasses.replace(network(1), roof=roof)).levels
    assert levels == [("fp16, bf16 700 TFLOP/s", 700e12), ("fp32 300 TFLOP/s", 300e12)]


def test_ticks_are_powers_of_ten_within_the_limits():
    assert ticks((0.31, 320.0)) == [1.0, 10.0, 100.0]
    assert [tick_name(rate) for rate in (1e6, 1e10, 1e14)] == ["1 MFLOP/s", "10 GFLOP/s", "100 TFLOP/s"]
    assert spread([10, 12, 40], 5) == [10, 15, 40]


def test_a_points_area_is_its_time():
    assert radius(100.0, 100.0) == 20.0 and radius(25.0, 100.0) == 10.0 and radius(0.001, 100.0) == 3.5


@pytest.mark.parametrize("count", [1, 2, 8, 40])
def test_labels_cover_nothing(count):
    circles = [(200 + 7.0 * (i % 8), 150 + 9.0 * (i // 8), 6.0) for i in range(count)]
    sizes = [(80.0, 14.0)] * 8
    line = (0.0, 120.0, 400.0, 120.0)
    corners = place_labels(circles, sizes, BOX, [line])
    placed = boxes(corners, sizes[: len(corners)])
    assert placed
    for i, box in enumerate(placed):
        assert box[0] >= BOX[0] and box[1] >= BOX[1] and box[2] <= BOX[2] and box[3] <= BOX[3]
        assert not any(meet(box, other) for other in placed[:i])
        assert not any(meet(box, (x - r, y - r, x + r, y + r)) for x, y, r in circles)
        assert not box[1] < 120.0 < box[3]


def test_a_label_without_room_is_left_out():
    assert place_labels([(50.0, 50.0, 30.0)], [(200.0, 14.0)], (0, 0, 100, 100), []) == [None]


@pytest.mark.parametrize(
    ("shown", "points"),
    [
        (network(20), 20),
        (network(20, backward=True), 40),
        (profile([conv(1, 3.0, 0.0)]), 1),
        (profile([]), 0),
        (profile([row("", "between layers")]), 0),
    ],
    ids=["forward", "training", "one row", "no rows", "only a gap"],
)
def test_the_figure(shown, points):
    figure = roofline_figure(shown)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "arithmetic intensity, FLOP/B"
    assert all(text.get_text().endswith("FLOP/s") for text in axes.get_yticklabels())
    assert figure.get_suptitle() == shown.title
    drawn = [tuple(place) for part in axes.collections for place in part.get_offsets()]
    assert len([place for place in drawn if place[0] > 0]) == points
    texts = [text.get_text() for text in axes.texts]
    assert {"bf16 400 GFLOP/s", "fp32 100 GFLOP/s", "memory 10.0 GB/s"} <= set(texts)
    assert ("No row does arithmetic that is counted." in texts) == (points == 0)
    assert any("stage." in text for text in texts) == (points > 0)


def test_the_figures_texts_do_not_overlap():
    figure = roofline_figure(network(12, backward=True))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    # The slope's name is turned: its box is mostly empty.
    extents = [t.get_window_extent() for t in axes.texts if t.get_rotation() == 0]
    found = [(e.x0, e.y0, e.x1, e.y1) for e in extents]
    assert len(found) > 3
    assert not any(meet(a, b) for i, a in enumerate(found) for b in found[:i])


def test_a_long_name_keeps_its_end():
    long = "stage.with.a.very.long.name." * 6
    figure = roofline_figure(profile([row(long + "conv", flops=10**9, bytes=10**6)]))
    (name,) = [text.get_text() for text in figure.axes[0].texts if text.get_text().startswith("…")]
    assert len(name) == 32 and name.endswith(".name.conv")


def test_without_matplotlib_that_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="need the package matplotlib"):
        roofline_figure(network(1))
