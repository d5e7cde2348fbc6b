"""The convolution kernels' machine code, compiled for every architecture."""

import pytest

from segfast.commands.compile_report import compile_report, compile_task, tasks
from tests.commands.test_compile_report import ARCHS

FAMILY = "conv2d"
EVERYWHERE = ("resnet_layer3_d2 scale+relu", "aspp_r12", "aspp_branches_n1_33")
ON_HOPPER = (
    *EVERYWHERE,
    "aspp_branches_n8_33",
    "aspp_branches_n8_65",
    "aspp_r18_n1 grad",
    "classifier_21",
    "resnet_layer3_reduce residual",
    "resnet_down grad_input",
    "resnet_stem",
    "unet_decoder",
    "unet_plus_plus",
)
MATRIX = {"sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "mfma"}
# Kernels that add up what others wrote.
SUMS = ("finish", "reduce_partials")


@pytest.fixture(scope="module")
def rows():
    work = []
    for arch in ARCHS:
        work += tasks([FAMILY], [arch], ["bf16"], ON_HOPPER if arch == "sm_90" else EVERYWHERE)
    work += tasks([FAMILY], ["sm_90"], ["fp32"], ("resnet_layer3_d2 scale+relu", "aspp_branches_n8_33"))
    return compile_report(work, processes=2, progress=False)


def find(rows, case, arch="sm_90", dtype="bf16"):
    (row,) = [r for r in rows if (r.arch, r.case, r.dtype) == (arch, case, dtype) and r.kernel not in SUMS]
    return row


def test_no_row_has_a_problem(rows):
    assert len(rows) > 50
    assert [row for row in rows if row.problems] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_matrix_units_no_spills_wide_accesses(rows, arch):
    here = [row for row in rows if row.arch == arch and row.dtype == "bf16"]
    assert {row.kernel for row in here} >= {"dense", "dilated", "conv_transpose2d_grad_weight"}
    for row in here:
        assert row.spills == 0, row
        if row.kernel not in SUMS and "classifier" not in row.case:
            assert row.matrix == MATRIX.get(arch, "HMMA"), row
        if arch.startswith("sm") and row.case.startswith(("resnet_layer", "aspp", "unet")):
            assert row.store == (16, 16), row
            if row.matrix:
                assert row.async_copy == (16, 16), row


def test_large_dilations_take_the_zones(rows):
    for case in (
        "aspp_r12 forward",
        "aspp_r12 grad_input",
        "aspp_branches_n8_33 parallel",
        "aspp_branches_n1_33 parallel",
    ):
        assert find(rows, case).kernel == "dilated"
    assert find(rows, "resnet_layer3_d2 scale+relu").kernel == "dense"


def test_one_image_is_cut_into_parts_of_the_depth(rows):
    kernels = [r.kernel for r in rows if (r.arch, r.case) == ("sm_90", "aspp_branches_n1_33 parallel")]
    assert sorted(kernels) == ["dilated", "finish"]
    # A batch fills the processors as it is.
    kernels = [r.kernel for r in rows if (r.arch, r.case) == ("sm_90", "aspp_branches_n8_65 parallel")]
    assert kernels == ["dilated"]


def test_fp32_runs_on_matrix_units_too(rows):
    for case in ("resnet_layer3_d2 scale+relu", "aspp_branches_n8_33 parallel"):
        row = find(rows, case, dtype="fp32")
        assert (row.matrix, row.spills) == ("HGMMA", 0)


@pytest.mark.compat
def test_two_images_do_not_spill_on_blackwell():
    """In float16 the first compiler to spill was Triton 3.9's: one word, beside half the registers unused."""
    (work,) = tasks([FAMILY], ["sm_100"], ["fp16"], ("unet_decoder images",))
    (row,) = compile_task(work)
    assert row.problems == ()
