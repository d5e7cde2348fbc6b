"""Choices for calls on a GPU that is not there.

The tensors are fake: they have a device and no numbers.
"""

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import segfast
from segfast.kernels import Tile, choose_tile
from segfast.kernels._tiles import Problem
from segfast.ops import _choice, _choice_files, _gpu, _gpu_tune, _proofs
from segfast.ops._choice import Choice, collect
from segfast.ops._gpu import TRITON, choose, left_to_parts
from segfast.ops._gpu_call import GpuCall
from segfast.ops._prove import ProofRow

FAKE = FakeTensorMode()
OPTIONS = ((1, 1), (1, 1), (1, 1), 1, False, False, False, False, None)
DEVICE = torch.device("cuda", 0)
CALL = GpuCall(
    "conv2d", "nvidia-h200", torch.bfloat16, "", True, ((1, 8, 16, 16),), ((4, 8, 3, 3),), OPTIONS, False
)
OURS = Choice(TRITON, {"aten": 20.0, TRITON: 10.0})


@pytest.fixture(autouse=True)
def gpu(pretended_gpu):
    return pretended_gpu


def fake(*shape, dtype=torch.bfloat16, layout=torch.channels_last):
    # Even of a fake tensor a torch built for CUDA looks for a driver, where there seems to be a GPU.
    with FAKE, mock.patch.object(torch.cuda, "is_available", lambda: False):
        return torch.empty(shape, dtype=dtype, device=DEVICE, memory_format=layout)


def asked(height=16, width=16, batch=1, *, differentiates=False, options=OPTIONS, filters=4, **tensor):
    images = (fake(batch, 8, height, width, **tensor),)
    return choose("conv2d", images, (fake(filters, 8, 3, 3),), options, differentiates)


