"""The cost of a call on the host beyond plain ATen's, kernel launches stubbed."""

import json
import math
import os
import subprocess
import sys

import pytest

from benchmarks.cases import find
from benchmarks.environment import ROOT
from benchmarks.overhead import CALLS, ROUNDS
from benchmarks.timing import Measurement
from segfast._timing import Timing

NAN = math.nan
SIZES = {"n": 1, "ci": 8, "co": 8, "h": 2, "w": 2, "k": 2, "s": 2, "p": 0}


def _measure(interpret: str, rounds: int) -> dict:
    # TRITON_INTERPRET must stand before triton is imported.
    environment = dict(os.environ, TRITON_INTERPRET=interpret, PYTHONPATH=str(ROOT))
    environment.pop("SEGFAST_BACKEND", None)
    command = [sys.executable, "-m", "benchmarks.overhead", str(rounds)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["triton", "auto_to_aten"])
def test_call_overhead(compare, way):
    """Rows of both calls, whose difference is the overhead; without --benchmark only that they are made."""
    rounds = ROUNDS if compare.proper else 1
    found = compare.benchmark.pedantic(_measure, ("1" if way == "triton" else "0", rounds), rounds=1)
    assert (found["launches"] > 0) == (way == "triton")
    for kind, times in found["times"].items():
        case = find("unet_up3").replace(
            name=f"call_{way}_{kind}", layer="host time of a call", params=SIZES, dtype="float32", size="cpu"
        )
        compare.keep(
            case,
            [
                Measurement(
                    name,
                    name == "segfast",
                    "ok",
                    f"median of {rounds} blocks of {CALLS} calls",
                    timing=Timing(NAN, NAN, NAN, *quantiles, rounds),
                )
                for name, quantiles in times.items()
            ],
        )
