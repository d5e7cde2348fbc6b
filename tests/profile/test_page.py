"""The HTML page of a profile: what stands in it, that it needs nothing else, and that names do no harm."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from segfast._profile.page import html_page
from tests.profile.profiles import NASTY, conv, network, optimized, profile, row

EMPTY = {"meta", "input", "br"}
IN_SVG = {"circle", "line"}
PROFILES = {
    "forward": network(20),
    "training": network(30, backward=True),
    "optimized": optimized(),
    "one row": profile([row("conv", flops=10, bytes=10)]),
    "no rows": profile([]),
    "only a gap": profile([row("", "between layers")]),
    "nasty": profile([row(NASTY, NASTY, advice=NASTY, dtype=NASTY, flops=9, bytes=9, bound=NASTY)]),
}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes, text); fails where they do not close as they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        text: list[str] = []
        self.elements.append((tag, dict(attributes), text))
        if tag not in EMPTY:
            self._open.append((tag, text))

    def handle_startendtag(self, tag, attributes):
        assert tag in IN_SVG
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, text in self._open:
            text.append(data)

    def texts(self, tag: str, css: str = "") -> list[str]:
        return ["".join(text) for _, _, text in self.having(tag, css)]

    def having(self, tag: str, css: str = "") -> list[tuple[str, dict, list[str]]]:
        found = [element for element in self.elements if element[0] == tag]
        return [e for e in found if not css or css in (e[1].get("class") or "").split()]

    def figures(self, start: str) -> list[str]:
        """The cells of the line of the first table of rows whose layer is `start`."""
        at = next(
            i
            for i, (tag, _, text) in enumerate(self.elements)
            if tag == "th" and i > self._rows() and "".join(text) == start
        )
        cells = []
        for tag, _, text in self.elements[at + 1 :]:
            if tag == "tr":
                break
            if tag == "td":
                cells.append("".join(text))
        return cells

    def _rows(self) -> int:
        return next(i for i, e in enumerate(self.elements) if e[1].get("class") == "sorts")


@pytest.fixture(params=PROFILES.values(), ids=PROFILES)
def shown(request):
    return request.param


def test_it_closes_what_it_opens_and_loads_nothing(shown):
    text = html_page(shown)
    page = Page(text)
    for _, attributes, _ in page.elements:
        assert not {"src", "href", "action", "srcset", "data"} & attributes.keys()
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttpRequest|import\(", text)
    # The mark of our files, within what is looked at.
    assert b"<title>segfast" in text.encode()[:1024]
    assert page.texts("h1") == ["net, 2x3x8x8, float32"]


def test_a_mark_belongs_to_a_row(shown):
    page = Page(html_page(shown))
    rows = {a["id"]: a for tag, a, _ in page.elements if tag == "tr" and "id" in a}
    assert len(rows) == sum(len(each.rows) for each in (shown, shown.optimized) if each is not None)
    marked = {a["data-r"] for _, a, _ in page.elements if "data-r" in a}
    assert marked <= rows.keys() and all(a["data-tip"] for a in rows.values())
    # Each row that does arithmetic is a point, each that runs a block.
    circles = {a["data-r"] for _, a, _ in page.having("circle")}
    blocks = {a["data-r"] for _, a, _ in page.having("div", "block")}
    assert circles >= {f"a{i}" for i, each in enumerate(shown.rows) if each.flops}
    assert blocks >= {f"a{i}" for i, each in enumerate(shown.rows) if each.kind != "between layers"}


def test_everything_is_within_its_frame(shown):
    page = Page(html_page(shown))
    for _, attributes, _ in page.having("circle"):
        x, y = float(attributes["cx"]), float(attributes["cy"])
        assert 96 <= x <= 1005 and 8 <= y <= 452
    for _, attributes, _ in [*page.having("div", "block"), *page.having("div", "pass")]:
        left, width = map(float, re.findall(r"[\d.]+", attributes["style"]))
        assert left >= 0 and left + width <= 100.001
    widths = [
        float(w) for _, a, _ in page.having("i") for w in re.findall(r"width:([\d.]+)%", a.get("style", ""))
    ]
    assert all(0 <= width <= 100.001 for width in widths)


def test_names_are_text():
    text = html_page(dataclasses.replace(PROFILES["nasty"], title=NASTY, remarks=(NASTY,)))
    page = Page(text)
    assert len(page.having("script")) == 1 and "<script>alert" not in text
    assert page.texts("h1") == [NASTY] and NASTY in page.texts("p", "note")
    assert NASTY in page.texts("th") and page.texts("td", "t").count(NASTY) == 4
    tips = [a["data-tip"] for _, a, _ in page.having("tr") if "data-tip" in a]
    assert tips[0].splitlines()[0] == NASTY and tips[0].splitlines()[-1] == NASTY


def test_the_table_has_all_figures_in_the_units_of_its_header():
    page = Page(html_page(network(3)))
    heads = page.texts("th")
    assert "".join(heads).startswith(
        "#layerkindtimemsp20msp80msshare%arithmeticGFLOPmovesMBintensityFLOP/BrateGFLOP/srateGB/s"
        "of roof%bound byoutputdtypelayoutpeakMBwhat segfast would do"
    )
    assert page.figures("stage.2") == [
        *("conv2d", "2.0000", "1.8000", "2.4000", "22.2", "0.040", "2.00", "20.0", "20.0", "1.00", "20.0"),
        *("compute", "2x8x16x16", "float32", "channels_last", "3.00", ""),
    ]
    # A copy does no arithmetic: its cells are empty, its bytes a second are there.
    assert page.figures("(layout copy)")[5:9] == ["", "4.00", "", ""]
    assert page.figures("(layout copy)")[9] == "4.00"


def test_a_row_tells_everything_on_hovering():
    page = Page(html_page(network(3)))
    tips = {a["id"]: a["data-tip"] for _, a, _ in page.having("tr") if "id" in a}
    assert tips["a1"].splitlines() == [
        "stage.1",
        "conv2d, forward, 2x8x16x16, float32",
        "1.00 ms (p20 0.900 ms, p80 1.20 ms), 11.1 % of the pass",
        "20.0 MFLOP, 1.00 MB at least, 20.0 FLOP/B",
        "20.0 GFLOP/s, 1.00 GB/s, 20.0 % of the roof, bound by compute",
        "candidates: aten 1.00 ms, onednn 0.500 ms",
        "oneDNN takes half.",
    ]


def test_the_heads_figures():
    tiles = Page(html_page(dataclasses.replace(network(3), expected_gain=1.5))).texts("div", "tile")
    assert tiles == [
        "a forward pass7.20 ms278 images/s",
        "arithmetic120 MFLOP16.7 GFLOP/s on average",
        "memory traffic at least10.0 MB1.39 GB/s on average",
        # 6 ms at a fifth of the roof, 3 ms that know no roof.
        "if every row reached its roof4.20 ms2.14 times as fast",
        "expected of segfast.optimize4.80 ms1.50 times as fast",
    ]


def test_the_measured_roofs_have_names_and_units():
    page = Page(html_page(network(3)))
    texts = page.texts("text")
    assert {"bf16 400 GFLOP/s", "fp32 100 GFLOP/s", "memory 10.0 GB/s"} <= set(texts)
    assert "arithmetic intensity, FLOP/B" in texts and "10 GFLOP/s" in texts
    assert {"stage.1", "stage.2", "stage.3"} <= set(texts)
    note = "Not in the plot, as no arithmetic is counted: 2 of 5 rows, 3.00 ms (33.3 %): "
    assert f"{note}between layers, layout copy." in page.texts("p", "note")


def test_a_point_is_where_the_axes_say():
    page = Page(html_page(network(3)))
    at = {"".join(text): (float(a["x"]), float(a["y"]) - 4) for _, a, text in page.having("text")}
    for _, attributes, _ in page.having("circle"):
        # 20 FLOP a byte and 20 GFLOP a second, with two decades' worth of both known.
        decade = at["100"][0] - at["10"][0]
        assert float(attributes["cx"]) == pytest.approx(at["10"][0] + math.log10(2) * decade, abs=0.2)
        decade = at["100 GFLOP/s"][1] - at["10 GFLOP/s"][1]
        assert float(attributes["cy"]) == pytest.approx(at["10 GFLOP/s"][1] + math.log10(2) * decade, abs=0.2)


def test_every_kind_has_a_color():
    fused = [row(kind=f"fused {n}", ms=20 - n) for n in range(9)]
    text = html_page(profile([row(), row(kind="pool"), *fused]))
    colors = dict(re.findall(r"\.(k\d+)\{--c:(#\w{6})\}", text[: text.index("@media")]))
    assert len(colors) == 11 and colors["k0"] != colors["k1"]
    used = set(re.findall(r'class="(k\d+)', text))
    assert used == colors.keys()


def test_a_bar_stands_for_the_longest_row_of_its_layer():
    rows = [
        row("a", "layout copy", ms=1),
        row("a", ms=5),
        row("a", direction="backward", ms=3),
        row("b", ms=2),
    ]
    page = Page(html_page(profile(rows)))
    marks = {"".join(text)[:1]: a["data-r"] for _, a, text in page.having("div", "bar") if "data-r" in a}
    assert marks == {"a": "a1", "b": "a3"}


def test_a_point_above_the_roof_is_explained():
    fast = conv(1, 3.0, 0.0, roof_share=1.3)
    above = "1 of 2 rows are above the roof: caches are faster than memory, and Winograd's method"
    assert any(note.startswith(above) for note in Page(html_page(profile([fast, conv(2, 1, 3)]))).texts("p"))
    assert "above the roof" not in html_page(network(3))


def test_a_fused_layers_kind_is_short():
    fused = profile([row(kind="conv2d + batch_norm + activation"), row(kind="batch_norm")])
    page = Page(html_page(fused))
    assert [text for text in page.texts("td", "t") if text] == ["conv2d+bn+act", "batch_norm"]
    assert page.texts("span", "name")[:2] == ["conv2d+bn+act", "batch_norm"]


def test_bars_by_kind_by_bound_and_by_layer():
    bars = Page(html_page(network(30, backward=True))).texts("div", "bar")
    assert bars[0].startswith("conv2d60") and "1,395 ms" in bars[0]
    assert any(bar.startswith("layout copy1") for bar in bars)
    assert any(bar.startswith("compute60") for bar in bars)
    # Forward and backward of a layer together: 30 and 60 ms.
    assert any(bar.startswith("stage.30") and "90.0 ms" in bar for bar in bars)
    assert any(bar.startswith("12 more") for bar in bars)


def test_before_and_after_are_set_side_by_side():
    page = Page(html_page(optimized()))
    assert [a["id"] for _, a, _ in page.having("section")] == ["view-a", "view-b"]
    assert "Optimized: 7.20 ms before, 3.20 ms after, 2.25 times as fast." in page.texts("p", "note")
    lines = page.texts("tr")
    assert "stage.3conv2dconv2d3.00001.5000-1.50002.00" in lines
    assert "(layout copy)layout copynone1.00000.0000-1.0000" in lines
    assert "view-b" not in html_page(network(3)) and not Page(html_page(network(3))).having("div", "switch")


def test_layers_that_changed_the_least_are_summed():
    before = network(30)
    after = profile([dataclasses.replace(each, us=each.us / 2) for each in before.rows])
    lines = Page(html_page(dataclasses.replace(before, optimized=after))).texts("tr")
    # 1 to 10 ms, the copy's 1 and the gap's 2.
    assert "12 more58.00029.000-29.0002.00" in lines


def test_kernels_have_a_table():
    page = Page(html_page(dataclasses.replace(network(1), kernels=(("void <k>", 3, 1500.0),))))
    assert "void <k>31.5000" in page.texts("tr")


def test_a_hundred_layers_get_labels_that_do_not_overlap():
    page = Page(html_page(profile([conv(n, 1 + n / 100, n) for n in range(100)])))
    boxes = []
    for _, attributes, text in page.having("text"):
        if (attributes["class"] or "") == "" and (name := "".join(text)).startswith("stage."):
            x, y, width = float(attributes["x"]), float(attributes["y"]), 6.6 * len(name)
            left = x - width if attributes["text-anchor"] == "end" else x
            boxes.append((left, y - 12, left + width, y + 3))
    assert boxes
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_no_rows_is_told():
    assert "No call of a layer was measured." in html_page(profile([]))


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here to parse JavaScript with")
def test_the_script_is_javascript():
    (script,) = Page(html_page(network(1))).texts("script")
    check = f"new Function({json.dumps(script)})"
    run = subprocess.run(["node", "-e", check], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
