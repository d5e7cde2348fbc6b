"""The long checks of kernels on a GPU (`FULL=1 make gpu-test`): fuzz, offsets past 2**31, graphs, streams.

Each check is a generator of (name, passed, note). compute-sanitizer can refuse a device: a line, no failure.
"""

import itertools
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.environment import ROOT
from segfast.functional import conv_transpose2d, depthwise_conv2d, separable_conv2d, upsample_cross_entropy
from segfast.ops._prove import Evidence, error_and_allowance
from segfast.ops.segmentation_head.evidence import head_evidence
from segfast.ops.segmentation_head.geometry import Resampling
from segfast.ops.separable_conv2d.evidence import config_of, depthwise_evidence, separable_evidence

Outcome = tuple[str, bool, str]
Size = tuple[int, int, int]  # images, height, width
Comparison = Iterator[tuple[str, float, float]]  # name, error, what is allowed
CASES_EACH = 50  # image sizes for each subject: with 44 of them, 2,200 cases
LARGE_GIB = 40  # of device memory, for the tensors past 2**31 elements and their fp64 references
FORMS = ("fused", "two kernels")  # of separable convolution
_PLANS: dict[str, dict] = {form: {} for form in FORMS}  # each form's launches, kept from call to call


class Subject(NamedTuple):
    """What kernels are compiled for, and how they do on images of some size, no larger than `most`."""

    label: str
    compare: Callable[[torch.device, Size], Comparison]
    most: int = 19


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


def subjects(dtypes: Sequence[torch.dtype], few: bool = False) -> list[Subject]:
    """What is fuzzed, of every family; `few`: one or two of each."""
    draw = random.Random(0)
    up = [
        Subject(" ".join(f"{field}={value}" for field, value in g._asdict().items()), partial(_compare, g))
        for g in geometries(2 if few else 25, tuple(dtypes))
    ]
    found = [_depthwise(draw, draw.choice(dtypes), k) for k in ((3,) if few else (1, 2, 3, 3, 4, 5, 5, 7, 9))]
    for form in FORMS:
        found += [_separable(draw, draw.choice(dtypes), form) for _ in range(1 if few else 3)]
    resamplings = (
        ("bilinear", False, 4),
        ("bilinear", True, 8),
        ("nearest", False, 3),
        ("bilinear", False, 2),
    )
    heads = [_head(draw, draw.choice(dtypes), *how) for how in resamplings[: 1 if few else None]]
    return up + found + heads


def _depthwise(draw: random.Random, dtype: torch.dtype, kernel: int) -> Subject:
    channels, filters = draw.choice([1, 3, 8, 21, 40, 72]), draw.choice([1, 1, 1, 2])
    steps = stride, padding, dilation = (
        draw.choice([1, 1, 2, 3]),
        draw.randrange(kernel),
        draw.choice([1, 1, 2]),
    )

    def compare(device: torch.device, size: Size) -> Comparison:
        batch, height, width = size
        if min(height, width) + 2 * padding > dilation * (kernel - 1):
            sizes = (batch, channels, filters, height, width, kernel, *steps)
            yield from _held(depthwise_evidence(device, dtype, "", *sizes))

    label = f"depthwise c={channels} m={filters} k={kernel} s={stride} p={padding} d={dilation} {dtype}"
    return Subject(label, compare)


def _separable(draw: random.Random, dtype: torch.dtype, form: str) -> Subject:
    channels, outputs = (draw.choice([1, 8, 21, 40, 72, 136]) for _ in range(2))
    stride = draw.choice([1, 2])

    def compare(device: torch.device, size: Size) -> Comparison:
        sizes = (size[0], channels, outputs, *size[1:], stride, form)
        return _held(iter([separable_evidence(device, dtype, "", *sizes)]))

    return Subject(f"separable, {form}, c={channels} co={outputs} s={stride} {dtype}", compare)


def _head(draw: random.Random, dtype: torch.dtype, mode: str, corners: bool, scale: int) -> Subject:
    classes, smoothing, weighted = draw.choice([2, 5, 19, 40]), draw.choice([0.0, 0.1]), draw.random() < 0.5

    def compare(device: torch.device, size: Size) -> Comparison:
        shape = (size[0], classes, *size[1:])
        resampling = Resampling((scale * size[1], scale * size[2]), mode, corners, None)
        return _held(head_evidence(device, dtype, "", shape, resampling, weighted, smoothing))

    label = f"head x{scale} {mode} corners={corners} c={classes} smoothing={smoothing} weighted={weighted}"
    return Subject(f"{label} {dtype}", compare, 9)


