"""The proofs in processes of their own, a family each: a kernel that faults costs its own operation only.

An asynchronous fault leaves the device unusable for the process that made it. The next process goes on behind
the case that faulted. `main` in such a process, given "prove", reads the cases already judged from its
standard input and writes what it does, a line of JSON each. Given "compile", it compiles its part of what the
proofs will launch.
"""

import contextlib
import importlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch

from ._apart import MARK, Child, compile_side_by_side, how_many, process_of
from ._backend import backend
from ._case import proofs
from ._prove import DTYPES, DeviceLost, ProofRow, prove

COMMAND = process_of(__name__)
_MOST_SECONDS = 900.0  # of one: a kernel that hangs is wrong
NOTHING_RUN = "no case"  # in place of a case where a process ended before any
Key = tuple[str, str, str]  # operation, dtype, case


def compile_proofs(device: torch.device, dtypes: Sequence[torch.dtype], families: Sequence[str]) -> None:
    """Compile what proofs of these families will launch, several at a time.

    Triton's cache on disk hands the kernels on; one that is missing is compiled where it is proven.
    """
    count, names = how_many(device), ",".join(map(_name, dtypes))
    commands = [
        [*COMMAND, "compile", str(device), names, f"{part}/{count}", ",".join(families)]
        for part in range(count)
    ]
    compile_side_by_side(commands, [""] * count, time.perf_counter() + _MOST_SECONDS)


def prove_apart(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES, most: int | None = None,
    families: Sequence[str] | None = None,
) -> Iterator[ProofRow]:  # fmt: skip
    """`prove`'s rows as they come, each family's from processes of its own."""
    from . import FAMILIES  # which imports this module

    for family in FAMILIES if families is None else families:
        judged: set[Key] = set()
        while True:
            begun, code, why, rows = None, 0, "", 0
            for kind, *values in _lines(device, dtypes, most, family, judged):
                if kind == "begin":
                    begun = (values[0], values[1], values[2])
                elif kind == "row":
                    row, begun, rows = ProofRow(*values), None, rows + 1
                    judged.add((row.operation, row.dtype, row.case))
                    yield row
                else:
                    code, why = values
            if begun is not None:  # the process ended within this case
                judged.add(begun)
                yield ProofRow(*begun, float("nan"), 0.0, False, why)
            elif code and not rows:  # or before any
                yield from _nothing_proven(family, dtypes, why)
                break
            if code == 0:
                break


def _nothing_proven(family: str, dtypes: tuple[torch.dtype, ...], note: str) -> Iterator[ProofRow]:
    for operation in importlib.import_module(f"{__package__}.{family}").OPERATIONS:
        for dtype in dtypes:
            yield ProofRow(operation, _name(dtype), NOTHING_RUN, float("nan"), 0.0, False, note)


def _lines(device, dtypes, most, family: str, judged: set[Key]) -> Iterator[list]:
    """The lines of one process; last ["end", its exit code, how it ended in words]."""
    command = [*COMMAND, "prove", str(device), ",".join(map(_name, dtypes)), str(most or 0), family]
    with Child(command) as process:
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(_MOST_SECONDS, process.time_out)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(sorted(judged)))
                process.stdin.close()
            for line in process.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
        finally:
            timer.cancel()
            process.kill()
    yield ["end", process.returncode, process.why()]


def main(what: str, device: str, dtypes: str, *rest: str) -> int:
    """0, or 1 where the device is lost and another process is to go on."""
    found = tuple(getattr(torch, name) for name in dtypes.split(","))
    work = _prove if what == "prove" else _compile
    return work(torch.device(device), found, *rest)


def _prove(device: torch.device, dtypes: tuple[torch.dtype, ...], most: str, family: str) -> int:
    judged = {(key[0], key[1], key[2]) for key in json.load(sys.stdin)}

    def tell(*line: object) -> None:
        print(f"{MARK}{json.dumps(line)}", flush=True)

    try:
        for row in prove(
            device, dtypes, int(most) or None, (family,), judged, lambda *key: tell("begin", *key)
        ):
            tell("row", *row)
    except DeviceLost:
        return 1
    return 0


def _compile(device: torch.device, dtypes: tuple[torch.dtype, ...], part: str, families: str) -> int:
    from segfast.kernels import record_launches  # which needs triton

    torch.set_num_threads(1)  # as many processes as cores do the same
    index, count = map(int, part.split("/"))
    for family in families.split(","):
        for dtype in dtypes:
            with backend("triton"), record_launches() as launches, contextlib.suppress(Exception):
                for item in proofs(family, device, dtype):
                    item.actual()
            for launch, pointers in launches[index::count]:
                with contextlib.suppress(Exception):  # it fails where it is proven, and is told of there
                    launch.warmup(*pointers)
    return 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
