"""The most that machine code can reach on an H200, as `segfast compile-report --bounds` models it."""

import functools
import json
import math
from pathlib import Path

import pytest

from benchmarks.cases import headline
from segfast import cli
from segfast.commands import _bounds
from segfast.commands import compile_report as compile_report_module
from segfast.commands._bounds import Launched, cost, model, pipe_clocks, resident_programs
from segfast.commands._loops import Loop, find_loops, read_code, read_source, with_trips
from segfast.commands.compile_report import Task, compile_task
from segfast.kernels._launch import TRITON

compiled = functools.cache(compile_task)

KEPT = Path(__file__).with_name("headline_bounds.json")
FALL = 0.05  # of a headline kernel's share, above which its machine code has become worse

# A matrix product's main loop as cuobjdump prints it, shortened: 10 instructions from 0x0020 on, gone through
# by the branch at 0x00b0; the last line is the trap behind every program.
PRODUCT = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
        /*0010*/                   S2R R2, SR_TID.X ;                        /* 0x0000000000027919 */
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R2+0x1000], desc[UR4][R6.64] ;
        /*0040*/                   IADD3 R4, R4, 0x80, RZ ;
        /*0050*/                   IMAD.WIDE R6, R8, 0x2, R6 ;
        /*0060*/                   FFMA R9, R9, R10, R11 ;
        /*0070*/                   MUFU.EX2 R9, R9 ;
        /*0080*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0090*/                   LDS R12, [R2] ;
        /*00a0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00b0*/               @P1 BRA 0x20 ;
        /*00c0*/                   STG.E.128 desc[UR4][R8.64], R24 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0;