def _held(found: Iterator[Evidence]) -> Comparison:
    for item in found:
        yield item.operation, *error_and_allowance(*item[2:])


def fuzz(device: torch.device, found: Sequence[Subject], each: int) -> Iterator[Outcome]:
    """Forwards and gradients on random image sizes against fp64, by the error rule of the proofs."""
    draw = random.Random(1)
    for subject in found:
        failed, worst = [], 0.0
        for _ in range(each):
            height, width = (draw.randint(1, subject.most) for _ in range(2))
            size = draw.choice([1, 2, 3]), height, width
            for name, error, allowed in subject.compare(device, size):
                worst = max(worst, error / allowed if allowed else 0.0)
                if not error <= allowed:
                    failed.append(f"{name} {size} {error:.2e} > {allowed:.2e}")
        yield (
            f"fuzz {subject.label}",
            not failed,
            "; ".join(failed[:3]) or f"at most {worst:.2f} of the allowance",
        )


def _compare(g: Geometry, device: torch.device, size: Size) -> Comparison:
    batch, height, width = size
    if min((n - 1) * g.s - 2 * g.p + g.d * (g.k - 1) + g.extra for n in size[1:]) < 0:
        return  # no output
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


def _drawn(device: torch.device, dtype: torch.dtype, *sizes: Sequence[int]) -> list[torch.Tensor]:
    return [
        torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for size in sizes
    ]


def _in_form(form: str, x: torch.Tensor, outputs: int):
    from segfast.kernels import override_config

    return override_config("separable_conv2d_forward", config_of(form, x, outputs), _PLANS[form])


def large(device: torch.device, dtype: torch.dtype, height: int, batch: int) -> Iterator[Outcome]:
    """Held to fp64 at both ends: tensors past 2**31 elements with a height of 4100 and a batch of 64."""
    yield from _large_up(device, dtype, height)
    for form in (None, *FORMS):
        yield from _large_depthwise(device, dtype, height, form)
    yield from _large_head(device, dtype, batch)


def _near(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Outcome:
    error = float((actual.double() - expected).norm() / expected.norm())
    return f"large {name}", error < 1e-2, f"relative error {error:.1e}"


@torch.no_grad()
def _large_up(device: torch.device, dtype: torch.dtype, height: int) -> Iterator[Outcome]:
    """Kernel equals stride: the last rows come from the last input rows."""
    x, weight = _drawn(device, dtype, (1, 16, height, 2 * height), (16, 16, 2, 2))
    output = conv_transpose2d(x, weight, None, 2)
    for rows in (slice(0, 8), slice(height - 8, height)):
        expected = F.conv_transpose2d(x[:, :, rows].double(), weight.double(), None, 2)
        part = output[:, :, 2 * rows.start : 2 * rows.stop]
        yield _near(f"conv_transpose2d, rows {rows.start} on", part, expected)


@torch.no_grad()
def _large_depthwise(
    device: torch.device, dtype: torch.dtype, height: int, form: str | None
) -> Iterator[Outcome]:
    """Depthwise alone, or with 1x1 after it in one of its forms: 3x3, whose rows at the edge are whole."""
    channels = 64
    sizes = (1, channels, height, 2 * height), (channels, 1, 3, 3), (channels, channels, 1, 1)
    x, first, second = _drawn(device, dtype, *sizes)
    if form is None:
        output = depthwise_conv2d(x, first, None, 1, 1)
    else:
        with _in_form(form, x, channels):
            output = separable_conv2d(x, first, second, None, None, 1, 1)
    for start, rows in ((0, slice(0, 8)), (height - 9, slice(height - 8, height))):
        expected = F.conv2d(x[:, :, start : start + 9].double(), first.double(), None, 1, 1, 1, channels)
        expected = expected[:, :, rows.start - start : rows.stop - start]
        if form is not None:
            expected = F.conv2d(expected, second.double())
        name = "depthwise_conv2d" if form is None else f"separable_conv2d, {form}"
        yield _near(f"{name}, rows {rows.start} on", output[:, :, rows], expected)


def _large_head(device: torch.device, dtype: torch.dtype, batch: int) -> Iterator[Outcome]:
    """Logits past 2**31, and their gradient; of each image's loss, which no other image enters."""
    classes, side = (1024, 256) if device.type == "cuda" else (5, 4)
    x = torch.randn(batch, classes, side, side, device=device, dtype=dtype).requires_grad_()
    target = torch.randint(classes, (batch, 2 * side, 2 * side), device=device)
    losses = upsample_cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
    for image in (slice(0, 1), slice(batch - 1, batch)):
        leaf = x.detach()[image].double().requires_grad_()
        full = F.interpolate(leaf, scale_factor=2, mode="bilinear")
        expected = F.cross_entropy(full, target[image], reduction="none")
        (wide,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))
        yield _near(f"upsample_cross_entropy, image {image.start}", losses.detach()[image], expected.detach())
        yield _near(f"upsample_cross_entropy's gradient, image {image.start}", grad[image], wide)