class TestFinding:
    def test_nothing_measured_is_no_choice(self):
        assert asked() is None
        assert _gpu.reason_not("conv2d", None) == "not measured on this GPU"

    def test_the_call_that_was_measured(self):
        _gpu.keep(CALL, OURS)
        assert asked() == TRITON
        _gpu.keep(CALL, Choice("cudnn_relu", {}))
        assert asked() == "cudnn_relu"

    def test_the_nearest_size_within_a_factor_of_four(self):
        _gpu.keep(CALL, OURS)
        _gpu.keep(CALL._replace(images=((1, 8, 64, 64),)), Choice("aten", {}))
        for side, name in ((7, None), (8, TRITON), (31, TRITON), (33, "aten"), (128, "aten"), (129, None)):
            assert asked(side, side) == name, side
        assert asked(16, 4) == asked(8, 8, batch=4) == TRITON

    @pytest.mark.parametrize(
        "other",
        [
            {"differentiates": True},
            {"dtype": torch.float16},
            {"dtype": torch.float32},
            {"layout": torch.contiguous_format},
            {"filters": 5},
            {"options": ((2, 2), *OPTIONS[1:])},
            {"options": (*OPTIONS[:-1], "relu")},
        ],
        ids=str,
    )
    def test_another_call_is_another_choice(self, other):
        _gpu.keep(CALL, OURS)
        assert asked(**other) is None

    @pytest.mark.parametrize(("precision", "name"), [("tf32", TRITON), ("ieee", None)])
    def test_products_of_fp32_are_told_apart_by_their_precision(self, precision, name):
        _gpu.keep(CALL._replace(dtype=torch.float32, precision="tf32"), OURS)
        conv = torch.backends.cudnn.conv
        before, conv.fp32_precision = conv.fp32_precision, precision
        try:
            assert asked(dtype=torch.float32) == name
        finally:
            conv.fp32_precision = before

    def test_autocast_decides_the_dtype(self):
        _gpu.keep(CALL, OURS)
        images, weights = (fake(1, 8, 16, 16, dtype=torch.float32),), (fake(4, 8, 3, 3),)
        assert choose("conv2d", images, weights, OPTIONS, False, torch.bfloat16) == TRITON

    def test_what_the_kernels_do_not_compute_in_is_not_looked_up(self):
        _gpu.keep(CALL._replace(dtype=torch.float64), OURS)
        assert asked(dtype=torch.float64) is None

    def test_another_backend_asks_for_no_choice(self):
        _gpu.keep(CALL, OURS)
        for name in ("aten", "triton"):
            with segfast.backend(name):
                assert asked() is None

    def test_a_cpu_has_none(self):
        _gpu.keep(CALL, OURS)
        x, weight = torch.randn(1, 8, 16, 16), torch.randn(4, 8, 3, 3)
        assert choose("conv2d", (x,), (weight,), OPTIONS, False) is None

    def test_another_gpu_has_its_own(self, monkeypatch):
        _gpu.keep(CALL, OURS)
        monkeypatch.setattr(_gpu, "_names", {0: "nvidia-other", 1: "nvidia-h200"})
        monkeypatch.setattr(_choice_files, "read_gpu", lambda gpu: {})
        assert asked() is None and not _gpu.can_choose(0) and _gpu.can_choose(1)

    def test_shapes_given_as_sizes_count_as_images(self):
        call = CALL._replace(operation="upsample_argmax", weights=(), options=(), images=((1, 8, 4, 4),) * 2)
        _gpu.keep(call, OURS)
        images = (fake(1, 8, 4, 4),)
        assert choose("upsample_argmax", images, (), (), False, sizes=((1, 8, 4, 4),)) == TRITON
        assert choose("upsample_argmax", images, (), (), False, sizes=((1, 1, 4, 4),)) is None
        assert choose("upsample_argmax", images, (), (), False) is None

    def test_what_is_left_to_its_parts_has_no_choice_of_its_own(self):
        _gpu.keep(CALL, OURS)
        with left_to_parts("conv2d"), left_to_parts("conv2d"):
            assert asked() is None
        with left_to_parts("up_concat"):
            assert asked() == TRITON
        assert asked() == TRITON

    def test_reasons(self):
        assert _gpu.reason_not("conv2d", TRITON) is None
        assert _gpu.reason_not("conv2d", "aten") == "aten"
        _gpu.keep(CALL, Choice("aten", {"aten": 10.0, TRITON: 30.0}))
        x, weight = fake(1, 8, 16, 16), fake(4, 8, 3, 3)
        (explanation,) = segfast.explain(segfast.functional.conv2d, x, weight, None, 1, 1)
        assert str(explanation) == "conv2d: aten (aten: 10 us (triton 30))"
        (explanation,) = segfast.explain(segfast.functional.conv2d, x, weight, None, 2, 1)
        assert explanation.reason == "not measured on this GPU"


class TestCompiling:
    @pytest.fixture(autouse=True)
    def compiling(self, monkeypatch):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    def test_one_choice_for_all_sizes(self):
        assert asked() is None
        for side in (16, 64):
            _gpu.keep(CALL._replace(images=((1, 8, side, side),)), OURS)
        assert asked(16, 16) == asked(500, 500) == TRITON

    def test_where_sizes_differ_in_it_it_is_aten(self):
        _gpu.keep(CALL, OURS)
        _gpu.keep(CALL._replace(images=((1, 8, 64, 64),)), Choice("cudnn_relu", {}))
        assert asked() == asked(64, 64) == "aten"

    def test_gradients_are_told_apart(self):
        _gpu.keep(CALL._replace(gradients=True), OURS)
        assert asked() is None and asked(differentiates=True) == TRITON

    def test_nothing_is_measured(self, monkeypatch):
        monkeypatch.setattr(_gpu_tune, "measure_now", None)
        with segfast.autotune():
            assert asked() is None

    def test_sizes_that_are_open_are_asked_for_as_numbers(self, monkeypatch):
        """Dynamo hands no open size to what it takes for a constant."""
        monkeypatch.undo()
        asked_for = []

        def constant(channels):
            asked_for.append(channels)
            return channels

        constant._dynamo_marked_constant = True

        @torch.compile(backend="eager", fullgraph=True, dynamic=True)
        def f(x):
            return x * constant(_gpu._fixed(x.shape[1]))

        for channels in (16, 8):
            assert f(torch.ones(2, channels))[0, 0] == channels
        assert asked_for == [16, 8]
        torch._dynamo.reset()


