"""The whole networks' table: how many times as fast as the faster eager layout each way is, within one run.

`python -m benchmarks.network_report [FILE.csv ...]` prints it in Markdown, a table for each machine, from the
rows under benchmarks/results/ or from those files.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.networks import FAMILY, NETWORKS
from benchmarks.rows import geometric_mean, read_rows, time_us

Row = Mapping[str, Any]
EAGER = ("eager_nchw", "eager_nhwc")
WAYS = ("compile_freezing", "segfast", "segfast_compile", "eager_bf16", "segfast_bf16")
HEADERS = [
    "network", "size", "threads", "eager fp32 ms", "layout", "compile + freezing", "segfast",
    "segfast compile", "eager bf16", "segfast bf16", "compile s", "optimize s", "segfast compile s",
]  # fmt: skip


def network_tables(rows: Iterable[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, headers, lines) of each machine that measured networks in full size.

    Of each case only the last run is shown. A way whose scores were not right, or that failed, says so; one
    that was not run is empty. Below the networks of one size and number of threads stand the geometric means.
    """
    machines: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for row in rows:
        if row["family"] == FAMILY and row["size"] == "full":
            runs = machines.setdefault(_machine(row), {}).setdefault(row["case"], {})
            runs.setdefault(row["date"], []).append(row)
    return [
        (_title(machine, cases), HEADERS, _lines([runs[max(runs)] for runs in cases.values()]))
        for machine, cases in machines.items()
    ]


def _machine(row: Row) -> str:
    return row["gpu"] if row["gpu"] != "cpu" else f"{row['cpu'] or 'a CPU'}, {row['isa']}"


def _title(machine: str, cases: Mapping[str, Mapping[str, Sequence[Row]]]) -> str:
    shown = [run for runs in cases.values() for run in runs[max(runs)]]
    versions = ", ".join(sorted({f"torch {row['torch']}" for row in shown}))
    commits = ", ".join(sorted({row["commit"] for row in shown}))
    days = sorted({row["date"][:10] for row in shown})
    time = " to ".join(dict.fromkeys((days[0], days[-1])))
    return f"Whole networks on {machine}: {versions}, commit {commits}, {time}"


def _lines(runs: Iterable[Sequence[Row]]) -> list[list[str]]:
    """A line of each run that has a baseline, in the networks' order, and each kind's geometric means."""
    kinds: dict[tuple[int, int], list[tuple[int, list[str], list[float]]]] = defaultdict(list)
    order = {name: i for i, name in enumerate(NETWORKS)}
    for run in runs:
        timed = {row["candidate"]: row for row in run if row["status"] == "ok" and time_us(row) > 0}
        eager = min((timed[name] for name in EAGER if name in timed), key=time_us, default=None)
        if eager is None:
            continue
        name, side, *_ = eager["case"].rsplit("_", 2 if eager["gpu"] == "cpu" else 1)
        ratios = [time_us(eager) / time_us(timed[way]) if way in timed else 0.0 for way in WAYS]
        seconds = [f"{timed[way]['cold_ms'] / 1e3:.3g}" if way in timed else "" for way in WAYS[:3]]
        layout = eager["candidate"].removeprefix("eager_").upper()
        line = [name, f"{side}x{side}", eager["threads"], f"{time_us(eager) / 1e3:.3g}", layout]
        failed = {row["candidate"]: row["status"] for row in run if row["status"] in ("wrong", "failed")}
        cells = [_ratio(ratio) or failed.get(way, "") for way, ratio in zip(WAYS, ratios, strict=True)]
        line += [*cells, *seconds]
        kinds[int(side), int(eager["threads"] or 0)].append((order.get(name, len(order)), line, ratios))
    found = []
    for (side, threads), members in sorted(kinds.items()):
        found += [line for _, line, _ in sorted(members)]
        means = [_mean(column) for column in zip(*(ratios for *_, ratios in members), strict=True)]
        found.append(["geometric mean", f"{side}x{side}", str(threads or ""), "", "", *means, "", "", ""])
    return found


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value > 0 else ""


def _mean(column: Sequence[float]) -> str:
    """The geometric mean, with how many it is of where some are missing."""
    known = [value for value in column if value > 0]
    return _ratio(geometric_mean(known)) + (f" of {len(known)}" if 0 < len(known) < len(column) else "")


def main(arguments: Sequence[str]) -> int:
    """Print the tables; 2 if there is no row."""
    from benchmarks.report import markdown_tables

    default = sorted((ROOT / "benchmarks" / "results").glob(f"*/{FAMILY}.csv"))
    files = [Path(argument) for argument in arguments] or default
    try:
        tables = network_tables([row for file in files for row in read_rows(file)])
    except (OSError, ValueError) as error:
        print(f"network_report: {error}", file=sys.stderr)
        return 2
    if not tables:
        print("network_report: no network has been measured", file=sys.stderr)
        return 2
    print(markdown_tables(tables).strip())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
