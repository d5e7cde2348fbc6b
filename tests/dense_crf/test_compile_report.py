"""The machine code of the dense CRF's kernels, for two architectures of the seven."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from segfast.commands import _machine_code
from segfast.commands._machine_code import from_sass
from segfast.commands.compile_report import Task, compile_task, most_per_pair, pair_instructions, tasks
from segfast.kernels import Tile
from segfast.kernels._launch import TRITON

MOST = 4.4 if TRITON < (3, 9) else 4.6  # instructions a pair

# Cases beside what their first kernel's matrix instruction is on Hopper.
CASES = {
    "21 labels exact": "HGMMA",
    "21 labels exact direct": "HGMMA",
    "21 labels exact gradient": "",
    "21 labels lattice": "",
    "21 labels spatial": "HGMMA",
    "21 labels update gathered": "",
    "21 labels update lattice matrix": "HMMA",
    "150 labels exact": "HGMMA",
    "150 labels update gathered matrix": "HMMA",
    "build exact": "",
    "build lattice": "",
}


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_no_row_has_a_problem(arch):
    names = CASES if arch == "sm_90" else [name for name in CASES if name.startswith("21")]
    for name in names:
        rows = compile_task(Task("dense_crf", arch, "fp32", name))
        assert [row for row in rows if row.problems or row.spills] == []
        if arch == "sm_90":
            assert rows[0].matrix == CASES[name]


def test_the_unaries_have_a_dtype():
    (row,) = compile_task(Task("dense_crf", "sm_90", "bf16", "21 labels update gathered last"))
    assert row.problems == () and row.store == (16, 16)
    assert tasks(["dense_crf"], ["sm_90"], ["bf16"], ("21 labels exact",)) == []


def test_both_axes_and_both_forms_are_compiled():
    kernels = [row.kernel for row in compile_task(Task("dense_crf", "sm_90", "fp32", "21 labels spatial"))]
    assert kernels == ["spatial_gaussian"] * 2
    kernels = [
        row.kernel for row in compile_task(Task("dense_crf", "sm_90", "fp32", "21 labels exact direct"))
    ]
    assert kernels.count("gaussian_filter") == 2


def test_instructions_of_a_pair(monkeypatch):
    task = Task("dense_crf", "sm_90", "fp32", "21 labels exact")
    row = compile_task(task)[0]
    assert 2.5 < row.per_pair <= MOST
    assert f"{row.per_pair:.1f}" in row.cells()
    inspect = _machine_code.inspect
    monkeypatch.setattr(_machine_code, "inspect", lambda c: dataclasses.replace(inspect(c), loop=150))
    assert compile_task(task)[0].problems == ("4.69 instructions a pair",)
    # Of kernels that know no pairs none is counted.
    assert compile_task(Task("dense_crf", "sm_90", "fp32", "21 labels spatial"))[0].per_pair == 0


def test_the_limit_is_that_of_narrow_rows_and_eight_warps():
    def figures(**constants):
        launch = SimpleNamespace(constants=constants, tile=Tile(128, 64, 32, 8, 3))
        return pair_instructions(launch, SimpleNamespace(loop=128)), most_per_pair(launch)

    assert figures(DIRECT=False, BLOCK_C=32, DEPTH=32) == (4, MOST)
    # 32 labels in two halves.
    assert figures(DIRECT=False, BLOCK_C=64, DEPTH=32) == (4, MOST)
    assert figures(DIRECT=False, BLOCK_C=128, DEPTH=32) == (4, math.inf)
    assert figures(DIRECT=False, BLOCK_C=64, DEPTH=64) == (4, math.inf)
    assert figures(DIRECT=False, BLOCK_C=32, DEPTH=32, BLOCK_F=16) == (4, math.inf)
    assert figures(DIRECT=True, BLOCK_C=32, DEPTH=32) == (0, MOST)


def test_the_loop_of_a_disassembly():
    text = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P0 BRA 0x0080 ;
        /*0030*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], RZ, !UPT ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/               @P0 BRA 0x0030 ;
        /*0060*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0070*/               @P1 BRA 0x0010 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x0090;
    """
    assert from_sass(text, 32, 0).loop == 3
    assert from_sass(text.replace("HGMMA", "FFMA"), 32, 0).loop == 0
