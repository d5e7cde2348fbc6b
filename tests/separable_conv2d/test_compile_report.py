"""The depthwise and separable kernels' machine code, compiled for four architectures (all if asked)."""

import pytest

from segfast.commands.compile_report import compile_report, compile_task, tasks
from tests.commands.test_compile_report import ARCHS

FAMILY = "separable_conv2d"
EVERYWHERE = (
    "xception_middle_dw forward",
    "xception_middle_dw grad",
    "mobilenetv2_dw96_s2 grad_input",
    "entry_sep_128",
)
ON_HOPPER = (
    *EVERYWHERE,
    "decoder_sep_256",
    "xception_middle_dw stat",
    "mobilenetv2_dw144_projected",
    "convnext_dw96_k7 gelu",
    "efficientnet_k5_s2 grad",
    "middle_sep_728",
    "multiplier_2",
    "kernel_1 forward",
    "one_channel forward",
)


@pytest.fixture(scope="module")
def rows():
    work = []
    for arch in ARCHS:
        work += tasks([FAMILY], [arch], ["bf16"], ON_HOPPER if arch == "sm_90" else EVERYWHERE)
    work += tasks([FAMILY], ["sm_90"], ["fp32"], ("xception_middle_dw forward", "decoder_sep_256"))
    return compile_report(work, processes=2, progress=False)


def find(rows, arch, case, kernel, dtype="bf16"):
    (row,) = [r for r in rows if (r.arch, r.case, r.kernel, r.dtype) == (arch, case, kernel, dtype)]
    return row


def test_no_row_has_a_problem(rows):
    assert len(rows) > 40
    assert [row for row in rows if row.problems] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_the_walk_is_wide_and_waits_for_nobody(rows, arch):
    for direction in ("forward", "grad_input"):
        row = find(rows, arch, f"xception_middle_dw {direction}", "depthwise_conv2d_rows")
        assert (row.spills, row.shared, row.barriers) == (0, 0, 0)
        assert row.store == (16, 16)
        # Not through cp.async, which would pass by L1, where two loads of three are hits.
        assert row.async_copy == (0, 0) and row.load[1] == 16
    row = find(rows, arch, "mobilenetv2_dw96_s2 grad_input", "depthwise_conv2d_phases")
    assert (row.spills, row.barriers, row.store) == (0, 0, (16, 16))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_fused_product_uses_the_matrix_unit_without_a_wait_for_each_tap(rows, arch):
    row = next(r for r in rows if (r.arch, r.case, r.dtype) == (arch, "entry_sep_128 separable", "bf16"))
    assert row.matrix == {"sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "mfma"}.get(arch, "HMMA")
    assert row.spills == 0 and row.async_copy == (0, 0)
    assert row.kernel == "fused"
    if arch.startswith("sm"):
        # The naive order of operands waits 46 times in its loop alone.
        assert row.barriers <= 26
        assert row.store == (16, 16)


def test_hopper_runs_256_outputs_fused_and_728_as_two_kernels(rows):
    assert find(rows, "sm_90", "decoder_sep_256 separable", "fused").tile.endswith("fused")
    pair = {row.kernel for row in rows if (row.arch, row.case) == ("sm_90", "middle_sep_728 separable")}
    assert pair == {"depthwise_conv2d_rows", "conv2d_dense"}


def test_the_sums_of_each_image_do_not_spill_on_blackwell():
    (task,) = tasks([FAMILY], ["sm_100"], ["bf16"], ("xception_middle_dw stat",))
    assert [(row.kernel, row.problems) for row in compile_task(task)] == [("depthwise_conv2d_rows", ())]


def test_bf16_is_widened_in_one_instruction(rows):
    # A step of the walk is two rows of 3x3 taps over 8 channels a thread: 144 multiply-adds, and 48 values
    # widened. Two instructions a value would be 394.
    row = find(rows, "sm_90", "xception_middle_dw forward", "depthwise_conv2d_rows")
    assert row.bound is not None and row.bound.step["alu"] < 370
