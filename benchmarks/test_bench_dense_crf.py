"""Mean field and Gaussian filtering against all pairs, and on a CPU against pydensecrf's time and numbers."""

import os
import statistics

import numpy as np
import pytest
import torch

import segfast
import segfast.crf
from benchmarks.busy import busy_loops, in_turn, timing_of
from benchmarks.cases import CASES, find, is_crf
from benchmarks.crf_peers import core_count, ours_by, pydensecrf, solve
from benchmarks.timing import Measurement
from benchmarks.trial import Trial

ON_GPU = torch.cuda.is_available()
# On a CPU most sizes are the same case.
_DISTINCT = {case.work if ON_GPU else case.cpu().work: case for case in reversed(CASES) if is_crf(case)}
FAMILY = [*_DISTINCT.values()][::-1]
PAIRS = 15  # of calls in turn with --benchmark
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", FAMILY, ids=lambda case: case.name)
def test_filter_and_mean_field(compare, case):
    compare(case)


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "busy"])
@pytest.mark.parametrize("size", ["321", "512"])
@pytest.mark.parametrize("thetas", ["80_13", "67_3"])
@pytest.mark.parametrize("images", [1, 4])
def test_against_pydensecrf_on_a_cpu(compare, threads, images, thetas, size, busy):
    """Times are reported, and never asserted: alone, and beside a busy loop for each core."""
    if compare.device.type != "cpu":
        pytest.skip("both run on the CPU")
    pytest.importorskip("pydensecrf", reason="needs pydensecrf (pydensecrf2 on PyPI)")
    if not compare.proper and (size, thetas, images) != ("321", "67_3", 1):
        pytest.skip("with --benchmark")
    case = find(f"crf_{size}_{thetas}")
    if images > 1:
        case = case.replace(name=f"{case.name}_n{images}", params={**case.params, "n": images})
    t = Trial(case, CPU).tensors
    unary, image = (t[name].contiguous().numpy() for name in ("unary", "image"))

    def theirs():
        return [pydensecrf(case.params, *one) for one in zip(unary, image, strict=True)]

    def mine():
        if images == 1:
            return [solve(segfast.crf, case.params, unary[0], image[0], method="lattice")]
        return ours_by(case, "lattice")(t)

    far = np.abs(np.stack([*map(np.asarray, mine())]) - np.stack(theirs()))
    # Of a number of pixels that is no multiple of four, pydensecrf's lattice has more vertices than the
    # pixels make, which the drop-in imitates.
    assert far.max() < 1e-3 if images == 1 or far[0].size % 4 == 0 else far.mean() < 1e-4
    loops = core_count() if busy else 0
    with busy_loops(loops):
        seconds = in_turn({"segfast": mine, "pydensecrf": theirs}, PAIRS if compare.proper else 1)
        compare.benchmark.pedantic(mine, rounds=1)
    load = os.getloadavg()[0]
    ratios = [s / p for s, p in zip(seconds["segfast"], seconds["pydensecrf"], strict=True)]
    ratio = statistics.median(ratios)
    beside = f", beside {loops} busy loops" if busy else ""
    notes = {"segfast": f"CPU, {threads} threads{beside}", "pydensecrf": f"one CPU core{beside}"}
    compare.keep(
        case,
        [
            Measurement(
                f"{name}_busy" if busy else name,
                name == "segfast",
                "ok",
                note,
                timing=timing_of(seconds[name]),
            )
            for name, note in notes.items()
        ],
    )
    compare.benchmark.extra_info.update(
        case=case.key, ratio=ratio, threads=threads, busy_loops=loops, load=load
    )
    print(
        f"{images} of {size} pixels, {thetas}, {threads} threads{beside}: "
        f"{ratio:.2f} times pydensecrf's time (median of {len(ratios)} pairs, load {load:.1f})"
    )
