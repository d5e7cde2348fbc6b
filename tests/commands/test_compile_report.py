"""The kernels' machine code, compiled for four architectures (all with SEGFAST_ALL_ARCHITECTURES=1)."""

import dataclasses
import functools
import os
import re

import pytest
import torch
import triton
import triton.language as tl

from segfast import cli
from segfast.commands import compile_report as compile_report_module
from segfast.commands._machine_code import from_sass
from segfast.commands.compile_report import (
    ARCHITECTURES,
    Task,
    compile_launch,
    compile_report,
    compile_task,
    tasks,
)
from segfast.kernels import Tile, _launch, override_tile, pretend_architecture, record_launches
from segfast.kernels._split import reduce_partials
from segfast.ops._case import launches

FAMILY = "conv_transpose2d"
EVERY = os.environ.get("SEGFAST_ALL_ARCHITECTURES") == "1"
ARCHS = ARCHITECTURES if EVERY else ("sm_80", "sm_90", "sm_100", "gfx942")
# U-Net's up-convolution beside its skip and both gradients, and 21 classes.
EVERYWHERE = ("unet_up4 up_concat", "unet_up4 grad", "fcn8s_up8 forward")
ON_HOPPER = (
    *EVERYWHERE,
    "unet_up2 forward",
    "decoder_up4x4",
    "up3x3 forward",
    "up24 forward",
    "past_int32 f",
)

