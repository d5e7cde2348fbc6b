"""The Chrome trace of a profile: what the format asks for, and that each event is where it belongs."""

import json
from collections import defaultdict

import pytest

from segfast._profile.trace import trace
from tests.profile.profiles import NASTY, network, optimized, profile, row

PROFILES = {
    "forward": network(20),
    "training": network(20, backward=True),
    "optimized": optimized(),
    "one row": profile([row(NASTY)]),
    "no rows": profile([]),
}


def events(profile, phase: str) -> list[dict]:
    return [event for event in trace(profile)["traceEvents"] if event["ph"] == phase]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_the_format_is_kept(profile):
    text = json.dumps(trace(profile), allow_nan=False)
    # Perfetto reads the keys in their order, and nothing after one that it does not know.
    assert text.startswith('{"traceEvents": [{')
    found = json.loads(text)
    assert found.keys() == {"traceEvents", "displayTimeUnit"} and found["displayTimeUnit"] == "ms"
    named = set()
    for event in found["traceEvents"]:
        assert type(event["name"]) is str and type(event["pid"]) is int and type(event["args"]) is dict
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and event["args"]["name"]
            named.add((event["pid"], event.get("tid")))
        else:
            assert event["ph"] == "X" and event["name"] and event["cat"]
            assert type(event["ts"]) is float and event["ts"] >= 0
            assert type(event["dur"]) is float and event["dur"] >= 0
            # Of a process and a track that have names.
            assert {(event["pid"], None), (event["pid"], event["tid"])} <= named


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_no_event_begins_before_the_one_before_it_on_its_track_is_over(profile):
    ends: dict[tuple, float] = defaultdict(float)
    for event in events(profile, "X"):
        assert event["ts"] >= ends[event["pid"], event["tid"]] - 1e-3
        ends[event["pid"], event["tid"]] = event["ts"] + event["dur"]


def test_every_row_that_runs_is_an_event_with_its_time():
    shown = network(3, backward=True)
    found = [(event["name"], event["tid"], event["ts"], event["dur"]) for event in events(shown, "X")]
    assert found == [
        ("(layout copy)", 1, 0.0, 1000.0),
        ("stage.1", 1, 1000.0, 1000.0),
        ("stage.2", 1, 2000.0, 2000.0),
        ("stage.3", 1, 4000.0, 3000.0),
        ("stage.3", 2, 7000.0, 6000.0),
        ("stage.2", 2, 13000.0, 4000.0),
        ("stage.1", 2, 17000.0, 2000.0),
    ]


def test_a_track_has_its_directions_name_and_none_without_rows():
    names = [event["args"]["name"] for event in events(network(3, backward=True), "M")]
    assert names == ["net, 2x3x8x8, float32", "forward", "backward"]
    assert [event["args"]["name"] for event in events(network(3), "M")][1:] == ["forward"]


def test_an_event_has_what_is_known_of_its_row():
    (event,) = [event for event in events(network(3), "X") if event["name"] == "stage.1"]
    assert event["args"] == {
        "kind": "conv2d",
        "p20 us": 900.0,
        "p80 us": 1200.0,
        "FLOP": 20_000_000,
        "bytes": 1_000_000,
        "FLOP per byte": 20.0,
        "share of the roof": 0.2,
        "bound by": "compute",
        "output": [2, 8, 16, 16],
        "dtype": "float32",
        "candidates, us": {"aten": 1000.0, "onednn": 500.0},
        "what segfast would do": "oneDNN takes half.",
    }


def test_the_optimized_model_is_a_process_of_its_own():
    assert {event["pid"] for event in events(optimized(), "X")} == {1, 2}
    assert [event["args"]["name"] for event in events(optimized(), "M") if "tid" not in event] == [
        "net, 2x3x8x8, float32",
        "net, 2x3x8x8, float32, optimized",
    ]
