"""Transposed convolution against ATen: both layouts on a CPU, cuDNN and its fused calls too on a GPU."""

import pytest

from benchmarks.cases import CASES, find
from benchmarks.suite import candidates, make_problem
from segfast._timing import interleave

FAMILY = [case for case in CASES if case.family == "conv_transpose2d"]
# Each in its better layout, channels_last or not.
LAYOUTS = {
    "aten": ("aten_nchw", "aten_nhwc"),
    "module": ("segfast_module", "segfast_module_nchw"),
    "functional": ("segfast", "segfast_nchw"),
}
# Dense ATen's time over ours with FCN-32s's bilinear weights, 64x64 at stride 32. Unlike the module, the
# functional has to look through 7 MB of weights in each call.
LEAST_SPEEDUP = {"module": 8.0, "functional": 3.0}
ATTEMPTS = 5


@pytest.mark.parametrize("case", FAMILY, ids=lambda case: case.name)
def test_forward(compare, case):
    compare(case)


@pytest.mark.parametrize("direction", ["backward", "train"])
@pytest.mark.parametrize("name", ["unet_up2", "unet_up4", "decoder_up4x4", "unet_up3_concat"])
def test_gradients(compare, name, direction):
    compare(find(name).replace(direction=direction))


def test_bilinear_upsampling(compare):
    if compare.device.type != "cpu":
        pytest.skip("the separable way is the CPU's")
    problem = make_problem(find("fcn32s_up32_bilinear").cpu(), compare.device)
    found = candidates(problem)
    compare(problem.case, problem, found)
    runs = {candidate.name: candidate.run for candidate in found}
    best = dict.fromkeys(LEAST_SPEEDUP, 0.0)
    for _ in range(ATTEMPTS):
        if all(best[group] >= LEAST_SPEEDUP[group] for group in best):
            break
        times = interleave(runs, compare.device, budget_s=0.6, min_rounds=5)
        # p20 rather than the median: another process on the machine makes times longer, never shorter.
        us = {group: min(times[n].wall_p20 for n in names) for group, names in LAYOUTS.items()}
        best = {group: max(best[group], us["aten"] / us[group]) for group in best}
    for group, value in best.items():
        assert value >= LEAST_SPEEDUP[group], f"{group}: {value:.1f} times dense ATen's faster layout"
