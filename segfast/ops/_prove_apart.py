"""The proofs in processes of their own, a family each: a kernel that faults costs its own operation only.

An asynchronous fault leaves the device unusable for the process that made it. The next process goes on behind
the case that faulted. `python -m segfast.ops._prove_apart DEVICE DTYPES MOST FAMILY` is such a process: it
reads the cases already judged from its standard input and writes what it does, a line of JSON each.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from ._prove import DTYPES, DeviceLost, ProofRow, prove

Key = tuple[str, str, str]  # operation, dtype, case


def prove_apart(
    device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES, most: int | None = None,
    families: Sequence[str] | None = None,
) -> Iterator[ProofRow]:  # fmt: skip
    """`prove`'s rows as they come, each family's from processes of its own."""
    from . import FAMILIES

    for family in FAMILIES if families is None else families:
        judged: set[Key] = set()
        while True:
            begun, code, rows = None, 0, 0
            for kind, *values in _lines(device, dtypes, most, family, judged):
                if kind == "begin":
                    begun = (values[0], values[1], values[2])
                elif kind == "row":
                    row, begun, rows = ProofRow(*values), None, rows + 1
                    judged.add((row.operation, row.dtype, row.case))
                    yield row
                else:
                    code = values[0]
            if begun is not None:  # the process ended within this case
                judged.add(begun)
                yield ProofRow(*begun, float("nan"), 0.0, False, f"the process ended with code {code}")
            elif code and not rows:  # or before any
                yield from _nothing_proven(family, dtypes, f"the process ended with code {code}")
                break
            if code == 0:
                break


def _nothing_proven(family: str, dtypes: tuple[torch.dtype, ...], note: str) -> Iterator[ProofRow]:
    import importlib

    for operation in importlib.import_module(f"{__package__}.{family}").OPERATIONS:
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            yield ProofRow(operation, name, "all", float("nan"), 0.0, False, note)


def _lines(device, dtypes, most, family: str, judged: set[Key]) -> Iterator[list]:
    """What one process writes; last ["end", its exit code]."""
    names = ",".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    command = [sys.executable, "-m", __name__, str(device), names, str(most or 0), family]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(sorted(judged)))
        process.stdin.close()
        try:
            for line in process.stdout:
                if line.startswith("["):
                    yield json.loads(line)
        finally:
            process.kill()
    yield ["end", process.returncode]


def main(device: str, dtypes: str, most: str, family: str) -> int:
    """0, or 1 where the device is lost and another process is to go on."""
    judged = {(key[0], key[1], key[2]) for key in json.load(sys.stdin)}

    def tell(*line: object) -> None:
        print(json.dumps(line), flush=True)

    found = tuple(getattr(torch, name) for name in dtypes.split(","))
    try:
        for row in prove(
            torch.device(device),
            found,
            int(most) or None,
            (family,),
            judged,
            lambda *key: tell("begin", *key),
        ):
            tell("row", *row)
    except DeviceLost:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
