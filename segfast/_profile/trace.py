"""A profile in Chrome's trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Complete events with times in microseconds, the forward and the backward pass on tracks of their own.
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from typing import Any

from .. import __version__
from .facts import BETWEEN
from .quantities import label, timeline
from .rows import Profile, Row

_TRACKS = {"forward": 1, "backward": 2}


def trace(profile: Profile) -> dict[str, Any]:
    """The trace of a profile, and of the optimized model in a process of its own, ready for `json.dump`."""
    events = _events(1, profile.title, profile)
    if profile.optimized is not None:
        events += _events(2, f"{profile.title}, optimized", profile.optimized)
    # Perfetto reads no further than the first key it does not know.
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(process: int, name: str, profile: Profile) -> list[dict[str, Any]]:
    # What tells a file of ours (see `segfast.commands._output`) comes before a name of any length.
    about = {"written by": f"segfast {__version__}", "name": name}
    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": process, "args": about}]
    for direction, track in _TRACKS.items():
        if any(row.direction == direction and row.kind != BETWEEN for row in profile.rows):
            named = {"name": "thread_name", "ph": "M", "pid": process, "tid": track}
            events.append({**named, "args": {"name": direction}})
    for place, start_us, us in timeline(profile.rows):
        row = profile.rows[place]
        events.append(
            {
                "name": label(row),
                "cat": row.kind,
                "ph": "X",
                "ts": round(start_us, 3),
                "dur": round(us, 3),
                "pid": process,
                "tid": _TRACKS[row.direction],
                "args": _facts(row),
            }
        )
    return events


def _facts(row: Row) -> dict[str, Any]:
    facts = {
        "kind": row.kind,
        "p20 us": row.p20_us,
        "p80 us": row.p80_us,
        "FLOP": row.flops,
        "bytes": row.bytes,
        "FLOP per byte": row.intensity,
        "share of the roof": row.roof_share,
        "bound by": row.bound,
        "output": list(row.output),
        "dtype": row.dtype,
        "memory format": row.memory_format,
        "peak bytes": row.peak_bytes,
        "candidates, us": dict(row.candidates),
        "what segfast would do": row.advice,
    }
    return {name: fact for name, fact in facts.items() if fact not in (None, "", [], {})}
