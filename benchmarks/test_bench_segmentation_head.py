"""Losses and labels of upsampled logits against PyTorch's separate functions."""

import os
import statistics

import pytest
import torch
import torch.nn.functional as F

from benchmarks.busy import busy_loops, in_turn, timing_of
from benchmarks.cases import CASES, find
from benchmarks.crf_peers import core_count
from benchmarks.timing import Measurement
from segfast.functional import upsample_argmax, upsample_cross_entropy

FAMILY = [case for case in CASES if case.family == "segmentation_head"]


@pytest.mark.parametrize("case", FAMILY, ids=lambda case: case.name)
def test_head(compare, case):
    compare(case)


PAIRS = 9  # of calls in turn with --benchmark
# Of one image: the sides of the logits.
SIDES = {"ade20k_upsample_os32": (16, 16), "cityscapes_upsample_n1": (64, 128)}


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "busy"])
@pytest.mark.parametrize("task", ["loss", "argmax"])
@pytest.mark.parametrize("head", SIDES)
def test_one_image_on_a_cpu(compare, threads, head, task, busy):
    """Times are reported, and never asserted: alone, and beside a busy loop for each core."""
    if compare.device.type != "cpu":
        pytest.skip("the tiles are the CPU's")
    case = find(f"{head}_{task}").cpu()
    height, width = SIDES[head] if compare.proper else (n // 4 for n in SIDES[head])
    case = case.replace(name=f"{case.name}_one_image", params={**case.params, "h": height, "w": width})
    size = height * case["scale"], width * case["scale"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, case["classes"], height, width, generator=generator, requires_grad=True)
    target = torch.randint(case["classes"], (1, *size), generator=generator)

    def upsampled():
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def labels(function):
        return function()

    if task == "loss":
        runs = {
            "segfast": lambda: torch.autograd.grad(upsample_cross_entropy(logits, target), logits)[0],
            "pair": lambda: torch.autograd.grad(F.cross_entropy(upsampled(), target), logits)[0],
        }
        torch.testing.assert_close(*(run() for run in runs.values()), rtol=1e-4, atol=1e-7)
    else:
        runs = {
            "segfast": lambda: labels(lambda: upsample_argmax(logits, size)),
            "pair": lambda: labels(lambda: upsampled().argmax(1)),
        }
        scores = upsampled().detach()
        chosen = scores.gather(1, runs["segfast"]()[:, None])
        torch.testing.assert_close(chosen, scores.amax(1, keepdim=True))
    loops = core_count() if busy else 0
    with busy_loops(loops):
        seconds = in_turn(runs, PAIRS if compare.proper else 1)
        compare.benchmark.pedantic(runs["segfast"], rounds=1)
    load = os.getloadavg()[0]
    ratio = statistics.median(s / p for s, p in zip(seconds["segfast"], seconds["pair"], strict=True))
    note = f"CPU, {threads} threads" + (f", beside {loops} busy loops" if busy else "")
    compare.keep(
        case,
        [
            Measurement(
                f"{name}_busy" if busy else name, name == "segfast", "ok", note, timing=timing_of(times)
            )
            for name, times in seconds.items()
        ],
    )
    compare.benchmark.extra_info.update(
        case=case.key, ratio=ratio, threads=threads, busy_loops=loops, load=load
    )
    print(
        f"{case.name}, {note}: {ratio:.2f} times the pair's time "
        f"(median of {len(seconds['pair'])} pairs, load {load:.1f})"
    )
