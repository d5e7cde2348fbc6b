"""The machine code of batch norm's kernels in training, for two architectures of the seven."""

import pytest

from segfast.commands.compile_report import Task, compile_task


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_no_row_has_a_problem(arch):
    parts = ("statistics", "apply", "sums", "gradient")
    tasks = [Task("conv2d", arch, "bf16", f"norm resnet_layer1 {part}") for part in parts]
    rows = [row for task in tasks for row in compile_task(task)]
    assert len({row.kernel for row in rows}) == 6  # with those that merge and add up
    for row in rows:
        assert not row.problems and row.spills == 0 and row.shared <= 16384
        if row.kernel in ("batch_norm_apply", "batch_norm_grad_input"):
            assert row.store == row.load == (16, 16)
        if arch == "sm_90":
            assert row.registers <= 168  # twelve warps on a multiprocessor, at least
