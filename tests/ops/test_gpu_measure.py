"""Candidates tried for a call on a GPU, which results count as right, and the choice by the times."""

import dataclasses
import math
from types import MappingProxyType

import pytest
import torch

from segfast.kernels import Tile, _tiles, candidates, choose_tile, keep_tile
from segfast.kernels._tiles import Problem
from segfast.ops import _gpu_measure, _proofs
from segfast.ops._choice import ATEN, Choice
from segfast.ops._gpu import PARTS, TRITON
from segfast.ops._gpu_call import FEW, Bound, Draw
from segfast.ops._gpu_measure import Variant, unproven, variants
from tests.ops.test_gpu import CALL

DEVICE = torch.device("cuda", 0)
FORWARD = Problem("conv2d_forward", 64, 64, 9, 1, torch.bfloat16, 4096, 4096, 64, 576, "-s1d1")
GRADIENT = dataclasses.replace(FORWARD, operation="conv2d_grad_weight")
FIRST, SECOND, THIRD = (Tile(16 << i, 16, 16, 4, 2) for i in range(3))


@pytest.fixture(autouse=True)
def gpu(pretended_gpu):
    return pretended_gpu


def tile_of(variant, problem):
    with variant.in_force({}):
        return choose_tile(problem, DEVICE)


def usually(*problems):
    return {problem: choose_tile(problem, DEVICE) for problem in problems}


class TestVariants:
    @pytest.fixture(autouse=True)
    def ranked(self, monkeypatch):
        """Six tiles of each kernel."""
        for operation in (FORWARD.operation, GRADIENT.operation):
            found = [Tile(16, 16, 16, 4, stages) for stages in range(2, 8)]
            monkeypatch.setitem(_tiles._CANDIDATES, operation, lambda problem, arch, found=found: found)

    def test_the_usual_one_and_a_few_others_of_each_kernel_one_at_a_time(self):
        found = variants(usually(FORWARD, GRADIENT), DEVICE, FEW)
        usual = list(usually(FORWARD, GRADIENT).values())
        pairs = [(tile_of(v, FORWARD), tile_of(v, GRADIENT)) for v in found]
        assert pairs[0] == tuple(usual)
        assert len(set(pairs)) == len(pairs) == 1 + 2 * (FEW - 1)
        assert all((a == usual[0]) + (b == usual[1]) == 1 for a, b in pairs[1:])
        ranked = candidates(FORWARD, "sm_90", 232448)
        assert [a for a, _ in pairs[1:FEW]] == [c for c in ranked if c != usual[0]][: FEW - 1]

    def test_all_of_them(self):
        ranked = candidates(FORWARD, "sm_90", 232448)
        assert {tile_of(v, FORWARD) for v in variants(usually(FORWARD), DEVICE, 1000)} == set(ranked)
        assert len(variants(usually(FORWARD), DEVICE, 1000)) == len(ranked)

    def test_a_call_that_our_kernels_do_not_serve_has_none(self):
        assert variants(None, DEVICE, FEW) == []

    def test_what_has_no_tiles_to_choose_is_tried_as_it_is(self):
        assert variants({}, DEVICE, FEW) == [Variant()]

    def test_the_usual_one_is_that_which_is_in_force(self):
        ranked = candidates(FORWARD, "sm_90", 232448)
        keep_tile("nvidia-h200", FORWARD.operation, FORWARD.bucket, ranked[2])
        found = variants(usually(FORWARD), DEVICE, FEW)
        assert [tile_of(v, FORWARD) for v in found] == [ranked[2], ranked[0], ranked[1], ranked[3]]

    def test_one_alone(self):
        assert variants(usually(FORWARD, GRADIENT), DEVICE, 1) == [Variant()]


FOUND = {
    f"{TRITON} 0": Variant(),
    f"{TRITON} 1": Variant((("conv2d_forward", FIRST),)),
    f"{TRITON} 2": Variant((("conv2d_forward", SECOND),)),
    f"{TRITON} 3": Variant((("conv2d_grad_weight", THIRD),)),
}


