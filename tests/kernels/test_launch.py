"""Launches: what a launcher works out once, when it is reused, and how it reaches a compiled kernel."""

import pytest
import torch
from triton import knobs

from segfast import kernels
from segfast.kernels import Tile, _launch
from tests.fused_conv import draw

TILE = Tile(16, 16, 16, 4, 2)


def record(x=None, w=None, out=None, residual=None, skip=None, stride=2, activation=None, slope=0.01):
    """The one launch of a forward call, not carried out. Default: 8 -> 16 channels, 2x2 at stride 2."""
    x = draw(1, 8, 3, 4, dtype=torch.float16, channels_last=True) if x is None else x
    w = draw(8, 16, 2, 2, dtype=torch.float16, channels_last=True) if w is None else w
    shape = (x.shape[0], w.shape[1], x.shape[2] * stride, x.shape[3] * stride)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last) if out is None else out
    with kernels.record_launches() as launches:
        launch = kernels.conv_transpose2d_forward(
            x,
            w,
            None,
            None,
            None,
            residual,
            skip,
            out,
            (stride,) * 2,
            (0, 0),
            (1, 1),
            1,
            (0, 0),
            activation,
            slope,
        )
    assert [p for p, _ in launches] == [launch]
    return launch


def test_recording_launches_nothing_and_nests():
    out = torch.full((1, 16, 6, 8), 7.0, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    record(out=out)
    assert (out == 7.0).all()
    with kernels.record_launches() as outer:
        with kernels.record_launches() as inner:
            assert inner == []
        record_inside = len(outer)
    assert record_inside == 0 and _launch._recorder is None


def test_recording_works_on_meta_tensors():
    x = torch.empty(1, 8, 3, 4, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)
    w = torch.empty(8, 16, 2, 2, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)
    out = torch.empty(1, 16, 6, 8, device="meta", dtype=torch.bfloat16, memory_format=torch.channels_last)
    launch = record(x, w, out)
    assert launch.grid[0] > 0 and launch.constants["CI"] == 8


def test_the_same_call_reuses_its_launch_and_another_does_not():
    launch = record()
    assert record() is launch
    x = draw(1, 8, 3, 4, dtype=torch.float16, channels_last=True)
    others = [
        record(draw(1, 8, 3, 5, dtype=torch.float16, channels_last=True)),
        record(x.float(), draw(8, 16, 2, 2, channels_last=True)),
        record(draw(2, 8, 3, 4, dtype=torch.float16, channels_last=True)[::2]),
        record(activation="relu"),
        record(slope=0.5),
        record(residual=draw(1, 16, 6, 8, dtype=torch.float16, channels_last=True)),
    ]
    # The third has another batch stride but one image: its layout differs, so it is a launch of its own.
    assert len({id(p) for p in [launch, *others]}) == len(others) + 1


def test_the_alignment_of_a_pointer_belongs_to_the_key():
    # Triton compiles for the alignment it sees: a launch made on 16 bytes must not be launched on 2.
    store = torch.zeros(8 * 12 + 8, dtype=torch.float16)
    aligned, offset = (store[i : i + 96].view(1, 3, 4, 8).permute(0, 3, 1, 2) for i in (0, 1))
    assert aligned.data_ptr() % 16 == 0 and aligned.stride() == offset.stride()
    assert record(aligned) is not record(offset)
    assert record(aligned) is record(store[8:104].view(1, 3, 4, 8).permute(0, 3, 1, 2))


def test_forgetting_follows_every_change_of_configuration():
    launch = record()
    with kernels.override_tile("conv_transpose2d_forward", TILE):
        assert record().tile == TILE
    assert record().tile == launch.tile
    with kernels.pretend_architecture("sm_86"):
        assert record() is not launch


def test_the_number_of_launches_is_bounded(monkeypatch):
    monkeypatch.setattr(_launch, "_LAUNCHES", {})
    monkeypatch.setattr(_launch, "_MOST_LAUNCHES", 10)
    for i in range(35):
        _launch.remember(i, i)
        assert len(_launch._LAUNCHES) <= 10 and _launch._LAUNCHES[i] == i


@pytest.mark.parametrize(
    ("channels", "expected"), [(64, 16), (24, 8), (8, 8), (21, 1), (20, 4), (6, 2), (48, 16)]
)
def test_pixel_alignment_is_what_divides_every_pixels_offset(channels, expected):
    assert _launch.pixel_alignment(draw(2, channels, 3, 4, channels_last=True)) == expected


def test_pixel_alignment_of_views():
    wide = draw(2, 64, 4, 4, channels_last=True)
    assert _launch.pixel_alignment(wide[:, :21]) == 16  # 21 of 64 channels: the pixels stay 64 apart
    assert _launch.pixel_alignment(wide, None, draw(1, 12, 2, 2, channels_last=True)) == 4
    assert (
        _launch.pixel_alignment(draw(1, 21, 1, 1, channels_last=True)) == 16
    )  # a single pixel has no neighbor
    assert _launch.pixel_alignment(draw(1, 1, 1, 1).expand(2, 1, 4, 4)) == 16  # strides of zero


def test_wide_offsets_begin_below_two_to_the_31():
    def spanning(elements):
        return torch.empty(1, device="meta").expand(2, 1, 1, 1).as_strided((2, 1, 1, 1), (elements, 1, 1, 1))

    assert not _launch.needs_wide_index(spanning(2**31 - 2**24 - 1), None)
    assert _launch.needs_wide_index(None, spanning(2**31 - 2**24))
    assert not _launch.needs_wide_index(torch.empty(2**31, 4, device="meta")[:4])


def test_needs_wide_index_reaches_the_kernel():
    meta = {"device": "meta", "dtype": torch.float16, "memory_format": torch.channels_last}
    x, w = torch.empty(1, 64, 2, 2, **meta), torch.empty(64, 64, 2, 2, **meta)
    assert not record(x, w, torch.empty(1, 64, 4, 4, **meta)).constants["WIDE_INDEX"]
    big = torch.empty(1, 64, 3000, 3000, **meta)
    assert record(big, w, torch.empty(1, 64, 6000, 6000, **meta)).constants["WIDE_INDEX"]


class _FakeCompiled:
    """Stands for a compiled kernel: notes what the short launch passes."""

    packed_metadata, function = "metadata", "function"

    def __init__(self):
        self.calls = []

    def run(self, *args):
        self.calls.append(args)


def test_after_the_first_call_the_compiled_kernel_is_launched_directly(monkeypatch):
    compiled, slow = _FakeCompiled(), []

    class Kernel:
        arg_names = ("x", "n", "B", "A")

        def __getitem__(self, grid):
            return lambda *args, **kwargs: slow.append((grid, args, kwargs)) or compiled

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: ("stream", index), raising=False)
    launch = _launch.Launch(Kernel(), (3, 2), (5,), {"A": 1, "B": 2}, TILE)
    x = torch.ones(1)
    launch(x)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert slow == [((3, 2, 1), (x, 5), {"B": 2, "A": 1, **options})] and not compiled.calls
    launch(x)
    launch(x)
    # Through the binder each call would cost 11 us. Grid, stream, function, metadata, three hooks, then every
    # argument by position: constants in the kernel's own order.
    assert len(slow) == 1
    expected = (3, 2, 1, ("stream", None), "function", "metadata", None, None, None, x, 5, 2, 1)
    assert compiled.calls == [expected] * 2


