"""The machine code of packed pooling's kernels: no spills, no shared memory, 16 bytes at a time."""

import pytest

from segfast.commands.compile_report import ARCHITECTURES, Task, compile_task


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["pool", "unpool", "backward"])
def test_no_row_has_a_problem(arch, kernel):
    (row,) = compile_task(Task("packed_pool2d", arch, "bf16", f"segnet_pool4 {kernel}"))
    assert not row.problems and row.spills == row.shared == row.barriers == 0
    widest = 8 if arch.startswith("gfx") else 16
    # Images are read and written so; the places of a thread's channels are one or two bytes.
    assert row.load[1] == row.store[1] == widest
    assert row.store[0] == (row.store[1] if kernel != "pool" else widest // 8)