class TestChoice:
    PROBLEMS = MappingProxyType({FORWARD: Tile(128, 16, 16, 4, 2), GRADIENT: Tile(256, 16, 16, 4, 2)})

    def best(self, *us):
        return _gpu_measure._best_of_each(self.PROBLEMS, FOUND, dict(zip(FOUND, us, strict=True)))

    def test_the_best_of_each_kernel_is_put_together(self):
        expected = Variant((("conv2d_forward", SECOND), ("conv2d_grad_weight", THIRD)))
        assert self.best(9, 8, 7, 6) == expected
        assert self.best(9, 7, 8, 6).tiles[0] == ("conv2d_forward", FIRST)

    @pytest.mark.parametrize("us", [(9, 8, 7, 10), (9, 10, 11, 6), (5, 6, 7, 8)])
    def test_not_where_that_was_timed_already(self, us):
        assert self.best(*us) is None

    def test_a_usual_one_that_is_wrong_beats_nothing(self):
        found = {name: v for name, v in FOUND.items() if name != f"{TRITON} 0"}
        us = dict(zip(found, (8.0, 7.0, 6.0), strict=True))
        assert len(_gpu_measure._best_of_each(self.PROBLEMS, found, us).tiles) == 2

    def test_the_fastest_of_our_kernels_stands_for_them(self):
        us = {ATEN: 10.0, "cudnn_relu": 9.0, f"{TRITON} 0": 8.5, f"{TRITON} 2": 8.0}
        found = {name: FOUND[name] for name in us if name in FOUND}
        choice = _gpu_measure._choice(us, found, self.PROBLEMS)
        assert choice[:2] == (TRITON, {ATEN: 10.0, "cudnn_relu": 9.0, TRITON: 8.0})
        # Those of the other kernel are kept too, which another call may choose otherwise.
        assert [name for name, *_ in choice.tiles] == ["conv2d_forward", "conv2d_grad_weight"]
        assert {bucket for _, bucket, _ in choice.tiles} == {FORWARD.bucket}
        assert [Tile(*fields) for *_, fields in choice.tiles] == [SECOND, self.PROBLEMS[GRADIENT]]

    def test_what_is_faster_than_our_kernels_is_chosen(self):
        us = {ATEN: 7.0, PARTS: 6.0, f"{TRITON} 0": 8.0}
        choice = _gpu_measure._choice(us, {f"{TRITON} 0": Variant()}, {})
        assert choice == Choice(PARTS, {ATEN: 7.0, PARTS: 6.0, TRITON: 8.0})
        assert _gpu_measure._choice({ATEN: 7.0, PARTS: 7.5}, {}, {}) == Choice(ATEN, {ATEN: 7.0, PARTS: 7.5})


class TestRight:
    REFERENCE = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)

    def is_close(self, difference, dtype=torch.bfloat16, aten_error=0.0, depth=1, gradient=False):
        # Of the largest value, 4; exact in every dtype where it is a power of two.
        result = (self.REFERENCE + torch.tensor([difference, 0, 0], dtype=torch.float64)).to(dtype)
        allowed = _gpu_measure._allowed(result, aten_error, depth, gradient)
        return _gpu_measure._error(result, self.REFERENCE, gradient) <= allowed

    def test_within_two_roundings_of_the_largest_value(self):
        assert self.is_close(0.0) and self.is_close(2**-5) and not self.is_close(2**-3)
        assert self.is_close(2**-8, torch.float16) and not self.is_close(2**-6, torch.float16)

    def test_twice_atens_own_error_is_allowed(self):
        assert not self.is_close(2**-2) and self.is_close(2**-2, aten_error=2**-5)
        assert not self.is_close(2**-2, aten_error=2**-7)

    def test_a_gradient_is_judged_as_a_whole(self, precision):
        precision("ieee")
        assert self.is_close(2**-9, torch.float32, gradient=True) and not self.is_close(2**-9, torch.float32)
        assert not self.is_close(2**-6, torch.float32, gradient=True)
        reference = torch.ones(10_000, dtype=torch.float64)
        one_is_missing = reference.clone()
        one_is_missing[5] = 0
        assert _gpu_measure._error(one_is_missing.float(), reference, True) == pytest.approx(0.01)
        assert _gpu_measure._error(one_is_missing.float(), reference) == 1

    @pytest.fixture
    def precision(self):
        conv = torch.backends.cudnn.conv
        before = conv.fp32_precision
        yield lambda name: setattr(conv, "fp32_precision", name)
        conv.fp32_precision = before

    def test_sums_in_fp32_may_be_in_another_order(self, precision):
        precision("ieee")
        assert not self.is_close(2**-15, torch.float32, depth=1)
        assert self.is_close(2**-15, torch.float32, depth=2**12)

    def test_tf32_only_where_it_is_asked_for(self, precision):
        for name, right in (("ieee", False), ("tf32", True)):
            precision(name)
            assert self.is_close(2**-7, torch.float32) is right
            assert not self.is_close(2**-4, torch.float32)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_is_wrong(self, value):
        assert not self.is_close(value)

    def test_nothing_is_divided_by_a_reference_of_zeros(self):
        zeros = torch.zeros(3, dtype=torch.float64)
        assert (
            _gpu_measure._error(zeros.float(), zeros) == _gpu_measure._error(zeros.float(), zeros, True) == 0
        )
        assert _gpu_measure._error(zeros.float() + 0.5, zeros) == 0.5

    @pytest.mark.parametrize(("differing", "right"), [(5, True), (50, False)])
    def test_labels_may_differ_where_classes_are_as_good_as_equal(self, differing, right):
        labels = torch.zeros(10_000, dtype=torch.int64)
        other = labels.clone()
        other[:differing] = 1
        error = _gpu_measure._error(other, labels)
        assert (error <= _gpu_measure._allowed(other, 0.0, 1, False)) is right
        assert error <= _gpu_measure._allowed(other, 2e-3, 1, False)


