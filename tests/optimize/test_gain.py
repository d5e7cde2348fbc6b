"""Questions of `optimize` to a GPU or a CPU, and how it says what it gained; without a GPU."""

import copy
import math
import types

import pytest
import torch
from torch import nn

from segfast._optimize import gain as gains
from segfast._optimize import measure
from segfast._optimize.gain import Gain
from segfast.ops import _gpu_tune
from segfast.ops._choice import Choice, choices
from segfast.ops._gpu_call import ALL, FEW
from tests.ops.test_choice import CONV2D
from tests.ops.test_gpu import CALL

GPU = torch.device("cuda", 0)


class TestGain:
    def test_on_a_gpu(self):
        gain = Gain(3, 2, "as given", 4, True, gpu="NVIDIA H200")
        assert str(gain) == "1.50 times as fast on NVIDIA H200: 3.0 ms before, as given, 2.0 ms now."

    def test_of_a_training_step(self):
        gain = Gain(3, 2, "channels_last", 4, True, gpu="NVIDIA H200", train=True, unmeasured=5)
        assert str(gain) == (
            "1.50 times as fast on NVIDIA H200: a training step 3.0 ms before, channels_last, 2.0 ms now; "
            "5 calls did not fit into the budget."
        )

    def test_not_faster(self):
        gain = Gain(2, 3, "as given", 1, False, gpu="NVIDIA H200", train=True)
        assert str(gain) == (
            "Not faster on NVIDIA H200: a training step 2.0 ms before, as given, 3.0 ms optimized; "
            "left as it was."
        )

    def test_outputs_that_changed(self):
        gain = Gain(3, 2, "as given", 1, False, gpu="NVIDIA H200", error=0.5, allowed=0.1)
        assert str(gain) == "Outputs changed by 0.5 of the largest value on NVIDIA H200; left as it was."


class TestMeasuring:
    @pytest.fixture
    def asked(self, monkeypatch):
        """The calls that were to be proven and measured, and on what."""
        asked = []

        def prove_missing(calls, device, on_row, others):
            asked.append(("prove", list(calls), device, list(others)))

        def on_gpu(calls, device, *, budget_s, most, on_call):
            asked.append(("measure", list(calls), device, budget_s, most))
            return {call: Choice("aten", {}) for call in calls}

        def on_cpu(calls, *, budget_s, on_call):
            asked.append(("measure", list(calls), None, budget_s))
            return {call: Choice("aten", {}) for call in calls}

        monkeypatch.setattr(_gpu_tune, "prove_missing", prove_missing)
        monkeypatch.setattr(_gpu_tune, "measure_and_keep", on_gpu)
        monkeypatch.setattr(measure, "measure_and_keep", on_cpu)
        return asked

    def test_calls_on_a_gpu_are_proven_then_measured(self, asked):
        unproven = {("dense_crf", torch.float32)}
        measure._prove([CALL], unproven, GPU, measure._Bar())
        assert measure.measure([CALL], GPU, 7.0) == 1
        assert asked == [("prove", [CALL], GPU, list(unproven)), ("measure", [CALL], GPU, 7.0, FEW)]

    def test_thoroughly_all_tiles_are_tried(self, asked):
        with measure.thoroughly():
            measure.measure([CALL], GPU, 7.0)
        measure.measure([CALL], GPU, 7.0)
        assert [most for kind, *_, most in asked if kind == "measure"] == [ALL, FEW]

    def test_what_needs_proof_alone_is_proven(self, asked):
        measure._prove([], [("dense_crf", torch.float16)], GPU, measure._Bar())
        (first,) = asked
        assert first == ("prove", [], GPU, [("dense_crf", torch.float16)])

    def test_on_a_cpu_nothing_is_proven(self, asked):
        assert measure._prove([CONV2D], (), torch.device("cpu"), measure._Bar()) == 0.0
        assert measure.measure([CONV2D], torch.device("cpu"), 7.0) == 1
        assert asked == [("measure", [CONV2D], None, 7.0)]


class Made:
    """Calls that were collected: one on a GPU."""

    counts, unproven = {CALL: 1}, frozenset()

    def by_weight(self):
        return {}


