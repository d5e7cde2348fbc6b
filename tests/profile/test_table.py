"""The text of a profile, and the figures that all its forms share."""

import dataclasses

import pytest

from segfast._profile.quantities import digits, milliseconds, percent, scaled, shortened, timeline
from segfast._profile.table import profile_text, roof_sentence
from tests.profile.profiles import ROOF, conv, network, optimized, profile, row


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.001, "0.00100"),
        (0.01234, "0.0123"),
        (0.9996, "1.00"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1234.5, "1,234"),
    ],
)
def test_digits(value, text):
    assert digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (12, "12.0 B"),
        (999.9, "1.00 kB"),
        (12_345_678, "12.3 MB"),
        (4e9, "4.00 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_scaled(value, text):
    assert scaled(value, "B") == text


def test_milliseconds_and_percent():
    assert (milliseconds(1234.5), milliseconds(3.2), percent(0.0412)) == ("1.23 ms", "0.00320 ms", "4.1 %")


def test_a_long_name_keeps_its_end():
    assert shortened("encoder.stages.3.conv", 12) == "…ages.3.conv"
    assert shortened("conv", 4) == "conv"


def cells(text: str, name: str) -> dict[str, str]:
    """The cells of the line that begins with `name`, by header, cut where the rule under the headers is."""
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("-----"))
    line = next(line for line in lines[rule:] if line.startswith(name))
    found, place = {}, 0
    for dashes in lines[rule].split("  "):
        end = place + len(dashes)
        found[lines[rule - 1][place:end].strip()] = line[place:end].strip()
        place = end + 2
    return found


def test_the_rows_that_take_the_longest_come_first_and_the_rest_is_summed():
    lines = profile_text(network(20)).splitlines()
    names = [line.split("  ")[0] for line in lines if line.startswith(("stage.", "7 more", "all rows"))]
    assert names == [*(f"stage.{n}" for n in range(20, 5, -1)), "7 more", "all rows"]
    # 1 to 5 ms, the copy's 1 and the gap's 2; all of them 213 ms.
    text = profile_text(network(20))
    assert cells(text, "7 more")["ms"] == "18.000"
    assert cells(text, "all rows")["ms"] == "213.000"
    assert cells(text, "all rows")["GFLOP"] == "4.200"
    assert cells(text, "all rows")["MB"] == "214.00"


def test_a_row_has_all_its_figures_in_the_headers_units():
    assert cells(profile_text(network(20)), "stage.20") == {
        "layer": "stage.20",
        "kind": "conv2d",
        "ms": "20.000",
        "p20 to p80": "18.0 to 24.0",
        "share": "9.4 %",
        "GFLOP": "0.400",
        "MB": "20.00",
        "FLOP/B": "20.0",
        "of roof": "20.0 %",
        "bound by": "compute",
        "output": "2x8x16x16",
        "layout": "channels_last",
        "peak MB": "3.00",
    }


def test_forward_and_backward_are_told_apart_where_there_are_both():
    assert "pass" not in cells(profile_text(network(3)), "stage.3")
    assert cells(profile_text(network(3, backward=True)), "stage.3")["pass"] == "backward"


def test_the_sums_and_the_cost_of_watching_are_told():
    text = profile_text(network(3))
    assert "A pass takes 7.20 ms, watched 9.00 ms: watching makes it 25.0 % slower." in text
    assert "The rows add up to 100.0 % of the watched pass." in text
    faster = dataclasses.replace(network(3), plain_us=10_000.0)
    assert "watched 9.00 ms: watching costs less than the times vary. The rows" in profile_text(faster)


def test_advice_is_one_sentence_for_all_rows_that_it_is_about():
    lines = profile_text(dataclasses.replace(network(20), expected_gain=1.5)).splitlines()
    start = lines.index("What segfast would do:")
    assert lines[start + 1 : start + 3] == [
        "  stage.19 and 9 more (100 ms): oneDNN takes half.",
        "  (layout copy) (1.00 ms): Keep channels_last.",
    ]
    # 213 / 1.25 / 1.5
    assert "Expected of segfast.optimize: 1.50 times as fast, 114 ms a pass." in lines


def test_no_gain_is_told_as_such():
    text = profile_text(dataclasses.replace(network(3), expected_gain=1.0))
    assert text.endswith("segfast.optimize is not expected to make it faster.")


def test_a_row_above_its_roof_is_explained():
    above = "1 of 2 rows are above the roof: caches are faster than memory"
    assert above in profile_text(profile([conv(1, 3.0, 0.0, roof_share=1.06), conv(2, 1, 3)]))
    assert "above the roof" not in profile_text(network(3))


def test_no_more_sentences_than_rows():
    told = [row(f"layer.{n}", ms=20 - n, advice=f"Do {n}.") for n in range(18)]
    text = profile_text(profile(told))
    assert "  layer.14 (6.00 ms): Do 14." in text and "Do 15." not in text
    assert "  and of 3 more, 12.0 ms in all, in the files." in text


def test_before_and_after():
    text = profile_text(optimized())
    # Plain passes are told: 9 / 1.25 and 4 / 1.25 ms.
    assert "Optimized: 7.20 ms before, 3.20 ms after, 2.25 times as fast." in text
    after = text[text.index("\nOptimized\n") :]
    assert cells(after, "stage.3")["ms"] == "1.5000" and "layout copy" not in after


def test_the_roof_has_its_units():
    assert roof_sentence(ROOF) == (
        "A made-up CPU, 2 threads. Measured roof: 100 GFLOP/s in float32, 400 GFLOP/s in bfloat16; "
        "10.0 GB/s of memory."
    )
    assert "A GPU. Measured" in roof_sentence(dataclasses.replace(ROOF, device="A GPU", threads=None))


def test_kernels_and_remarks_are_told():
    kernels = tuple((f"kernel_{n}", 2, 1500.0) for n in range(17))
    text = profile_text(dataclasses.replace(network(1), kernels=kernels, remarks=("No peak memory here.",)))
    assert cells(text[text.index("operator or kernel") :], "kernel_0")["ms a pass"] == "1.5000"
    assert "and 2 more, in the files." in text and "No peak memory here." in text


def test_one_row_and_none():
    assert cells(profile_text(profile([row()])), "all rows")["ms"] == "1.0000"
    assert cells(profile_text(profile([])), "all rows")["ms"] == "0.0000"


def test_a_timeline_has_rows_one_after_the_other_and_backward_after_forward():
    rows = [
        row("b", start_ms=2, ms=3),
        row("a", start_ms=0, ms=2.5),
        row("", "between layers", ms=9),
        row("b", direction="backward", start_ms=1, ms=1),
    ]
    # b's median start is before a's median end: it is moved by half a millisecond, not shortened.
    assert timeline(rows) == [(1, 0.0, 2500.0), (0, 2500.0, 3000.0), (3, 6500.0, 1000.0)]