# What is compiled under every version of Triton that is supported: a case or two of each kernel.
SAMPLE = {
    "conv_transpose2d": ("unet_up4 up_concat", "unet_up4 grad", "fcn8s_up8 forward"),
    "conv2d": ("aspp_r12 scale+relu", "aspp_branches_n8_33 parallel", "resnet_layer3_d2"),
    "separable_conv2d": ("xception_middle_dw forward", "xception_middle_dw stat", "xception_middle_dw grad",
                         "mobilenetv2_dw96_s2 grad_input", "entry_sep_128", "multiplier_2"),
    "packed_pool2d": ("segnet_pool1 ", "24 channels "),
    "segmentation_head": ("ade20k_upsample ",),
    "dense_crf": ("21 labels exact", "21 labels lattice", "21 labels spatial", "21 labels update start",
                  "21 labels update gathered matrix", "21 labels update lattice last", "build"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _EndsTheProcess(Task):
    def __reduce__(self):  # what a compiler's failed assertion does
        return os._exit, (1,)


FATAL = _EndsTheProcess(FAMILY, "sm_90", "bf16", "fatal")


@pytest.fixture(scope="module")
def all_rows():
    """Those of all work, of which the last but one ends its process."""
    work = []
    for arch in ARCHS:
        work += tasks([FAMILY], [arch], ["bf16"], ON_HOPPER if arch == "sm_90" else EVERYWHERE)
    work += tasks([FAMILY], ["sm_90"], ["fp16"], ("unet_up2 forward",))
    work += tasks([FAMILY], ["sm_90"], ["fp32", "tf32"], ("unet_up4 forward", "unet_up4 grad"))
    return compile_report([*work[:-1], FATAL, work[-1]], processes=2, progress=False)


@pytest.fixture(scope="module")
def rows(all_rows):
    return [row for row in all_rows if row.case != FATAL.case]


def test_no_row_has_a_problem(rows):
    assert len(rows) > 30
    assert [row for row in rows if row.problems] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_of_an_architecture(rows, arch):
    """The same, asserted figure by figure, so that it does not rest on the report's own judgment."""
    matrix = {"sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "mfma"}.get(arch, "HMMA")
    limit = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}.get(arch, 101376)
    here = [row for row in rows if row.arch == arch and row.dtype == "bf16"]
    assert {row.kernel for row in here} >= {
        "forward_wide",
        "conv2d_dense",
        "grad_weight",
        "reduce_partials",
    }
    for row in here:
        assert row.spills == 0
        assert row.shared <= limit
        assert row.matrix == ("" if row.kernel == "reduce_partials" else matrix)
        if arch.startswith("sm") and "fcn8s" not in row.case:
            assert row.store == (16, 16)
            if row.matrix and "up24" not in row.case:
                assert row.async_copy == (16, 16)


def test_21_classes_are_not_stored_one_by_one(rows):
    widths = {row.arch: row.store for row in rows if row.case == "fcn8s_up8 forward"}
    assert set(widths) == set(ARCHS)
    assert all(width[0] >= 8 for arch, width in widths.items())


@pytest.mark.compat
@pytest.mark.parametrize("family", SAMPLE)
def test_a_sample_of_every_family_has_no_problem(family):
    work = tasks([family], ["sm_90"], ["fp32" if family == "dense_crf" else "bf16"], SAMPLE[family])
    rows = [row for task in work for row in compile_task(task)]
    assert all(any(row.case.startswith(name) for row in rows) for name in SAMPLE[family])
    assert [row for row in rows if row.problems] == []


@functools.cache
def judged(case, arch="sm_90", tile=None, store_bytes=16, dtype="bf16"):
    """The row of one case compiled here, with another tile."""
    task = Task(FAMILY, arch, dtype, case)
    call = next(c for name, c, _ in compile_report_module._cases(FAMILY, dtype) if name == case)
    with pretend_architecture(arch), record_launches() as launches:
        if tile is None:
            call()
        else:
            with override_tile("conv_transpose2d_forward", tile):
                call()
    return compile_launch(*launches[0], task, store_bytes)


def test_a_spill_is_seen():
    row = judged("unet_up4 forward", tile=Tile(128, 256, 64, 4, 2))
    assert row.spills > 0
    assert "spills" in row.problems


def test_too_much_shared_memory_is_seen():
    row = judged("unet_up4 forward", "sm_86", Tile(64, 128, 64, 8, 6))
    assert row.shared > row.limit
    assert row.problems == ("shared memory",)


def test_a_missing_matrix_instruction_is_seen():
    row = judged("unet_up4 forward", tile=Tile(64, 32, 64, 2, 2))
    assert row.matrix == "HMMA"
    assert row.problems == ("HGMMA expected",)


def test_a_narrow_store_is_seen():
    row = judged("fcn8s_up8 grad_input")
    assert row.store == (2, 2)
    assert row.problems == ("2-byte store",)


@triton.jit
def _broken_kernel(out_ptr, scale):
    tl.store(out_ptr, tl.full((4,), scale, tl.float32))  # a block to one address


def test_what_does_not_compile_is_a_row_and_ends_nothing(monkeypatch, capsys):
    out = torch.empty(64, device="meta")

    def call():
        _launch.Launch(_broken_kernel, (1,), (0.5,), {}, Tile(1, 1, 1, 4, 1))(out)
        reduce_partials(torch.empty(2, 64, device="meta"), out)

    def refuse():
        raise ValueError("a launcher's\nown fault")

    cases = [("broken", call, 4), ("refused", refuse, 4)]
    monkeypatch.setattr(compile_report_module, "_cases", lambda *_: cases)
    rows = [row for name, *_ in cases for row in compile_task(Task(FAMILY, "sm_90", "bf16", name))]
    assert [row.kernel for row in rows] == ["broken", "reduce_partials", "-"]
    broken, good, refused = [" ".join(row.problems) for row in rows]
    assert re.fullmatch(r"does not compile: \w+Error: .*\w.*", broken)
    assert (good, refused) == ("", "cannot be launched: ValueError: own fault")
    monkeypatch.setattr(compile_report_module, "compile_report", lambda *_: rows)
    assert cli.main(["compile-report", "--arch", "sm_90"]) == 1
    assert "3 kernels, 2 with a problem" in capsys.readouterr().out


def test_a_compiler_that_ends_its_process_is_a_row_and_ends_nothing(all_rows):
    fatal = compile_report_module.Row.failed(FATAL, "the compiler ended its process")
    assert all_rows.count(fatal) == 1
    place = all_rows.index(fatal)
    before, after = all_rows[place - 1], all_rows[place + 1]
    assert (before.case, before.dtype) == ("unet_up4 grad_input", "tf32")
    assert (after.case, after.dtype) == ("unet_up4 grad_weight", "tf32")


def test_reading_a_disassembly():
    text = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0020*/                   LDG.E.U16 R3, desc[UR4][R6.64] ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/              @P1  STL [R1], R5 ;
        /*0050*/              @P1  STG.E desc[UR4][R8.64], R5 ;
        /*0060*/                   STG.E.64 desc[UR4][R8.64], R5 ;
    """
    code = from_sass(text, registers=255, stack=8)
    assert (code.registers, code.spills, code.matrix, code.instructions) == (255, 9, "HGMMA", 7)
    assert (code.store, code.load, code.async_copy) == ((4, 8), (2, 2), (16, 16))


def test_command_under_the_interpreter(tmp_path, monkeypatch, capfd):
    """The command compiles although TRITON_INTERPRET=1, under which nothing compiles."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "table.txt"
    options = ["--arch", "sm_90", "--dtype", "bf16", "--processes", "1", "--specimen"]
    assert cli.main(["compile-report", *options, "unet_up4 forward", "--out", str(out)]) == 0
    assert "HGMMA" in capfd.readouterr().out
    assert "1 kernels, 0 with a problem" in out.read_text()


def test_exit_code_follows_the_problems(monkeypatch, capsys):
    good, bad = judged("unet_up4 forward"), judged("fcn8s_up8 grad_input")
    for rows, code in ([good], 0), ([good, bad], 1):
        monkeypatch.setattr(compile_report_module, "compile_report", lambda *_, rows=rows: rows)
        assert cli.main(["compile-report", "--arch", "sm_90"]) == code
    assert "2-byte store" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cases_launch_every_kernel(dtype):
    # The two forwards, the convolution that is the input's gradient, its parts', the weight's, and theirs.
    with pretend_architecture("sm_90"), record_launches() as recorded:
        for _, call, store_bytes in launches(FAMILY, dtype):
            call()
            assert store_bytes in (2, 4, 8, 16)
    names = {launch.kernel.__name__ for launch, _ in recorded}
    assert len(names) == 6