"""


def test_a_loop_is_found_and_the_trap_is_none():
    code = read_code(PRODUCT)
    assert len(code) == 15
    assert code[11] == ("BRA", 2)
    assert find_loops(code) == [Loop(2, 11)]


def test_loops_within_each_other_are_found_from_the_outside_in():
    lines = ["LDC R1", "IADD3 R1", "FFMA R2", "BRA 0x20", "IADD3 R3", "BRA 0x10", "EXIT", "BRA 0x70"]
    text = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines))
    assert find_loops(read_code(text)) == [Loop(1, 5), Loop(2, 3)]


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        # 16 x 256 x 16 multiply-adds of a warp at 2048 a clock
        ("HGMMA.64x256x16.F32.BF16", {"tensor": 32.0, "matrix": 1}),
        # half as deep at half the rate
        ("HGMMA.64x128x8.F32.TF32", {"tensor": 16.0, "matrix": 1}),
        ("HMMA.16816.F32.BF16", {"tensor": 1 / 0.63, "matrix": 1}),
        ("HMMA.1688.F32.TF32", {"tensor": 1 / 0.63, "matrix": 1}),
        ("FFMA.FTZ", {"fp32": 1}),
        ("IMAD.MOV.U32", {"imad": 1}),
        ("LOP3.LUT", {"integer": 1}),
        ("ISETP.GE.AND", {"integer": 1}),
        ("MUFU.EX2", {"mufu": 1}),
        # 32 threads' 16 bytes at 128 a clock
        ("LDG.E.128", {"lsu": 4.0, "memory": 1, "loaded": 512}),
        ("LDG.E.U16", {"lsu": 1.0, "memory": 1, "loaded": 64}),
        ("LDGSTS.E.BYPASS.128", {"lsu": 4.0, "memory": 1, "copied": 512}),
        ("STG.E.64", {"lsu": 2.0, "memory": 1, "stored": 256}),
        ("LDSM.16.M88.4", {"lsu": 4.0, "memory": 1}),
        ("LDSM.16.M88", {"lsu": 1.0, "memory": 1}),
        ("SHFL.BFLY", {"lsu": 1.0, "memory": 1}),
        # issued, and nothing else
        ("BAR.SYNC.DEFER_BLOCKING", {}),
        ("UIADD3", {}),
        ("LDGDEPBAR", {}),
        ("LDC.64", {}),
    ],
)
def test_what_an_instruction_costs(operation, expected):
    assert dict(cost(operation)) == pytest.approx({"issue": 1, **expected})


def test_the_clocks_of_a_pipe():
    # 12 + 4 multiply-adds at 4 a clock, those of integers at 2, other integers at 2, 30 in all at 4.
    work = {"fp32": 12, "imad": 4, "integer": 10, "mufu": 3, "lsu": 7, "issue": 30, "tensor": 2}
    assert pipe_clocks(work, 8) == {"tensor": 16, "alu": 60, "mufu": 48, "lsu": 56}  # issue: 30 / 4
    work["integer"] = 20
    assert pipe_clocks(work, 8)["alu"] == 80


def test_the_programs_that_fit():
    assert resident_programs(registers=168, shared=0, warps=4) == 3  # 65536 / (168 * 128)
    assert resident_programs(registers=165, shared=0, warps=4) == 3  # of which 168 are taken
    assert resident_programs(registers=32, shared=0, warps=4) == 16  # 64 warps
    assert resident_programs(registers=16, shared=0, warps=1) == 32
    assert resident_programs(registers=64, shared=100_000, warps=4) == 2
    assert resident_programs(registers=255, shared=147_456, warps=8) == 1


def bound_of(code, trips, **changes):
    given = {"programs": 132.0, "warps": 8, "stages": 3, "registers": 128, "shared": 147_456, "read": 1e6,
             "written": 1e6}  # fmt: skip
    loops, _ = with_trips(find_loops(code), [trips])
    return model(code, loops, Launched(**{**given, **changes}))


def test_a_product_counted_by_hand():
    bound = bound_of(read_code(PRODUCT), 100.0)
    assert bound.step == {"tensor": 1, "alu": 3, "mufu": 1, "lsu": 3}
    # A step of 8 warps: 32 clocks each on the matrix units; 10 instructions issued, 4 a clock; 2 a special
    # function; 4 + 4 + 1 for the copies and the load.
    assert bound.step_clocks == {"tensor": 256, "alu": 20, "mufu": 16, "lsu": 72}
    # A first load, steps of which none is faster than half a load, as two are on their way, and the rest: 4
    # clocks a warp for its store.
    clocks = _bounds.LATENCY + 100 * _bounds.LATENCY / 2 + 8 * 4
    assert (bound.trips, bound.resident, bound.name) == (100, 1, "latency")
    assert bound.in_flight == 2 * 8 * 2 * 512
    assert bound.l2_bytes == 132 * 100 * 8192 + 1e6
    assert bound.seconds * 1.755e9 == pytest.approx(clocks)
    assert bound.share == pytest.approx(100 * 256 / clocks)


def test_what_bounds_a_launch(monkeypatch):
    code = read_code(PRODUCT)
    full = bound_of(code, 100.0, read=1e9)
    assert (full.name, full.share) == ("dram", pytest.approx(1.0))
    monkeypatch.setattr(_bounds, "LATENCY", 1.0)
    reads = bound_of(code, 100.0)
    assert (reads.name, reads.seconds) == ("l2", pytest.approx(reads.l2_bytes / 6.6e12))
    monkeypatch.setattr(_bounds, "L2", 1e9)
    assert bound_of(code, 100.0).name == "latency"  # alone on its multiprocessor, it also stores
    twice = {"programs": 264.0, "shared": 0}
    assert bound_of(code, 100.0, **twice).name == "tensor"
    # One program more than two rounds: a third one for it.
    assert bound_of(code, 100.0, **{**twice, "programs": 265.0}).name == "tail"
    useful = 264 * 100 * 128 * 256 * 16 * 2
    assert bound_of(code, 100.0, **twice, flops=useful).share == pytest.approx(1, rel=0.01)
    assert bound_of(code, 100.0, **twice, flops=useful / 2).share == pytest.approx(0.5, rel=0.01)


def test_trips_that_data_decide_leave_the_step():
    bound = bound_of(read_code(PRODUCT), None)
    assert (bound.trips, bound.seconds, bound.l2_bytes) == (None, None, None)
    assert bound.name == "l2" and bound.share == pytest.approx(256 / (8192 / _bounds.L2))


def test_an_unrolled_loop_is_the_shortest():
    loops = [Loop(2, 9), Loop(12, 20)]
    assert with_trips(loops, [4.0, 2.0, None]) == ([Loop(2, 9, 4.0), Loop(12, 20, None)], 2.0)
    assert with_trips([], [8.0]) == ([], 8.0)
    assert with_trips(loops, [4.0]) == (loops, 1.0)  # more than the source has


IR = """
module {
  tt.func public @k(%x_ptr: !tt.ptr<bf16> loc("x"(#loc)), %y_ptr: !tt.ptr<bf16> loc("y"(#loc)), %M: i32) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c4_i32 = arith.constant 4 : i32 loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %many = tt.get_num_programs x : i32 loc(#loc1)
    %copies = arith.cmpi sge, %pid, %c4_i32 : i32 loc(#loc1)
    scf.if %copies {
      %0 = tt.splat %y_ptr : !tt.ptr<bf16> -> tensor<4x!tt.ptr<bf16>> loc(#loc1)
      tt.store %0, %v, %ok : tensor<4x!tt.ptr<bf16>> loc(#loc1)
    } else {
      %0 = arith.muli %pid, %c4_i32 : i32 loc(#loc1)
      %1 = arith.addi %0, %M : i32 loc(#loc1)
      %2 = scf.for %i = %0 to %1 step %c4_i32 iter_args(%a = %z) -> (tensor<4xf32>)  : i32 {
        %n = tt.load %p : tensor<4x!tt.ptr<i32>> loc(#loc1)
        %3 = scf.for %j = %c0_i32 to %n step %c1_i32 iter_args(%b = %a) -> (tensor<4xf32>)  : i32 {
          scf.yield %b : tensor<4xf32> loc(#loc1)
        } loc(#loc1)
        scf.yield %3 : tensor<4xf32> loc(#loc1)
      } loc(#loc1)
      scf.for %i = %pid to %M step %many  : i32 {
      } loc(#loc1)
    } loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
"""


def test_trips_of_the_source():
    source = read_source(IR, {"M": 18}, (8, 1, 1))
    # (18 + 3) / 4 for each; what memory says; from program 0 to 3 to 18 by 8: 3, 3, 2, 2.
    assert source.trips == [5.0, None, 2.5]
    assert source.entering == 0.5
    assert source.written == {"y_ptr"}


# The launch that stands for each headline row, in the case's own epilogue where the report has it.
LAUNCHES = {
    "unet_up1": "forward",
    "unet_up2": "forward",
    "unet_up3": "forward",
    "unet_up4": "forward",
    "decoder_up4x4": "forward",
    "fcn8s_up8": "forward",
    "fcn32s_up32": "forward",
    "unet_up4_concat": "unet_up4 up_concat",
    "xception_middle_dw": "scale+relu6",
    "mobilenetv2_dw144": "scale+relu6",
    "decoder_sep_256": "separable",
    "resnet_layer3_d2": "scale+relu",
}


def headline_bounds():
    """The modeled bounds of the headline rows: a list for each, one of a kernel."""
    found = {}
    for case in headline():
        launch = LAUNCHES[case.name]
        name = launch if " " in launch else f"{case.name} {launch}"
        rows = compiled(Task(case.family, "sm_90", "bf16", name))
        found[case.name] = [
            dict(kernel=row.kernel, tile=row.tile, bound=row.bound.name, share=round(row.bound.share, 3))
            for row in rows
        ]
    return found


@pytest.mark.skipif(TRITON != (3, 7), reason="the bounds are of what Triton 3.7 compiles")
def test_no_headline_kernel_has_become_worse():
    """Of a kernel that is meant to change, keep the new bounds: `python -m tests.commands.test_bounds`."""
    kept = json.loads(KEPT.read_text())
    now = headline_bounds()
    assert now.keys() == kept.keys()
    for name, kernels in kept.items():
        assert [each["kernel"] for each in now[name]] == [each["kernel"] for each in kernels]
        for is_now, was in zip(now[name], kernels, strict=True):
            assert is_now["share"] >= (1 - FALL) * was["share"], (name, is_now, was)


def test_the_table(monkeypatch, capsys):
    rows = [
        compiled(Task("conv_transpose2d", arch, "bf16", "unet_up4 forward"))[0] for arch in ("sm_90", "sm_80")
    ]
    monkeypatch.setattr(compile_report_module, "compile_report", lambda *_: rows)
    assert cli.main(["compile-report"]) == 0
    alone = capsys.readouterr().out
    assert "MODELED" not in alone
    assert cli.main(["compile-report", "--bounds"]) == 0
    table = capsys.readouterr().out.removeprefix(alone).strip()
    assert table.startswith("MODELED, NEVER MEASURED")
    assert table.count("unet_up4 forward") == 1  # sm_90's
    assert table.endswith(f"{rows[0].bound.share:.2f}")


def test_a_product_does_the_work_of_its_case():
    """The trips and the matrix instructions together are the products that the tiles hold."""
    (row,) = compiled(Task("conv_transpose2d", "sm_90", "bf16", "unet_up1 forward"))
    rows, columns, depth = 16 * 28 * 28, 4 * 512, 1024
    tiles = math.ceil(rows / 128) * math.ceil(columns / 256)
    assert row.tile.startswith("128x256x64 ")
    assert tiles * row.bound.trips * row.bound.step_clocks["tensor"] * 2048 == pytest.approx(
        tiles * 128 * 256 * depth
    )


if __name__ == "__main__":
    KEPT.write_text(json.dumps(headline_bounds(), indent=1) + "\n")
