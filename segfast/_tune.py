"""`segfast tune`: time each kernel's tile sizes beside ATen on this GPU within a budget; keep the best."""

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._errors import UserError
from ._files import atomic_write
from ._timing import interleave

SHAPE = "N,C_IN,C_OUT,H,W,KERNEL,STRIDE,PADDING"
# U-Net's four up-convolutions, a 4x4 stride 2 decoder, and FCN's two: tuned where no --shape is given.
SHAPES = (
    (16, 1024, 512, 28, 28, 2, 2, 0),
    (16, 512, 256, 52, 52, 2, 2, 0),
    (16, 256, 128, 100, 100, 2, 2, 0),
    (16, 128, 64, 196, 196, 2, 2, 0),
    (16, 256, 128, 64, 64, 4, 2, 1),
    (16, 21, 21, 70, 70, 16, 8, 4),
    (16, 21, 21, 16, 16, 64, 32, 16),
)
DIRECTIONS = ("forward", "grad_input", "grad_weight")
ERROR = 4e-2  # a candidate further than this from ATen, in norm, is wrong


@dataclasses.dataclass(frozen=True)
class Variant:
    """One operation with one configuration: its recorded launches, and the output they fill."""

    operation: str
    bucket: str
    config: Any
    launches: list
    output: Any

    def run(self) -> None:
        for plan, pointers in self.launches:
            plan(*pointers)


def variants(run: Callable[[], Any], device: torch.device) -> Iterator[Variant]:
    """Every configuration worth timing of the operations in `run()`, recorded, nothing being launched yet."""
    from .kernels import architecture, candidates, override_config, record_launches
    from .kernels._configs import record_problems
    from .kernels._device import shared_memory_limit

    with record_problems() as problems, record_launches():
        run()
    for problem in dict.fromkeys(problems):
        for config in candidates(problem, architecture(device), shared_memory_limit(device)):
            with override_config(problem.operation, config), record_launches() as launches:
                output = run()
            yield Variant(problem.operation, problem.bucket, config, launches, output)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning one call found; `rows` are (configuration or "aten", median us), fastest first."""

    operation: str
    bucket: str
    config: Any
    us: float
    aten_us: float
    rows: list[tuple[str, float]]


def tune_call(
    ours: Callable[[], Any],
    aten: Callable[[], Any],
    device: torch.device,
    *,
    budget_s: float,
    log: Callable[[str], None] = print,
) -> Tuned | None:
    """Time every configuration of `ours` that agrees with `aten`, interleaved with it; None where none works.

    Both return the same tensor or tuple of tensors. `ours` must launch one tunable operation.
    """
    expected, runs, kept = aten(), {"aten": aten}, {}
    for variant in variants(ours, device):
        name = str(variant.config)
        try:
            variant.run()
            error = _distance(variant.output, expected)
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
    times = {name: timing.us for name, timing in interleave(runs, device, budget_s=budget_s).items()}
    best = min(kept, key=lambda name: times[name])
    rows = sorted(times.items(), key=lambda item: item[1])
    winner = kept[best]
    return Tuned(winner.operation, winner.bucket, winner.config, times[best], times["aten"], rows)


def _distance(output: Any, expected: Any) -> float:
    """Largest ||a - b|| / ||b|| over the tensors; NaN stays NaN."""
    pairs = zip(*([t] if isinstance(t, Tensor) else list(t) for t in (output, expected)), strict=True)
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def merge_table(path: Path, found: list[Tuned], device: torch.device) -> None:
    """Put what was found into the table at `path`, over older rows of the same bucket."""
    from .kernels import architecture, gpu_slug
    from .kernels._configs import config_row

    table = json.loads(path.read_text()) if path.exists() else {}
    table.update(architecture=architecture(device), gpu=gpu_slug(device))
    operations = table.setdefault("operations", {})
    for row in found:
        operations.setdefault(row.operation, {})[row.bucket] = config_row(row.config, row.us, row.aten_us)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def _calls(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, direction: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Our call and ATen's for one transposed convolution in one direction."""
    from .functional import conv_transpose2d

    n, c_in, c_out, height, width, kernel, stride, padding = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*size, device=device, generator=generator)
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    x = draw(n, c_in, height, width)
    weight = draw(c_in, c_out, kernel, kernel, scale=stride / (kernel * math.sqrt(c_in)))

    def bound(function: Callable[..., Tensor]) -> Callable[[], Any]:
        if direction == "forward":

            def forward() -> Tensor:
                with torch.no_grad():
                    return function(x, weight, None, stride, padding)

            return forward
        leaves = (
            x.detach().requires_grad_(direction == "grad_input"),
            weight.detach().requires_grad_(direction == "grad_weight"),
        )
        wanted = leaves[0] if direction == "grad_input" else leaves[1]
        output = function(*leaves, None, stride, padding)
        grad = torch.randn(output.shape, device=device, generator=torch.Generator(device).manual_seed(1))
        grad = grad.to(dtype).contiguous(memory_format=torch.channels_last)
        return lambda: torch.autograd.grad(output, wanted, grad, retain_graph=True)[0]

    return bound(conv_transpose2d), bound(F.conv_transpose2d)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `segfast tune`."""
    parser.add_argument(
        "--shape", action="append", metavar=SHAPE, help="a transposed convolution to tune (repeatable)"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="default: %(default)s"
    )
    parser.add_argument("--budget", type=float, default=120.0, help="seconds in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the table here instead of into the user's cache")


def run(args: argparse.Namespace) -> int:
    """Tune, print a table, keep the winners. Exit code 2 without a GPU.

    `SEGFAST_DRY_RUN=1` with `TRITON_INTERPRET=1` goes through the motions on a CPU; its figures mean nothing.
    """
    from ._table import format_table
    from .kernels import gpu_slug
    from .kernels._configs import cache_folder
    from .ops import backend
    from .ops._backend import forget_decisions

    shapes = [_parse_shape(text) for text in args.shape] if args.shape else list(SHAPES)
    if not args.budget > 0:
        raise UserError(f"--budget must be positive, got {args.budget}")
    device = _device(args)
    path = (args.out if args.out is not None else cache_folder()) / f"{gpu_slug(device)}.json"
    deadline = time.monotonic() + args.budget
    work = [(shape, direction) for direction in DIRECTIONS for shape in shapes]
    found: list[Tuned] = []
    with backend("triton"):
        for i, (shape, direction) in enumerate(work):
            left = deadline - time.monotonic()
            if left <= 0:
                print(f"budget of {args.budget:.0f} s spent; {len(work) - i} of {len(work)} calls not tuned")
                break
            share = left / (len(work) - i)
            ours, aten = _calls(shape, getattr(torch, args.dtype), device, direction)
            tuned = tune_call(ours, aten, device, budget_s=0.5 * share)
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
    return torch.device("cpu")


def _parse_shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 8 or min(shape[:7]) < 1 or shape[7] < 0:
        raise UserError(f"--shape must be {SHAPE}, whole numbers, got {text!r}")
    return shape