def test_while_a_trace_is_taken_sizes_are_no_numbers(monkeypatch):
    _gpu.keep(CALL, OURS)
    monkeypatch.setattr(_gpu, "_tracing", lambda: object())
    assert asked() is None


class TestListening:
    def test_calls_are_collected_with_their_weights(self):
        weight = fake(4, 8, 3, 3)
        with collect() as collected:
            for _ in range(2):
                assert choose("conv2d", (fake(1, 8, 16, 16),), (weight,), OPTIONS, False) is None
        assert collected.counts == {CALL: 2}
        assert collected.by_weight() == {id(weight): [CALL, CALL]}

    def test_a_known_choice_runs_while_calls_are_collected(self):
        _gpu.keep(CALL, OURS)
        with collect() as collected:
            assert asked() == TRITON
        assert list(collected.counts) == [CALL]

    def test_what_cannot_be_measured_is_not_collected(self):
        with collect() as collected:
            asked(batch=0)
            choose("gaussian_filter", (fake(1, 8, 4, 4),), (), (), False)
        assert not collected.counts

    def test_at_first_sight_it_is_measured_once(self, monkeypatch):
        measured = []

        def measure_now(call, device):
            measured.append((call, device))
            _gpu.keep(call, OURS)
            return OURS

        monkeypatch.setattr(_gpu_tune, "measure_now", measure_now)
        monkeypatch.setattr(_gpu, "is_traced", lambda: False)
        with segfast.autotune():
            assert asked() == asked() == asked(20, 20) == TRITON  # near enough
        assert measured == [(CALL, DEVICE)]
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with segfast.autotune():
            assert asked(differentiates=True) is None
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(_gpu, "is_traced", lambda: True)
        with segfast.autotune():
            assert asked(differentiates=True) is None
        assert len(measured) == 1


class TestLeftOut:
    """Our kernels are no candidate where nothing proves them right."""

    @pytest.fixture
    def proven(self, monkeypatch):
        """The proven operations; by them our kernels are chosen."""
        proven = set()
        monkeypatch.setattr(_proofs, "proven", lambda operation, dtype, device: operation in proven)
        monkeypatch.setattr(_gpu, "is_traced", lambda: False)

        def measure_now(call, device):
            assert proven
            _gpu.keep(call, OURS)
            return OURS

        monkeypatch.setattr(_gpu_tune, "measure_now", measure_now)
        return proven

    def test_autotune_measures_anew_once_they_are_proven(self, proven):
        _gpu.keep(CALL, Choice("aten", {}, unproven=(TRITON,)))
        with segfast.autotune():
            assert asked() == asked(20, 20) == "aten"
            proven.add("conv2d_forward")
            assert asked() == TRITON
            proven.clear()
            assert asked() == asked(20, 20) == TRITON

    def test_until_then_the_choice_holds(self, proven):
        proven.add("conv2d_forward")
        _gpu.keep(CALL, Choice("cudnn_relu", {}, unproven=(TRITON,)))
        assert asked() == asked(20, 20) == "cudnn_relu"

    @pytest.mark.parametrize(
        ("verdict", "joins"), [(None, True), (True, True), (False, False)], ids=["unknown", "right", "wrong"]
    )
    def test_optimize_measures_anew_what_may_be_proven(self, verdict, joins):
        if verdict is not None:
            _proofs.write([ProofRow("conv2d_forward", "bfloat16", "3x3", 0.0, 1.0, verdict)], DEVICE)
        left_out = Choice("aten", {}, unproven=(TRITON,))
        assert _gpu_tune.may_join(CALL, left_out, DEVICE) is joins
        assert not _gpu_tune.may_join(CALL, OURS, DEVICE)

    def test_a_choice_says_so(self):
        assert str(Choice("aten", {}, unproven=(TRITON,))) == "aten (triton not proven)"
        us = {"aten": 3.0, "cudnn_relu": 2.0}
        assert str(Choice("cudnn_relu", us, unproven=(TRITON,))) == (
            "cudnn_relu: 2 us (aten 3, triton not proven)"
        )


