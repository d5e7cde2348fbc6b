"""`segfast tune`: time each kernel's tile sizes beside ATen on this GPU within a budget; keep the best."""

import argparse
import contextlib
import dataclasses
import json
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._errors import UserError, describe
from ._files import atomic_write
from ._load_model import parse_dtype
from ._output import claim
from ._timing import interleave
from ._tune_calls import FAMILIES, Family, is_gradient
from ._tune_layers import AnyLayer, Calls, Draw, Head, Image, Layer, Pyramid

SHAPES = {
    Layer: "N,C_IN,C_OUT,H,W,KERNEL,STRIDE,PADDING[,DILATION[,FUSED]]",
    Head: "N,CLASSES,H,W,SCALE",
    Pyramid: "N,C_IN,C_OUT,H,W,RATE",
    Image: "N,LABELS,H,W",
}
DTYPES = ("bfloat16", "float16", "float32")
ERROR = 4e-2  # a candidate further than this from ATen, in norm, is wrong


@dataclasses.dataclass(frozen=True)
class Variant:
    """One operation with one configuration: its recorded launches, and the output they fill.

    That is tensors, or a function that makes them of what the launches fill: time it takes as well.
    """

    operation: str
    bucket: str
    config: Any
    launches: list
    output: Any

    def run(self) -> Any:
        for plan, pointers in self.launches:
            plan(*pointers)
        return self.output() if callable(self.output) else self.output


def variants(
    operation: str, run: Callable[[], Any], device: torch.device, parts: Mapping[str, Any] | None = None
) -> Iterator[Variant]:
    """Every configuration worth timing of `operation`, which `run` calls; recorded, nothing launched yet.

    Where it is made of other operations, those run with the configurations in `parts`, else with the tables'.
    """
    from .kernels import architecture, candidates, override_config, record_launches
    from .kernels._configs import record_problems
    from .kernels._device import shared_memory_limit

    with record_problems() as problems, record_launches():
        run()

    def of(problems: Sequence[Any]) -> Iterator[Variant]:
        for problem in dict.fromkeys(problems):
            for config in candidates(problem, architecture(device), shared_memory_limit(device)):
                with override_config(problem.operation, config), record_launches() as launches:
                    output = run()
                yield Variant(problem.operation, problem.bucket, config, launches, output)

    with contextlib.ExitStack() as held:
        for name, config in (parts or {}).items():
            held.enter_context(override_config(name, config))
        # Another kernel's problem alone where that one serves the layer: the one that goes tap by tap.
        own = list(of([problem for problem in problems if problem.operation == operation]))
        if any([plan.config == variant.config for variant in own for plan, _ in variant.launches]):
            yield from own
        else:
            yield from of([problem for problem in problems if problem.operation != operation])


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning one call found; `rows` are (configuration, "aten" or a rival, median us), fastest first.

    `kernel` is the operation that has the configuration: `operation` itself, or the one that serves it;
    `asked` the bucket that the choice of backend looks `operation` up in.
    """

    operation: str
    kernel: str
    bucket: str
    config: Any
    us: float
    aten_us: float
    rows: list[tuple[str, float]]
    rivals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    asked: str | None = None


def tune_call(
    operation: str,
    calls: Calls,
    device: torch.device,
    *,
    budget_s: float,
    parts: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = print,
) -> Tuned | None:
    """Time every configuration of `operation` that is right, interleaved with ATen; None without one.

    The calls return the same tensor or tuple of tensors, ours perhaps by a function: see `Variant`. `parts`
    as in `variants`.
    """
    expected, runs, kept = calls.aten(), {"aten": calls.aten}, {}
    if calls.reference is not None:
        expected = calls.reference()
    for variant in variants(operation, calls.ours, device, parts):
        name = str(variant.config)
        try:
            error = _distance(variant.run(), expected)
        except Exception as failure:
            # A configuration the compiler or the device refuses is no candidate.
            log(f"{variant.operation} {name}: {type(failure).__name__}: {str(failure)[:200]}")
            continue
        if not error <= ERROR:
            log(f"{variant.operation} {name}: differs from ATen by {error:.3g}, not timed")
            continue
        runs[name], kept[name] = variant.run, variant
    if not kept:
        return None
    rivals = [name for name, rival in calls.rivals.items() if _is_right(name, rival, expected, log)]
    runs.update({name: calls.rivals[name] for name in rivals})
    # On a CPU, in a dry run, only the motions.
    seconds, rounds = (budget_s, 5) if device.type == "cuda" else (0.0, 1)
    timings = interleave(runs, device, budget_s=seconds, min_rounds=rounds)
    times = {name: timing.us for name, timing in timings.items()}
    best = min(kept, key=lambda name: times[name])
    rows = sorted(times.items(), key=lambda item: item[1])
    winner = kept[best]
    return Tuned(
        operation,
        winner.operation,
        winner.bucket,
        winner.config,
        times[best],
        times["aten"],
        rows,
        {name: times[name] for name in rivals},
        calls.bucket,
    )


def _is_right(name: str, run: Callable[[], Any], expected: Any, log: Callable[[str], None]) -> bool:
    """Whether a rival exists here and computes the same."""
    try:
        error = _distance(run(), expected)
    except Exception as failure:
        log(f"{name}: {type(failure).__name__}: {str(failure)[:200]}")
        return False
    if not error <= ERROR:
        log(f"{name}: differs from ATen by {error:.3g}, not timed")
    return error <= ERROR


class Tuner:
    """Tunes operations one after the other; what it found for a part holds for what is made of it."""

    def __init__(self, dtype: torch.dtype, device: torch.device, log: Callable[[str], None] = print) -> None:
        self.dtype, self.device, self.log = dtype, device, log
        self.found: dict[tuple[str, AnyLayer], Tuned] = {}

    def calls(self, family: Family, operation: str, layer: AnyLayer) -> Calls:
        """Our call and ATen's."""
        return family.operations[operation](layer, Draw(self.dtype, self.device))

    def parts(self, family: Family, operation: str, layer: AnyLayer) -> dict[str, Any]:
        """The configurations found for what `operation` may be made of."""
        keys = [(part, family.layer_of(part, layer)) for part in family.parts.get(operation, ())]
        known = [self.found[key] for key in keys if key in self.found]
        return {tuned.kernel: tuned.config for tuned in known}

    def tune(self, family: Family, operation: str, layer: AnyLayer, budget_s: float) -> Tuned | None:
        """Tune one operation of one layer."""
        calls = self.calls(family, operation, layer)
        parts = self.parts(family, operation, layer)
        tuned = tune_call(operation, calls, self.device, budget_s=budget_s, parts=parts, log=self.log)
        if tuned is not None:
            self.found[operation, family.layer_of(operation, layer)] = tuned
        return tuned


