"""`segfast prove`: every kernel run on this GPU, on odd shapes, and compared with exact arithmetic."""

import argparse
import time

from .._errors import UserError
from ..ops import FAMILIES
from ._load_model import parse_device, parse_dtype

# What kernels compute in.
DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `segfast prove`."""
    parser.add_argument("--device", help="which GPU, e.g. cuda:1 (the current one)")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="this one only (repeatable)")
    parser.add_argument(
        "--dtype", action="append", help=f"this one only (repeatable): {', '.join(DTYPES)}, or bf16, ..."
    )


def run(args: argparse.Namespace) -> int:
    """Prove, row by row on the screen, and remember it. 0 if all is right, 1 if not, 2 without a GPU."""
    from ..ops import _proofs, _prove_apart  # which needs triton

    dtypes = [parse_dtype(text, DTYPES) for text in args.dtype or DTYPES]
    device = parse_device(args.device)
    if device.type != "cuda":
        raise UserError("the kernels are proven on a GPU: torch sees none, or --device names another device")
    start, rows = time.perf_counter(), []
    families = args.family or list(FAMILIES)
    print("compiling ...", flush=True)
    _prove_apart.compile_proofs(device, dtypes, families)
    for family in families:
        rows += _proofs.prove_family(family, device, dtypes, lambda row: print(row, flush=True))
    passed = sum(row.passed for row in rows)
    seconds = time.perf_counter() - start
    kept = "remembered in" if _proofs.is_remembered(rows, device) else "forgotten, as this cannot be written:"
    print(f"{passed} of {len(rows)} right, in {seconds:.0f} s; {kept} {_proofs.file()}")
    return 0 if passed == len(rows) else 1