Step = Callable[[], list[torch.Tensor]]


def steps(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, Step]]:
    """A small training step of every family: its input, and a call that returns output and gradients."""
    side = 24 if device.type == "cuda" else 5
    x, up, filters, weight = _drawn(
        device, dtype, (2, 32, side, side), (32, 16, 2, 2), (32, 1, 3, 3), (16, 32, 1, 1)
    )
    target = torch.randint(32, (2, 4 * side, 4 * side), device=device)

    def step_of(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> tuple[torch.Tensor, Step]:
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]

        def step() -> list[torch.Tensor]:
            output = function(*leaves)
            return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]

        return leaves[0], step

    def separable(form: str, x, filters, weight) -> torch.Tensor:
        with _in_form(form, x, 16):
            return separable_conv2d(x, filters, weight, None, None, 1, 1, activation="relu")

    return {
        "conv_transpose2d": step_of(lambda x, w: conv_transpose2d(x, w, None, 2, activation="relu"), x, up),
        "depthwise_conv2d": step_of(
            lambda x, w: depthwise_conv2d(x, w, None, 1, 1, activation="relu6"), x, filters
        ),
        **{f"separable_conv2d, {f}": step_of(partial(separable, f), x, filters, weight) for f in FORMS},
        "upsample_cross_entropy": step_of(lambda x: upsample_cross_entropy(x, target), x.contiguous()),
    }


def repeated(device: torch.device, dtype: torch.dtype) -> Iterator[Outcome]:
    """Every step twice gives the same bits."""
    for name, (_, step) in steps(device, dtype).items():
        yield f"{name} twice, the same bits", _equal(step(), step()), ""


def _equal(results: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def graphs_and_streams(device: torch.device, dtype: torch.dtype) -> Iterator[Outcome]:
    """A captured training step replays bit for bit on new inputs; so does the step on another stream."""
    for name, (x, step) in steps(device, dtype).items():
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
        yield f"CUDA graph of a training step, {name}", _equal(captured, eager), ""
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            results = [step() for _ in range(20)]
        side.synchronize()
        equal = all(_equal(result, eager) for result in results)
        yield f"side stream, 20 times the same bits, {name}", equal, ""


def sanitizer() -> Iterator[Outcome]:
    """compute-sanitizer's memcheck over the small steps, where it is there and takes the device."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield "compute-sanitizer", True, "not run: not on the PATH"
        return
    code = (
        "import torch, segfast; from benchmarks.full import steps\n"
        "segfast.backend('triton')\n"
        "for _, step in steps(torch.device('cuda'), torch.bfloat16).values(): step()\n"
        "torch.cuda.synchronize()"
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
    """All of them; on a CPU (a dry run, in the interpreter) the same on a handful of tiny cases."""
    if device.type != "cuda":
        dtype = torch.float32
        yield from fuzz(device, subjects((dtype,), few=True), 1)
        yield from repeated(device, dtype)
        yield from large(device, dtype, 9, 2)
        return
    dtype = torch.bfloat16
    yield from graphs_and_streams(device, dtype)
    free = torch.cuda.mem_get_info(device)[0] >> 30
    if free < LARGE_GIB:
        yield "past 2**31 elements", True, f"not run: {free} GiB free, {LARGE_GIB} needed"
    else:
        # 2 * 4100 * 2 * 8200 * 16 outputs of a transposed convolution, 64 * 4100 * 8200 of a depthwise one.
        yield from large(device, dtype, 4100, 64)
    yield from fuzz(device, subjects((torch.bfloat16, torch.float16, torch.float32)), CASES_EACH)
    yield from sanitizer()