def _distance(output: Any, expected: Any) -> float:
    """Largest ||a - b|| / ||b|| over the tensors, 0 / 0 being 0; NaN stays NaN."""
    pairs = zip(*([t] if isinstance(t, Tensor) else list(t) for t in (output, expected)), strict=True)
    least = torch.finfo(torch.float32).tiny
    errors = [float((a.float() - b.float()).norm() / b.float().norm().clamp_min(least)) for a, b in pairs]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def merge_table(path: Path, found: list[Tuned], device: torch.device) -> None:
    """Put what was found into the table at `path`, over older rows of the same bucket."""
    from .kernels import architecture, gpu_slug
    from .kernels._configs import config_row

    table = _read_table(path) if path.exists() else {}
    table.update(architecture=architecture(device), gpu=gpu_slug(device))
    operations = table.setdefault("operations", {})
    for row in found:
        times = config_row(row.config, row.us, row.aten_us, **row.rivals)
        # Under the operation's name for who chooses the backend, under the kernel's for who chooses its tile:
        # of another family perhaps, whose own rows, which decide that family's backend, stay.
        operations.setdefault(row.operation, {})[row.asked or row.bucket] = times
        own = operations.setdefault(row.kernel, {})
        if row.kernel == row.operation:
            own[row.bucket] = times
        elif "timed_as" in own.get(row.bucket, {"timed_as": ""}):
            own[row.bucket] = {**times, "timed_as": row.operation}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON ({describe(error)})") from error
    if not isinstance(table, dict) or not isinstance(table.get("operations", {}), dict):
        raise UserError(f"{path}: not a table that `segfast tune` wrote")
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `segfast tune`."""
    parser.add_argument("--family", choices=sorted(FAMILIES), help="tune this one only (default: all)")
    parser.add_argument(
        "--shape",
        action="append",
        metavar="SIZES",
        help=f"a layer of --family to tune (repeatable): {SHAPES[Layer]}; a head's {SHAPES[Head]}; "
        f"an ASPP's {SHAPES[Pyramid]}; a CRF's {SHAPES[Image]}",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help=f"{', '.join(DTYPES)}, or bf16, ... (default: %(default)s)"
    )
    parser.add_argument("--budget", type=float, default=240.0, help="seconds in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the table (the user's cache)")


def work(families: Mapping[str, Sequence[AnyLayer]]) -> list[tuple[Family, str, AnyLayer]]:
    """The (family, operation, layer) to tune, each once: what only training runs comes last."""
    found = {}
    for name, layers in families.items():
        family = FAMILIES[name]
        for operation in family.operations:
            for layer in [layer for layer in layers if family.concerns(operation, layer)]:
                found[operation, family.layer_of(operation, layer)] = (family, operation, layer)
    return sorted(found.values(), key=lambda item: is_gradient(item[1]))


def run(args: argparse.Namespace) -> int:
    """Tune, print a table, keep the winners. Exit code 2 without a GPU.

    `SEGFAST_DRY_RUN=1` with `TRITON_INTERPRET=1` goes through the motions on a CPU; its figures mean nothing.
    """
    from ._table import format_table
    from .kernels import gpu_slug
    from .kernels._configs import cache_folder
    from .ops import backend
    from .ops._backend import forget_decisions

    if args.shape and args.family is None:
        raise UserError(f"--shape needs --family ({', '.join(FAMILIES)}), whose layer it is")
    shapes = [_parse_shape(FAMILIES[args.family], text) for text in args.shape or ()]
    dtype = parse_dtype(args.dtype, DTYPES)
    if not args.budget > 0:
        raise UserError(f"--budget must be positive, got {args.budget}")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is not a folder")
    device = _device(args)
    path = (args.out if args.out is not None else cache_folder()) / f"{gpu_slug(device)}.json"
    if path.exists():
        _read_table(path)  # before anything is timed
    claim(path, force=True)  # rows are merged into it
    deadline = time.monotonic() + args.budget
    names = [args.family] if args.family else list(FAMILIES)
    todo = work({name: shapes or FAMILIES[name].layers for name in names})
    tuner, found = Tuner(dtype, device), []
    with backend("triton"):
        for i, (family, operation, layer) in enumerate(todo):
            left = deadline - time.monotonic()
            if left <= 0:
                print(f"budget of {args.budget:.0f} s spent; {len(todo) - i} of {len(todo)} calls not tuned")
                break
            tuned = tuner.tune(family, operation, layer, 0.5 * left / (len(todo) - i))
            if tuned is not None:
                found.append(tuned)
                # Written as it comes: an interrupted run keeps what it measured.
                merge_table(path, [tuned], device)
    forget_decisions()
    rows = [
        (t.operation, t.bucket, str(t.config), f"{t.us:.1f}", f"{t.aten_us:.1f}", f"{t.aten_us / t.us:.2f}")
        for t in found
    ]
    print(format_table(("operation", "bucket", "configuration", "us", "ATen us", "ratio"), rows))
    print(f"kept in {path}" if found else "nothing could be tuned")
    return 0 if found else 1


def _device(args: argparse.Namespace) -> torch.device:
    from .kernels import interpreting

    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("SEGFAST_DRY_RUN") != "1":
        raise UserError("tuning times kernels on a GPU, and torch sees none here")
    if not interpreting() or args.out is None or args.shape is None:
        raise UserError("a dry run without a GPU needs TRITON_INTERPRET=1, --shape (a tiny one) and --out")
    torch.set_num_threads(1)
    return torch.device("cpu")


def _parse_shape(family: Family, text: str) -> AnyLayer:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    for kind in family.kinds_of_layers():
        least = [0 if name in ("padding", "fused") else 1 for name in kind._fields]
        needed = len(least) - len(kind._field_defaults)
        if needed <= len(sizes) <= len(least) and all(map(operator.ge, sizes, least)):
            return kind(*sizes)
    known = " or ".join(SHAPES[kind] for kind in family.kinds_of_layers())
    raise UserError(f"--shape must be {known}, whole numbers, got {text!r}")