@pytest.mark.parametrize("joins", [True, False])
def test_a_choice_made_without_our_kernels_is_made_anew(joins, monkeypatch):
    """Once, where those may be proven now."""
    done = []
    monkeypatch.setattr(measure, "_calls", lambda *args, **kwargs: Made())
    monkeypatch.setattr(measure, "device_of", lambda *args: GPU)
    monkeypatch.setattr(measure, "_prove", lambda calls, *args: done.append("prove") or 0.0)
    monkeypatch.setattr(measure, "measure", lambda calls, *args: done.append("measure") or len(calls))
    monkeypatch.setattr(_gpu_tune, "may_join", lambda call, choice, device: bool(choice.unproven) and joins)
    net, inputs = nn.Conv2d(2, 3, 3), (torch.randn(1, 2, 5, 5),)
    choices().add(CALL, Choice("aten", {}, unproven=("triton",)))
    assert measure.choose(net, inputs, 7.0, False) == 0
    assert done == ["prove", "measure"] * joins
    choices().add(CALL, Choice("aten", {}))
    assert measure.choose(net, inputs, 7.0, False) == 0
    assert done == ["prove", "measure"] * joins


class TestRuns:
    def net(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.0))
        net[0].bias.requires_grad_(False)
        return net

    def test_a_step_is_a_forward_and_a_backward_pass(self):
        net, x = self.net(), torch.randn(2, 2, 5, 5)
        gradients = gains._run(net, (x,), True, True)()
        trained = [p for p in net.parameters() if p.requires_grad]
        expected = torch.autograd.grad(net(x).mean(), trained)
        torch.testing.assert_close(list(gradients), list(expected))
        assert all(p.grad is None for p in net.parameters())

    def test_a_call_is_a_forward_pass_without_gradients(self):
        net, x = self.net(), torch.randn(2, 2, 5, 5)
        assert not gains._run(net, (x,), True, False)().requires_grad

    @pytest.mark.parametrize(
        ("dtype", "precision", "device", "allowed"),
        [
            (None, "ieee", "cuda", math.sqrt(torch.finfo(torch.float32).eps)),
            (None, "tf32", "cuda", math.sqrt(2.0**-11)),
            (None, "tf32", "cpu", math.sqrt(torch.finfo(torch.float32).eps)),
            (torch.bfloat16, "ieee", "cuda", 0.25),
        ],
    )
    def test_outputs_may_change_by_rounding(self, dtype, precision, device, allowed):
        conv = torch.backends.cudnn.conv
        before, conv.fp32_precision = conv.fp32_precision, precision
        try:
            assert gains._most_changed(self.net(), dtype, torch.device(device)) == allowed
        finally:
            conv.fp32_precision = before


@pytest.mark.measures
@pytest.mark.parametrize(("after", "kept"), [(0.98, True), (0.995, False), (1.0, False)])
def test_a_model_is_kept_where_it_is_faster_by_more_than_noise(after, kept, monkeypatch):
    ms = {"as given": 1.0, "channels_last": 1.5, "after": after}
    monkeypatch.setattr(gains, "_milliseconds", lambda *args: dict(ms))
    net, x = nn.Sequential(nn.Conv2d(2, 3, 3)).eval(), torch.randn(1, 2, 5, 5)
    gain = gains.gain(copy.deepcopy(net), net, (x,), None)
    assert gain.kept == kept and gain.layout == "as given"


def test_what_proving_takes_is_not_measurings(monkeypatch):
    """A proof is made once on a GPU, and may take longer than the budget."""
    seconds = []
    now = [0.0]
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(measure, "_calls", lambda *args, **kwargs: Made())

    def prove(*args):
        now[0] += 100.0
        return 100.0

    monkeypatch.setattr(measure, "_prove", prove)
    monkeypatch.setattr(
        measure, "measure", lambda calls, device, budget_s, on_call: seconds.append(budget_s) or 1
    )
    net = nn.Conv2d(2, 3, 3)
    assert measure.choose(net, (torch.randn(1, 2, 5, 5),), 7.0, False) == 0
    assert seconds == [7.0]
