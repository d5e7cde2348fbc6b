"""The long checks of kernels on a GPU (`make gpu-full`): fuzz, offsets past 2**31, graphs, streams.

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

from benchmarks.environment import ROOT
from benchmarks.large import FORMS, Outcome, drawn, in_form, large
from segfast.functional import (
    conv2d,
    conv_transpose2d,
    depthwise_conv2d,
    mean_field,
    packed_max_pool2d,
    packed_max_unpool2d,
    parallel_conv2d,
    separable_conv2d,
    upsample_cross_entropy,
)
from segfast.ops._case import Proof
from segfast.ops._convolution_case import ConvolutionCase
from segfast.ops._prove import judge
from segfast.ops.conv2d.cases import SplitConv2d
from segfast.ops.conv_transpose2d.cases import ConvTranspose2d
from segfast.ops.segmentation_head.cases import HeadKernels
from segfast.ops.segmentation_head.geometry import Resampling
from segfast.ops.separable_conv2d.cases import DepthwiseConv2d, SeparableConv2d

Size = tuple[int, int, int]  # images, height, width
Comparison = Iterator[tuple[str, float, float]]  # name, error, what is allowed
CASES_EACH = 50  # image sizes for each subject: with 53 of them, 2,650 cases
LARGE_GIB = 40  # of device memory, for the tensors past 2**31 elements and their fp64 references


class Subject(NamedTuple):
    """An operation, and its comparison with exact arithmetic on images of any size up to `most`."""

    label: str
    compare: Callable[[torch.device, Size], Comparison]
    most: int = 19


def _up(draw: random.Random, dtype: torch.dtype, k: int, s: int) -> Subject:
    """A random valid upsampling. Only its image sizes vary, so that many cases need few compilations."""
    groups, d = draw.choice([1, 1, 1, 2]), draw.choice([1, 1, 2])
    sizes = {"k": k, "s": s, "p": draw.randrange(min(k, 3)), "extra": draw.randrange(max(s, d)), "d": d}
    sizes |= {name: groups * draw.choice([1, 3, 8, 16, 21, 40]) for name in ("ci", "co")} | {"g": groups}
    return _subject(ConvTranspose2d("", "transposed", sizes, epilogue=("bias",)), dtype)


def _subject(case: ConvolutionCase, dtype: torch.dtype, most: int = 19) -> Subject:
    """The proofs of a case at any image size."""

    def compare(device: torch.device, size: Size) -> Comparison:
        sized = case.replace(params={**case.params, **dict(zip(("n", "h", "w"), size, strict=True))})
        if min(sized.output_size) > 0:
            yield from _held(sized.proofs(device, dtype))

    sizes = " ".join(f"{name}={value}" for name, value in case.params.items())
    return Subject(f"{case.layer} {sizes} {dtype}", compare, most)


def subjects(dtypes: Sequence[torch.dtype], few: bool = False) -> list[Subject]:
    """The operations that are fuzzed, of every family; `few`: one or two of each."""
    draw = random.Random(0)
    classes = itertools.cycle([(2, 2), (4, 4), (4, 2), (3, 2), (1, 2), (5, 3), (8, 4), (3, 1), (2, 3)])
    up = [_up(draw, draw.choice(dtypes), *k_s) for k_s in itertools.islice(classes, 2 if few else 25)]
    found = [_depthwise(draw, draw.choice(dtypes), k) for k in ((3,) if few else (1, 2, 3, 3, 4, 5, 5, 7, 9))]
    found += [_conv(draw, draw.choice(dtypes), k) for k in ((3,) if few else (1, 1, 2, 3, 3, 3, 3, 5, 7))]
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


def _depthwise(draw: random.Random, dtype: torch.dtype, k: int) -> Subject:
    channels, filters = draw.choice([1, 3, 8, 21, 40, 72]), draw.choice([1, 1, 1, 2])
    sizes = {"ci": channels, "co": channels * filters, "g": channels, "k": k, "s": draw.choice([1, 1, 2, 3])}
    sizes |= {"p": draw.randrange(k), "d": draw.choice([1, 1, 2])}
    epilogue = ("bias", "affine", "relu6")
    return _subject(DepthwiseConv2d("", "depthwise", sizes, epilogue=epilogue), dtype)


def _conv(draw: random.Random, dtype: torch.dtype, k: int) -> Subject:
    groups, d = draw.choice([1, 1, 1, 2]), draw.choice([1, 2, 6, 12])
    sizes = {name: groups * draw.choice([1, 3, 8, 21, 40, 72]) for name in ("ci", "co")} | {"g": groups}
    sizes |= {"k": k, "s": draw.choice([1, 1, 2, 3]), "p": draw.choice([0, 1, d * (k // 2)]), "d": d}
    sizes["split"] = draw.choice([1, 1, 3])
    epilogue = ("bias", "affine", "add", "relu")
    return _subject(SplitConv2d("", "conv2d", sizes, epilogue=epilogue), dtype)


def _separable(draw: random.Random, dtype: torch.dtype, form: str) -> Subject:
    sizes = {name: draw.choice([1, 8, 21, 40, 72, 136]) for name in ("ci", "co")}
    params = {**sizes, "k": 3, "s": draw.choice([1, 2]), "p": 1, "d": 1, "form": form, "between": "relu6"}
    epilogue = ("bias", "affine", "add", "relu")
    return _subject(SeparableConv2d("", "separable", params, epilogue=epilogue), dtype)


def _head(draw: random.Random, dtype: torch.dtype, mode: str, corners: bool, scale: int) -> Subject:
    params = {"classes": draw.choice([2, 5, 19, 40]), "smoothing": draw.choice([0.0, 0.1])}
    params["weighted"] = draw.random() < 0.5

    def compare(device: torch.device, size: Size) -> Comparison:
        resampling = Resampling((scale * size[1], scale * size[2]), mode, corners, None)
        sizes = {**params, **dict(zip(("n", "h", "w"), size, strict=True)), "resampling": resampling}
        return _held(HeadKernels("", "", sizes).proofs(device, dtype))

    label = " ".join(f"{name}={value}" for name, value in params.items())
    return Subject(f"head x{scale} {mode} corners={corners} {label} {dtype}", compare, 9)


def _held(found: Iterator[Proof]) -> Comparison:
    for item in found:
        yield item.operation, *judge(item)


def fuzz(device: torch.device, found: Sequence[Subject], each: int) -> Iterator[Outcome]:
    """Forwards and gradients on random image sizes against fp64, by the error rule of the proofs."""
    draw = random.Random(1)
    for subject in found:
        failed, worst = [], 0.0
        most = subject.most if device.type == "cuda" else min(subject.most, 7)
        for _ in range(each):
            height, width = (draw.randint(1, most) for _ in range(2))
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


Step = Callable[[], list[torch.Tensor]]


def steps(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, Step]]:
    """A small training step of every family: its input, and a call that returns output and gradients."""
    side = 24 if device.type == "cuda" else 5
    x, up, filters, weight, dense = drawn(
        device, dtype, (2, 32, side, side), (32, 16, 2, 2), (32, 1, 3, 3), (16, 32, 1, 1), (16, 32, 3, 3)
    )
    target = torch.randint(32, (2, 4 * side, 4 * side), device=device)

    def step_of(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> tuple[torch.Tensor, Step]:
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]

        def step() -> list[torch.Tensor]:
            output = function(*leaves)
            return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]

        return leaves[0], step

    def separable(form: str, x, filters, weight) -> torch.Tensor:
        with in_form(form, x, 16):
            return separable_conv2d(x, filters, weight, None, None, 1, 1, activation="relu")

    pyramid = x.clone(memory_format=torch.preserve_format)

    @torch.no_grad()
    def branches() -> list[torch.Tensor]:
        return [parallel_conv2d(pyramid, [weight, dense, dense], [1, 2, 4], activation="relu")]

    image = 255 * torch.rand(2, 3, side, side, device=device)
    energies = x.clone(memory_format=torch.preserve_format)

    def refine(method: str, unary: torch.Tensor) -> torch.Tensor:
        iterations = 3 if device.type == "cuda" else 1
        return mean_field(unary, image, iterations=iterations, theta_alpha=20, theta_beta=40, method=method)

    @torch.no_grad()
    def refined(method: str) -> list[torch.Tensor]:
        return [refine(method, energies)]

    return {
        "conv2d": step_of(lambda x, w: conv2d(x, w, None, 1, 2, 2, activation="relu"), x, dense),
        "parallel_conv2d": (pyramid, branches),
        "conv_transpose2d": step_of(lambda x, w: conv_transpose2d(x, w, None, 2, activation="relu"), x, up),
        "depthwise_conv2d": step_of(
            lambda x, w: depthwise_conv2d(x, w, None, 1, 1, activation="relu6"), x, filters
        ),
        **{f"separable_conv2d, {f}": step_of(partial(separable, f), x, filters, weight) for f in FORMS},
        "packed pooling": step_of(lambda x: packed_max_unpool2d(*packed_max_pool2d(x)), x),
        "upsample_cross_entropy": step_of(lambda x: upsample_cross_entropy(x, target), x.contiguous()),
        **{f"mean_field, {m}": step_of(partial(refine, m), x) for m in ("exact", "lattice")},
        **{
            f"mean_field without gradients, {m}": (energies, partial(refined, m))
            for m in ("exact", "lattice")
        },
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