class TestProofs:
    def test_our_kernels_are_tried_where_all_that_the_call_runs_is_proven(self, monkeypatch):
        proven = {("conv2d_forward", torch.bfloat16)}
        monkeypatch.setattr(_proofs, "proven", lambda operation, dtype, device: (operation, dtype) in proven)
        assert unproven(CALL, DEVICE) == ()
        assert unproven(CALL._replace(gradients=True), DEVICE) == (TRITON,)
        assert unproven(CALL._replace(dtype=torch.float16), DEVICE) == (TRITON,)
        proven |= {(f"conv2d_grad_{of}", torch.bfloat16) for of in ("input", "weight")}
        assert unproven(CALL._replace(gradients=True), DEVICE) == ()

    def test_what_does_not_run_on_an_old_gpu_lacks_no_proof(self, monkeypatch):
        monkeypatch.setattr(_gpu_measure, "too_old", lambda device: True)
        assert unproven(CALL, DEVICE) == ()


class TestRunning:
    def bound(self):
        def function(x, labels):
            return x.square(), labels

        x = torch.tensor([1.0, 2.0, 3.0])
        other = torch.arange(3)
        return Bound((x, other), function, 1, {"other": lambda x, labels: (x + 1, labels)})

    def test_outputs_then_gradients(self):
        y, labels, grad = _gpu_measure._runner(CALL._replace(gradients=True), self.bound(), ATEN)()
        assert torch.equal(y, torch.tensor([1.0, 4.0, 9.0])) and not y.requires_grad
        assert torch.equal(labels, torch.arange(3))
        assert torch.equal(grad.abs(), torch.tensor([2.0, 4.0, 6.0]))
        assert grad.min() < 0 < grad.max()  # a gradient of ones would not see what is added up

    def test_without_gradients(self):
        y, _ = _gpu_measure._runner(CALL, self.bound(), ATEN)()
        assert not y.requires_grad
        y, _ = _gpu_measure._runner(CALL, self.bound(), "other")()
        assert torch.equal(y, torch.tensor([2.0, 3.0, 4.0]))

    def test_each_under_the_backend_that_it_is_of(self):
        from segfast.ops import _gpu
        from segfast.ops._backend import get_backend

        def function(x, labels):
            seen.append((get_backend(), CALL.operation in _gpu._left_to_parts))
            return x

        seen = []
        for name in (ATEN, TRITON, PARTS, "other"):
            _gpu_measure._runner(CALL, self.bound()._replace(function=function, candidates={}), name)()
        assert seen == [("aten", False), ("triton", False), ("auto", True), ("auto", False)]

    def test_tensors_are_the_calls_and_the_same_each_time(self):
        state = torch.get_rng_state()
        draw = Draw(CALL, torch.device("cpu"))
        first, labels = draw(2, 8, 4, 4), draw.labels(3, 2, 4)
        assert first.dtype == CALL.dtype and first.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64 and set(labels.unique().tolist()) <= {0, 1, 2}
        assert torch.equal(Draw(CALL, torch.device("cpu"))(2, 8, 4, 4), first)
        other = Draw(CALL._replace(channels_last=False, dtype=torch.float16), torch.device("cpu"))(2, 8, 4, 4)
        assert other.dtype == torch.float16 and other.is_contiguous()
        assert torch.equal(torch.get_rng_state(), state)
        assert [t.shape for t in draw.given((True, False, True), ((2,), (3,), (4,)))] == [(2,), (4,)]
