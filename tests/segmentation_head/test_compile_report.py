"""The machine code of the segmentation head's kernels, for two architectures of the seven."""

import pytest

from segfast.commands.compile_report import Task, compile_task

KERNELS = {"sm_90": ("loss", "gradient", "confidence", "dice", "dice mean"), "gfx942": ("loss", "gradient")}


@pytest.mark.parametrize("arch", KERNELS)
def test_no_row_has_a_problem(arch):
    tasks = [Task("segmentation_head", arch, "bf16", f"ade20k_upsample {kernel}") for kernel in KERNELS[arch]]
    rows = [row for task in tasks for row in compile_task(task)]
    assert len({row.kernel for row in rows}) == len(tasks)
    for row in rows:
        assert not row.problems and row.spills == 0 and row.shared <= 16384
        if arch == "sm_90":
            # Twelve warps on a multiprocessor, at least.
            assert row.registers <= 168