def test_a_kernel_says_whether_multiply_and_add_are_fused():
    """Triton's own default changes with 3.10: of a kernel that says nothing the rounding would."""
    with kernels.record_launches() as exact:
        kernels.build_permutohedral(torch.empty(1, 4, 2, device="meta"))
    assert {launch.options["enable_fp_fusion"] for launch, _ in exact} == {True, False}
    meta = {"device": "meta", "dtype": torch.float16, "memory_format": torch.channels_last}
    pointers = (torch.empty(1, 8, 3, 4, **meta), torch.empty(8, 16, 2, 2, **meta))
    out = torch.empty(1, 16, 6, 8, **meta)
    launch = record(*pointers, out)
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    for fused in (True, False):
        launch.options["enable_fp_fusion"] = fused
        compiled = kernels.compile_offline(launch, (*pointers, *[None] * 5, out), target)
        assert compiled.metadata.enable_fp_fusion is fused


def test_a_listening_profiler_gets_the_long_way():
    calls = []

    class Kernel:
        arg_names = ()

        def __getitem__(self, grid):
            return lambda *args, **kwargs: calls.append("long") or _FakeCompiled()

    launch = _launch.Launch(Kernel(), (1,), (), {}, TILE)
    launch(torch.ones(1))
    hook = [].append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launch(torch.ones(1))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert calls == ["long", "long"]


def test_an_empty_grid_launches_nothing():
    class Kernel:
        arg_names = ()

        def __getitem__(self, grid):
            raise AssertionError("launched")

    _launch.Launch(Kernel(), (0, 3), (), {}, TILE)(torch.ones(1))


@pytest.mark.parametrize("kind", ["forward", "grad_input", "grad_weight"])
def test_a_recorded_launch_compiles_without_a_gpu(kind):
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    meta = {"device": "meta", "dtype": torch.bfloat16, "memory_format": torch.channels_last}
    x, w, y = (
        torch.empty(1, 64, 8, 8, **meta),
        torch.empty(64, 64, 2, 2, **meta),
        torch.empty(1, 64, 16, 16, **meta),
    )
    geometry = ((2, 2), (0, 0), (1, 1), 1)
    with kernels.pretend_architecture("sm_90"), kernels.record_launches() as launches:
        if kind == "forward":
            kernels.conv_transpose2d_forward(x, w, *[None] * 5, y, *geometry, (0, 0), "relu", 0.0)
        elif kind == "grad_input":
            kernels.conv_transpose2d_grad_input(y, w, x, *geometry)
        else:
            kernels.conv_transpose2d_grad_weight(x, y, w, *geometry)
    compiled = kernels.compile_offline(*launches[0], target)
    assert "wgmma" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 232448
