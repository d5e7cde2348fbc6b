"""The long checks of kernels on a GPU (`FULL=1 make gpu-test`): fuzz, offsets past 2**31, graphs, streams.

Each check is a generator of (name, passed, note). compute-sanitizer can refuse a device: a line, no failure.
"""

import itertools
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.environment import ROOT
from segfast.functional import conv_transpose2d
from segfast.ops._prove import error_and_allowance

Outcome = tuple[str, bool, str]
CASES_EACH = 80  # image sizes for each geometry: with 25 geometries, 2,000 cases


class Geometry(NamedTuple):
    """What a kernel is compiled for. Image sizes vary within it: 2,000 cases need few compilations."""

    ci: int
    co: int
    k: int
    s: int
    p: int
    extra: int
    d: int
    groups: int
    dtype: torch.dtype


def geometries(count: int, dtypes: tuple[torch.dtype, ...], seed: int = 0) -> list[Geometry]:
    """Random valid ones, each kernel size and stride class among them."""
    draw = random.Random(seed)
    classes = itertools.cycle([(2, 2), (4, 4), (4, 2), (3, 2), (1, 2), (5, 3), (8, 4), (3, 1), (2, 3)])
    found = []
    for k, s in itertools.islice(classes, count):
        groups = draw.choice([1, 1, 1, 2])
        d = draw.choice([1, 1, 2])
        extra = draw.randrange(max(s, d))
        p = draw.randrange(min(k, 3))
        ci, co = (groups * draw.choice([1, 3, 8, 16, 21, 40]) for _ in range(2))
        found.append(Geometry(ci, co, k, s, p, extra, d, groups, draw.choice(dtypes)))
    return found


def fuzz(device: torch.device, count: int, each: int, dtypes: tuple[torch.dtype, ...]) -> Iterator[Outcome]:
    """Forward and both gradients on random image sizes against fp64, by the error rule of the proofs."""
    draw = random.Random(1)
    for g in geometries(count, dtypes):
        failed, worst = [], 0.0
        for _ in range(each):
            size = draw.choice([1, 2, 3]), draw.randint(1, 19), draw.randint(1, 19)
            out = [(n - 1) * g.s - 2 * g.p + g.d * (g.k - 1) + g.extra + 1 for n in size[1:]]
            if min(out) < 1:
                continue
            for name, error, allowed in _compare(device, g, size):
                worst = max(worst, error / allowed if allowed else 0.0)
                if not error <= allowed:
                    failed.append(f"{name} {size} {error:.2e} > {allowed:.2e}")
        label = " ".join(f"{field}={value}" for field, value in g._asdict().items())
        yield f"fuzz {label}", not failed, "; ".join(failed[:3]) or f"at most {worst:.2f} of the allowance"


def _compare(
    device: torch.device, g: Geometry, size: tuple[int, int, int]
) -> Iterator[tuple[str, float, float]]:
    batch, height, width = size
    x = torch.randn(batch, g.ci, height, width)
    weight = torch.randn(g.ci, g.co // g.groups, g.k, g.k)
    inputs = [t.to(g.dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight)]
    inputs.append(torch.randn(g.co).to(g.dtype))
    geometry = (g.s, g.p, g.extra, g.groups, g.d)
    grad = None

    def run(function, tensors):
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
        output = function(*leaves, *geometry)
        nonlocal grad
        if grad is None:
            grad = torch.randn(output.shape).to(g.dtype)
        return [output, *torch.autograd.grad(output, leaves[:2], grad.to(output))]

    exact = run(F.conv_transpose2d, [t.double() for t in inputs])
    on_device = [t.to(device) for t in inputs]
    theirs, mine = run(F.conv_transpose2d, on_device), run(conv_transpose2d, on_device)
    rounded = grad
    grad = rounded.double().abs()  # type: ignore[union-attr]
    magnitudes = run(F.conv_transpose2d, [t.double().abs() for t in inputs])
    depths = (g.ci * g.k * g.k, g.co * g.k * g.k, batch * height * width)
    names = ("forward", "grad_input", "grad_weight")
    for name, *values in zip(names, mine, exact, theirs, magnitudes, depths, strict=True):
        actual, reference, aten, magnitude, depth = values
        yield name, *error_and_allowance(actual, reference.detach(), aten, magnitude.detach(), depth)


def large(device: torch.device) -> Iterator[Outcome]:
    """An output past 2**31 elements. Kernel equals stride: its last rows come from the last input rows."""
    free = torch.cuda.mem_get_info(device)[0]
    height, width, channels = 4100, 8192, 16  # 2 * 4100 * 2 * 8192 * 16 = 2.15e9 outputs
    if free < 16 << 30:
        yield "past 2**31 elements", True, f"not run: {free >> 30} GiB free, 16 needed"
        return
    x = torch.randn(1, channels, height, width, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 2, 2, device=device, dtype=torch.bfloat16)
    weight = weight.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        output = conv_transpose2d(x, weight, None, 2)
        for rows in (slice(0, 8), slice(height - 8, height)):
            expected = F.conv_transpose2d(x[:, :, rows].double(), weight.double(), None, 2)
            part = output[:, :, 2 * rows.start : 2 * rows.stop].double()
            error = float((part - expected).norm() / expected.norm())
            yield f"past 2**31 elements, rows {rows.start} on", error < 1e-2, f"relative error {error:.1e}"


def _step(device: torch.device):
    x = torch.randn(2, 32, 24, 24, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(32, 16, 2, 2, device=device, dtype=torch.bfloat16)
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()

    def step() -> list[torch.Tensor]:
        output = conv_transpose2d(x, weight, None, 2, activation="relu")
        return [output.detach(), *torch.autograd.grad(output, (x, weight), torch.ones_like(output))]

    return x, step


def graphs_and_streams(device: torch.device) -> Iterator[Outcome]:
    """A captured training step replays bit for bit on new inputs; so does the step on another stream."""
    x, step = _step(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    eager = step()
    equal = all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    yield "CUDA graph of a training step", equal, ""
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        results = [step() for _ in range(20)]
    side.synchronize()
    equal = all(torch.equal(a, b) for result in results for a, b in zip(result, eager, strict=True))
    yield "side stream, 20 times the same bits", equal, ""


def sanitizer() -> Iterator[Outcome]:
    """compute-sanitizer's memcheck over a small step, where it is there and takes the device."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield "compute-sanitizer", True, "not run: not on the PATH"
        return
    code = (
        "import torch, segfast; from benchmarks.full import _step\n"
        "segfast.backend('triton'); _step(torch.device('cuda'))[1](); torch.cuda.synchronize()"
    )
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        yield "compute-sanitizer", True, "not run to its end within 240 s"
        return
    lines = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "not supported" in line]
    if done.returncode == 0 or done.returncode == 9:
        yield "compute-sanitizer memcheck", done.returncode == 0, " ".join(lines)
    else:
        yield "compute-sanitizer", True, f"not run: {' '.join(lines) or done.stdout[-200:]}"


def checks(device: torch.device) -> Iterator[Outcome]:
    """All of them; on a CPU (a dry run, in the interpreter) a handful of fuzzed cases."""
    if device.type != "cuda":
        yield from fuzz(device, 2, 1, (torch.float32,))
        return
    yield from graphs_and_streams(device)
    yield from large(device)
    yield from fuzz(device, 25, CASES_EACH, (torch.bfloat16, torch.float16, torch.float32))
    yield from sanitizer()
