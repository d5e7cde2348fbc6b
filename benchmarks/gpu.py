"""The GPU run: `python -m benchmarks.gpu [first] [second] --out FOLDER`, each part of at most six minutes.

`first` proves the kernels and measures the headline rows, ours beside every peer; `second` chooses what runs
each call of three models and measures them whole. Each is useful alone, and a row is written as it is done.
`layers` measures every case of a family, `full` makes the long checks; neither runs unless asked for.

Each step of a part runs in a process of its own, which is replaced if it dies: a kernel's illegal access or a
hang costs one case, not the run. Everything lands in one folder: gpu.log, rows.csv, ceilings.json,
report.html, and in choices/ what `make record` files for the product. A second part in another folder goes
on from the first one's proofs and choices once these are filed. `SEGFAST_DRY_RUN=1` walks the same way on a
CPU, with small shapes.
"""

import argparse
import contextlib
import os
import signal
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
from benchmarks.session import DTYPES, STICKY, WRONG, Session
from benchmarks.steps import PARTS, STEPS

DEFAULT = ("first", "second")
INTERPRETED = ("prove", "prove_all", "full")  # steps that launch kernels even in a dry run
SECONDS = 340.0  # of a part: with what is killed and written at its end it stays below six minutes
GRACE_S = 10.0  # beyond its budget, before a worker counts as hung
MOST_WORKERS = 6  # of one step
DRY_RUN_S = 1e6  # a dry run is walked to its end, however busy the machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts: 0 if all is well, 1 if a kernel is wrong or a step gave up, 2 without a GPU."""
    args = _parse(argv)
    args.out = args.out.absolute()
    if args.step:
        session = Session(
            args.step, args.out, args.budget, args.family, args.case, frozenset(args.begun), args.dtype
        )
        STEPS[args.step](session)
        return 0
    if not dry_run() and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no GPU here (SEGFAST_DRY_RUN=1 walks through on a CPU)",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    well = True
    with (args.out / "gpu.log").open("a") as log:
        for part in args.parts or DEFAULT:
            deadline = time.monotonic() + args.budget
            for step, most in PARTS[part].items():
                start = time.monotonic()
                budget = DRY_RUN_S if dry_run() else min(most, deadline - start)
                if budget <= 0:
                    _tell(log, f"== {step} not run: the {args.budget:.0f} s are spent")
                    continue
                well &= _run_step(step, budget, args, log)
                _tell(log, f"== {step} ended after {time.monotonic() - start:.0f} s")
            _summarize(args.out)
    return 0 if well else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: {' '.join(DEFAULT)})"
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="default: %(default)s")
    parser.add_argument("--family", choices=sorted({case.family for case in CASES}))
    parser.add_argument(
        "--case", nargs="+", default=[], choices=[case.name for case in CASES], metavar="NAME"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the cases (their own)")
    parser.add_argument(
        "--budget", type=float, default=SECONDS, help="seconds for each part (default: %(default)s)"
    )
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--begun", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: expected {', '.join(PARTS)}")
    return args


def _run_step(step: str, budget_s: float, args: argparse.Namespace, log) -> bool:
    """Run one step in workers until it is through; False if one hung or too many died."""
    start, begun = time.monotonic(), []
    _tell(log, f"== {step} ({budget_s:.0f} s)")
    for _ in range(MOST_WORKERS):
        left = budget_s - (time.monotonic() - start)
        if left <= 0:
            return True
        code, seen = _worker(step, left, begun, args, log)
        begun += seen
        if code in (0, WRONG):
            return code == 0
        if not seen and time.monotonic() - start >= budget_s:
            _tell(log, f"{step}: ended when its time was up")
            return True
        if not seen and code != STICKY:
            _tell(log, f"{step}: the worker ended with {code} before its first case; see gpu.log")
            return False
        _tell(log, f"{step}: the worker ended with {code} in {begun[-1] if begun else 'its set-up'}")
        if code != STICKY and begun:
            _record_death(step, begun[-1], code, args.out)
    return False


def _worker(
    step: str, budget_s: float, begun: list[str], args: argparse.Namespace, log
) -> tuple[int, list[str]]:
    """One worker process: its exit code, and the cases it began. Its stdout is shown, all of it is logged."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu", "--step", step, "--out", str(args.out)]
    command += ["--budget", f"{budget_s:.1f}"]
    for name in ("family", "dtype"):
        command += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    command += ["--case", *args.case] if args.case else []
    command += ["--begun", *begun] if begun else []
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment["SEGFAST_CACHE"] = str(args.out)
    if dry_run() and step in INTERPRETED:
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        errors="replace",
        start_new_session=True,
    )
    watchdog = threading.Timer(budget_s + GRACE_S, _kill, [process])
    watchdog.start()
    errors = threading.Thread(target=_copy, args=(process.stderr, log))
    errors.start()
    seen = []
    try:
        for line in process.stdout:  # type: ignore[union-attr]
            if line.startswith("begin "):
                seen.append(line.removeprefix("begin ").strip())
            _tell(log, line.rstrip("\n"))
        code = process.wait()
    finally:
        watchdog.cancel()
        _kill(process)
    errors.join()
    return code, seen


def _kill(process: subprocess.Popen) -> None:
    """End a worker and the processes it has started, which would go on using the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _copy(stream, log) -> None:
    for line in stream:
        log.write(line)
        log.flush()


def _tell(log, text: str) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def _record_death(step: str, begun: str, code: int, out: Path) -> None:
    """A row for the case a worker died or hung in."""
    key = begun.removeprefix(f"{step} ").partition(" ")[0]
    parts = key.split("/")
    if len(parts) == 4:
        names = dict(zip(("case", "dtype", "direction", "size"), parts, strict=True))
        note = f"the process ended with code {code}"
        append_rows(out / "rows.csv", [{**names, "tier": step, "status": "failed", "note": note}])


def _summarize(out: Path) -> None:
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
