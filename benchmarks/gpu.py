"""The GPU run: `python -m benchmarks.gpu --tier T0 T1 --out FOLDER`.

Each tier runs in a process of its own, which is replaced if it dies: a kernel's illegal access or a hang
costs one case, not the run. Everything lands flat in one folder: gpu.log, rows.csv, ceilings.json,
configs.json, proven.json, report.html. `SEGFAST_DRY_RUN=1` walks the same way on a CPU, with small shapes.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import CASES
from benchmarks.environment import ROOT, dry_run
from benchmarks.rows import append_rows, read_rows
from benchmarks.tiers import STICKY, TIERS, WRONG, Session, run_tier

BUDGETS = {
    "compile": 60,
    "T0": 60,
    "T1": 120,
    "T2": 180,
    "T3": 120,
    "T4": 120,
    "T5": 540,
    "bench": 300,
    "unseen": 300,
    "full": 540,
}
DEFAULT = ("T0", "T1", "T2", "T3", "T4")
INTERPRETED = ("T0", "T4", "full")  # tiers that launch kernels even in a dry run
GRACE_S = 60  # beyond its budget, before a worker counts as hung
MOST_WORKERS = 6  # of one tier
DRY_RUN_S = 1e6  # a dry run is walked to its end, however busy the machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tiers: 0 if all is well, 1 if a kernel is wrong or a tier gave up, 2 without a GPU."""
    args = _parse(argv)
    if args.worker:
        session = Session(args.tier[0], args.out, args.budget, args.family, args.case, frozenset(args.begun))
        run_tier(session)
        return 0
    if not dry_run() and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no GPU here (SEGFAST_DRY_RUN=1 walks through on a CPU)",
            file=sys.stderr,
        )
        return 2
    if dry_run():
        args.budget = DRY_RUN_S
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget
    tiers = list(args.tier)
    if set(tiers) - {"T1", "compile"}:
        tiers.insert(0, "compile")
    well = True
    with (args.out / "gpu.log").open("a") as log:
        for tier in tiers:
            left = deadline - time.monotonic()
            if left <= 0:
                print(f"{tier}: not run, the {args.budget:.0f} s are spent")
                continue
            start = time.monotonic()
            well &= _run_tier(tier, min(left, _budget(tier, args, left)), args, log)
            _tell(log, f"== {tier} ended after {time.monotonic() - start:.0f} s")
    _summarise(args.out)
    return 0 if well else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--tier", nargs="+", choices=list(TIERS), default=list(DEFAULT))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="default: %(default)s")
    parser.add_argument("--family", choices=sorted({case.family for case in CASES}))
    parser.add_argument(
        "--case", nargs="+", default=[], choices=[case.name for case in CASES], metavar="NAME"
    )
    parser.add_argument(
        "--budget", type=float, default=570.0, help="seconds for all tiers (default: %(default)s)"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--begun", nargs="*", default=[], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _budget(tier: str, args: argparse.Namespace, left: float) -> float:
    """A tier's own seconds; the last one asked for may use what is left, each of a dry run as well."""
    last = tier == args.tier[-1] and tier in ("T1", "T4", "T5", "bench", "unseen")
    return left if last or dry_run() else BUDGETS[tier]


def _run_tier(tier: str, budget_s: float, args: argparse.Namespace, log) -> bool:
    """Run one tier in workers until it is through; False if one hung or too many died."""
    start, begun = time.monotonic(), []
    _tell(log, f"== {tier} ({budget_s:.0f} s)")
    for _ in range(MOST_WORKERS):
        left = budget_s - (time.monotonic() - start)
        if left <= 0:
            return True
        code, seen = _worker(tier, left, begun, args, log)
        begun += seen
        if code in (0, WRONG):
            return code == 0
        if not seen and code != STICKY:
            _tell(log, f"{tier}: the worker ended with {code} before its first case; see gpu.log")
            return False
        _tell(log, f"{tier}: the worker ended with {code} in {begun[-1] if begun else 'its set-up'}")
        if code != STICKY and begun:
            _record_death(tier, begun[-1], code, args.out)
    return False


def _worker(
    tier: str, budget_s: float, begun: list[str], args: argparse.Namespace, log
) -> tuple[int, list[str]]:
    """One worker process: its exit code, and the cases it began. Its stdout is shown, all of it is logged."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks.gpu",
        "--worker",
        "--tier",
        tier,
        "--out",
        str(args.out),
    ]
    command += ["--budget", f"{budget_s:.1f}"]
    command += ["--family", args.family] if args.family else []
    command += ["--case", *args.case] if args.case else []
    command += ["--begun", *begun] if begun else []
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if dry_run() and tier in INTERPRETED:
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, errors="replace"
    )
    watchdog = threading.Timer(budget_s + GRACE_S, process.kill)
    watchdog.start()
    errors = threading.Thread(target=_copy, args=(process.stderr, log))
    errors.start()
    seen = []
    for line in process.stdout:  # type: ignore[union-attr]
        if line.startswith("begin "):
            seen.append(line.removeprefix("begin ").strip())
        _tell(log, line.rstrip("\n"))
    code = process.wait()
    errors.join()
    watchdog.cancel()
    return code, seen


def _copy(stream, log) -> None:
    for line in stream:
        log.write(line)
        log.flush()


def _tell(log, text: str) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def _record_death(tier: str, begun: str, code: int, out: Path) -> None:
    """A row for the case a worker died or hung in."""
    parts = begun.removeprefix(f"{tier} ").split("/")
    if len(parts) == 4:
        names = dict(zip(("case", "dtype", "direction", "size"), parts, strict=True))
        note = f"the process ended with code {code}"
        append_rows(out / "rows.csv", [{**names, "tier": tier, "status": "failed", "note": note}])


def _summarise(out: Path) -> None:
    from benchmarks.report import summary, write_report

    path = out / "rows.csv"
    if not path.exists():
        print("no rows were measured")
        return
    rows = read_rows(path)
    write_report(rows, out / "report.html")
    print(summary(rows))


if __name__ == "__main__":
    sys.exit(main())