class TestRemembered:
    def test_from_the_cache_at_the_first_question(self):
        assert not _gpu.can_choose(0)
        _choice_files.write({CALL: OURS})
        assert not _gpu.can_choose(0)  # it was asked once
        _gpu.forget()
        _choice.forget_choices()
        assert _gpu.can_choose(0) and asked() == TRITON

    def test_somebody_who_listens_makes_a_choice_possible(self):
        with collect():
            assert _gpu.can_choose(0)
        with segfast.autotune():
            assert _gpu.can_choose(-1)
        assert not _gpu.can_choose(0)

    def test_the_tiles_it_was_measured_with_run_near_its_size(self):
        problem = Problem("conv2d_forward", 8, 4, 9, 1, torch.bfloat16, 256, 256, 4, 72, "-s1d1")
        usual, tile = choose_tile(problem, DEVICE), Tile(32, 16, 16, 2, 5, 3)
        assert usual != tile
        _gpu.keep(
            CALL, OURS._replace(tiles=((problem.operation, problem.bucket, (32, 16, 16, 2, 5, 3, "")),))
        )
        assert choose_tile(problem, DEVICE) == tile
        _gpu.forget()
        assert choose_tile(problem, DEVICE) == usual


class TestMoreImages:
    def test_the_image_that_differs_most_counts(self):
        """A head enlarges the same logits to any size."""
        head = GpuCall(
            "upsample_argmax", "nvidia-h200", torch.bfloat16, "", True, ((1, 8, 16, 16), (1, 1, 32, 32)), (),
            ("bilinear", False, False), False,
        )  # fmt: skip
        _gpu.keep(head, OURS)
        logits = fake(1, 8, 16, 16)
        for side, name in ((32, TRITON), (64, TRITON), (65, None), (512, None)):
            found = choose("upsample_argmax", (logits,), (), head.options, False, sizes=((1, 1, side, side),))
            assert found == name, side

    @pytest.fixture
    def precision(self):
        conv = torch.backends.cudnn.conv
        before = conv.fp32_precision
        yield lambda name: setattr(conv, "fp32_precision", name)
        conv.fp32_precision = before

    def test_tiles_are_those_of_the_precision(self, precision):
        tiles = ("conv2d_forward", "ci8-co4-t9-g1-s1d1-float32-p8", (16, 16, 16, 4, 3, 1, ""))
        call = CALL._replace(dtype=torch.float32, precision="tf32")
        _gpu.keep(call, Choice(TRITON, {}, (tiles,)))
        found = Problem("conv2d_forward", 8, 4, 9, 1, torch.float32, 256, 256, 4, 72, "-s1d1")
        for name in ("tf32", "ieee"):
            precision(name)
            assert (choose_tile(found, DEVICE) == Tile(16, 16, 16, 4, 3)) == (name == "tf32")

    @pytest.mark.parametrize("shape", [(), (4,), (4, 8, 3), (4, 8, 3, 3, 3)])
    def test_a_weight_that_torch_refuses_is_not_looked_up(self, shape):
        _gpu.keep(CALL, OURS)
        weight = fake(*shape, layout=torch.contiguous_format)
        with collect() as found:
            assert choose("conv2d", (fake(1, 8, 16, 16),), (weight,), OPTIONS, False) is None
        assert not found.counts


def test_old_gpus_are_not_proven(monkeypatch):
    monkeypatch.setattr(_gpu_tune, "prove_family", None)
    monkeypatch.setattr(_gpu_tune, "too_old", lambda device: True)
    _gpu_tune.prove_missing([CALL], DEVICE)
