"""Choices on a device are proven, measured, remembered and looked up, with a stand-in clock."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import segfast
from segfast import functional as F
from segfast._optimize import gain as gains
from segfast._optimize import measure
from segfast.kernels import KernelError, record_launches
from segfast.ops import (
    FAMILIES,
    _choice,
    _gpu,
    _gpu_measure,
    _gpu_tune,
    _measure_apart,
    _proofs,
    _prove_apart,
)
from segfast.ops._choice import collect
from segfast.ops._choice_files import gpu_machine, path
from segfast.ops._gpu_call import GPU_OPERATIONS, GpuCall
from segfast.ops._prove import ProofRow
from segfast.ops.conv_transpose2d import CONV_TRANSPOSE2D

from . import clock
from .conftest import SIMULATED

pytestmark = pytest.mark.device
DTYPE = torch.float16


def begin_anew():
    """As another process begins: nothing is remembered but what is on disk."""
    _choice.forget_choices()
    _gpu.forget()
    _proofs.forget()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, one process, and the clock by which our kernels win."""
    monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_gpu_tune, "APART", False)
    monkeypatch.setattr(_gpu_measure, "interleave", clock.ours_first)
    begin_anew()
    yield tmp_path
    begin_anew()


def prove(device, passed=True, families=FAMILIES, dtype=DTYPE):
    """Note that everything was proven, or that nothing is right."""
    name = str(dtype).removeprefix("torch.")
    for family in families:
        operations = importlib.import_module(f"segfast.ops.{family}").OPERATIONS
        rows = [ProofRow(operation, name, "noted", 0.0, 1.0, passed) for operation in operations]
        _proofs.write(rows, device)


class Draw:
    def __init__(self, device, gradients):
        self.device, self.gradients = device, gradients

    def __call__(self, *shape):
        t = torch.randn(shape, dtype=DTYPE, device=self.device)
        if len(shape) == 4:
            t = t.contiguous(memory_format=torch.channels_last)
        return t.requires_grad_(self.gradients)

    def logits(self):
        return torch.randn(1, 5, 6, 7, dtype=DTYPE, device=self.device).requires_grad_(self.gradients)

    def places(self):
        return torch.zeros(1, 4, 7, 9, dtype=torch.uint8, device=self.device)

    def labels(self):
        return torch.randint(5, (1, 12, 14), device=self.device)


CALLS = {
    "conv2d": lambda d: F.conv2d(d(1, 16, 7, 9), d(24, 16, 3, 3), d(24), padding=1, activation="relu"),
    "conv2d_of_images": lambda d: F.conv2d([d(1, 16, 7, 9), d(1, 8, 7, 9)], d(8, 24, 3, 3), padding=1),
    "parallel_conv2d": lambda d: F.parallel_conv2d(d(1, 8, 7, 9), [d(8, 8, 1, 1), d(8, 8, 3, 3)], [1, 3]),
    "conv_transpose2d": lambda d: F.conv_transpose2d(d(1, 16, 5, 7), d(16, 8, 2, 2), d(8), stride=2),
    "up_concat": lambda d: F.up_concat(d(1, 16, 5, 7), d(1, 8, 11, 14), d(16, 8, 2, 2), d(8)),
    "depthwise_conv2d": lambda d: F.depthwise_conv2d(d(1, 16, 7, 9), d(16, 1, 3, 3), padding=1),
    "separable_conv2d": lambda d: F.separable_conv2d(
        d(1, 16, 7, 9), d(16, 1, 3, 3), d(8, 16, 1, 1), padding=1
    ),
    "packed_max_pool2d": lambda d: F.packed_max_pool2d(d(1, 16, 7, 9), ceil_mode=True),
    "packed_max_unpool2d": lambda d: F.packed_max_unpool2d(d(1, 16, 7, 9), d.places(), (13, 18)),
    "upsample_cross_entropy": lambda d: F.upsample_cross_entropy(d.logits(), d.labels()),
    "upsample_argmax": lambda d: F.upsample_argmax(d.logits(), (12, 14), return_confidence=True),
    "upsample_dice": lambda d: F.upsample_dice(d.logits(), d.labels()),
}


def collected(device, name, gradients=False):
    """The calls of `name` and of the operations that it consists of."""
    with torch.set_grad_enabled(gradients), collect() as found:
        CALLS[name](Draw(device, gradients))
    calls = [call for call in found.counts if isinstance(call, GpuCall)]
    assert name in {call.operation for call in calls}
    return calls


def measured(device, name, gradients=False, most=2):
    return _gpu_tune.measure_and_keep(collected(device, name, gradients), device, most=most)


def test_every_operation_has_a_call():
    assert set(CALLS) == set(GPU_OPERATIONS)


@pytest.mark.parametrize("gradients", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CALLS)
def test_our_kernels_are_found_right_and_chosen(name, gradients, device):
    if gradients and name in ("parallel_conv2d", "upsample_argmax"):
        pytest.skip("no kernel of its own has a gradient")
    prove(device)
    found = measured(device, name, gradients)
    (choice,) = [choice for call, choice in found.items() if call.operation == name]
    assert choice.name == "triton"
    assert {"aten", "triton"} <= set(choice.us)
    with torch.set_grad_enabled(gradients), _choice._backend.noting() as explanations:
        CALLS[name](Draw(device, gradients))
    assert [explanation.backend for explanation in explanations] == ["triton"], explanations
    # And where nobody asks for reasons, which is another way through the code.
    with torch.set_grad_enabled(gradients), record_launches() as launches:
        CALLS[name](Draw(device, gradients))
    assert launches


def test_nothing_measured_is_aten(device):
    assert [d.backend for d in segfast.explain(CALLS["conv2d"], Draw(device, False))] == ["aten"]


def test_a_choice_is_read_from_disk_with_its_tiles(device, monkeypatch):
    prove(device)
    ((call, choice),) = measured(device, "conv_transpose2d").items()
    assert choice.tiles
    begin_anew()
    monkeypatch.setattr(_gpu_measure, "interleave", None)  # nothing is timed again
    assert _gpu.can_choose(-1)
    assert _choice.choices().find(call) == choice
    larger = call._replace(
        images=tuple((1, *shape[1:2], 2 * shape[2], 2 * shape[3]) for shape in call.images)
    )
    assert _choice.choices().find(larger) == choice
    assert _choice.choices().find(call._replace(gradients=True)) is None
    content = json.loads(path(gpu_machine(call.gpu)).read_text())
    assert [part["machine"]["gpu"] for part in content] == [call.gpu]


def test_the_fastest_is_chosen(device, monkeypatch):
    monkeypatch.setattr(_gpu_measure, "interleave", clock.aten_first)
    prove(device)
    (choice,) = measured(device, "conv_transpose2d").values()
    assert choice.name == "aten" and "triton" in choice.us
    assert [d.backend for d in segfast.explain(CALLS["conv_transpose2d"], Draw(device, False))] == ["aten"]


@pytest.mark.parametrize("known", ["disproven", "unknown"])
def test_what_is_not_proven_is_no_candidate(known, device):
    if known == "disproven":
        prove(device, passed=False)
    (choice,) = measured(device, "conv_transpose2d").values()
    assert choice == ("aten", {}, (), ("triton",))


def test_what_is_proven_later_is_measured_then(network, monkeypatch):
    monkeypatch.setattr(gains, "interleave", lambda runs, *a, **k: clock.timings(runs, "after"))
    net, x = network
    prove(x.device, passed=False)
    ran = []
    for passed in (False, True):
        prove(x.device, passed)
        begin_anew()
        ran.append({d.backend for d in segfast.explain(segfast.optimize(net, x), x)})
    assert ran == [{"aten"}, {"triton"}]


def test_a_wrong_kernel_is_refused(device, monkeypatch):
    kernels = CONV_TRANSPOSE2D.operator._kernels

    def wrong(*args):
        y = kernels(*args)
        y[..., -1, -1] += 0.5  # one pixel
        return y

    monkeypatch.setattr(CONV_TRANSPOSE2D.operator, "_kernels", wrong)
    prove(device)
    (choice,) = measured(device, "conv_transpose2d").values()
    assert choice == ("aten", {}, (), ())


def test_a_kernel_that_fails_is_no_candidate_and_falls_back_later(device, monkeypatch):
    def fails(*args):
        raise KernelError("made to fail")

    prove(device)
    kernels = CONV_TRANSPOSE2D.operator._kernels
    monkeypatch.setattr(CONV_TRANSPOSE2D.operator, "_kernels", fails)
    (choice,) = measured(device, "conv_transpose2d").values()
    assert choice == ("aten", {}, (), ())
    monkeypatch.setattr(CONV_TRANSPOSE2D.operator, "_kernels", kernels)
    _choice.forget_choices()
    path(gpu_machine(_gpu.gpu_name(-1))).unlink()
    begin_anew()
    (choice,) = measured(device, "conv_transpose2d").values()
    assert choice.name == "triton"
    monkeypatch.setattr(CONV_TRANSPOSE2D.operator, "_kernels", fails)
    monkeypatch.setattr(_choice._backend, "FAILED", {})
    monkeypatch.setattr("segfast.ops._fallback.FAILED", {})
    draw = Draw(device, False)
    tensors = draw(1, 16, 5, 7), draw(16, 8, 2, 2), draw(8)
    with pytest.warns(RuntimeWarning, match="made to fail"):
        y = F.conv_transpose2d(*tensors, stride=2)
    expected = torch.nn.functional.conv_transpose2d(*tensors, stride=2)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_autotune_measures_at_first_sight(device):
    prove(device)
    with segfast.autotune():
        F.conv_transpose2d(
            *(Draw(device, False)(*shape) for shape in ((1, 16, 5, 7), (16, 8, 2, 2))), stride=2
        )
    (choice,) = [c for call, c in _choice.choices().measured.items() if isinstance(call, GpuCall)]
    assert choice.name == "triton"


def test_a_family_is_proven_before_it_is_measured(device):
    calls = collected(device, "conv_transpose2d")
    rows = []
    _gpu_tune.prove_missing(calls, device, rows.append)
    assert rows and all(row.passed for row in rows)
    assert {(row.operation.rpartition("2d")[0], row.dtype) for row in rows} == {("conv_transpose", "float16")}
    again = []
    begin_anew()
    _gpu_tune.prove_missing(calls, device, again.append)
    assert not again  # it is remembered


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        )
        self.up = torch.nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        return self.up(self.down(x))


@pytest.fixture
def network(device, monkeypatch):
    monkeypatch.setattr(measure, "MEASURES", True)
    prove(device)
    torch.manual_seed(0)
    net = Net().eval().to(device, DTYPE)
    return net, torch.randn(1, 3, 9, 7, dtype=DTYPE, device=device)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_optimize_measures_a_model(train, network, device, monkeypatch):
    net, x = network
    monkeypatch.setattr(gains, "interleave", lambda runs, *a, **k: clock.timings(runs, "after"))
    with torch.no_grad():
        expected = net(x)
    fast = segfast.optimize(net, x, train=train)
    report = segfast.report(fast)
    assert report.gain.kept and report.gain.gpu and report.gain.train == train
    assert "triton: 1 us (aten 2)" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected, rtol=2e-2, atol=2e-2)
    assert {d.backend for d in segfast.explain(fast, x)} == {"triton"}
    operations = {(c.operation, c.gradients) for c in _choice.choices().measured if isinstance(c, GpuCall)}
    assert {("conv2d", False), ("conv_transpose2d", False)} <= operations
    assert (("conv_transpose2d", True) in operations) == train
    monkeypatch.setattr(_gpu_measure, "interleave", None)  # the second time nothing is measured
    again = segfast.optimize(net, x, train=train)
    assert segfast.report(again).gain.kept


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_model_that_is_not_faster_is_left_alone(layout, network, monkeypatch):
    net, x = network
    net = net.to(memory_format=layout)
    strides = net.up.weight.stride()
    monkeypatch.setattr(gains, "interleave", lambda runs, *a, **k: clock.timings(runs, "as given"))
    left = segfast.optimize(net, x)
    assert not segfast.report(left).gain.kept
    assert type(left.up) is torch.nn.ConvTranspose2d and left.up.weight.stride() == strides


@pytest.mark.skipif(not SIMULATED, reason="a GPU needs no stand-in for it")
def test_in_processes_of_their_own(device, monkeypatch, own_cache):
    script = Path(__file__).with_name("apart.py")
    for module in (_prove_apart, _measure_apart):
        command = (sys.executable, "-m", "ttsem.sanitize", str(script), module.__name__)
        monkeypatch.setattr(module, "COMMAND", command)
    monkeypatch.setattr(_gpu_tune, "APART", True)
    monkeypatch.setattr(_measure_apart, "compile_apart", lambda *args: None)  # there is no machine code
    monkeypatch.setattr(_prove_apart, "compile_proofs", lambda *args: None)
    prove(device)
    (choice,) = measured(device, "conv_transpose2d").values()
    assert choice.name == "triton" and choice.tiles


def test_a_model_computes_in_bfloat16(network, device, monkeypatch):
    prove(device, dtype=torch.bfloat16)
    net, x = network[0].float(), network[1].float()
    monkeypatch.setattr(gains, "interleave", lambda runs, *a, **k: clock.timings(runs, "after"))
    with torch.no_grad():
        expected = net(x)
    fast = segfast.optimize(net, x, dtype=torch.bfloat16)
    found = segfast.report(fast).gain
    assert found.kept and found.dtype == "bfloat16" and 0 < found.error < found.allowed
    with torch.no_grad():
        y = fast(x)
    assert y.dtype == torch.float32 and fast.up.weight.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-2)
    assert {call.dtype for call in _choice.choices().measured if isinstance(call, GpuCall)} == {
        torch.bfloat16
    }


def test_a_crf_is_proven_and_not_timed(device, monkeypatch):
    proven = []
    monkeypatch.setattr(measure, "MEASURES", True)
    monkeypatch.setattr(gains, "interleave", lambda runs, *a, **k: clock.timings(runs, "after"))

    def noted(family, device, dtypes, on_row, apart):
        proven.append((family, *dtypes))
        prove(device, families=(family,), dtype=torch.float32)

    monkeypatch.setattr(_gpu_tune, "prove_family", noted)
    crf = segfast.nn.DenseCRF(3, iterations=1, eval_iterations=1, theta_alpha=6.0, theta_beta=30.0).eval()
    inputs = torch.randn(1, 3, 9, 7, device=device), 255 * torch.rand(1, 3, 9, 7, device=device)
    fast = segfast.optimize(crf.to(device), inputs)
    assert proven == [("dense_crf", torch.float32)]
    assert {d.backend for d in segfast.explain(fast, *inputs)} == {"triton"}
    proven.clear()
    segfast.optimize(fast, inputs)
    assert not proven


def test_parts_run_what_was_chosen_for_them(device, monkeypatch):
    monkeypatch.setattr(_gpu_measure, "interleave", lambda runs, *a, **k: clock.timings(runs, "parts"))
    prove(device)
    found = {call.operation: choice.name for call, choice in measured(device, "separable_conv2d").items()}
    assert found["separable_conv2d"] == "parts"
    explanations = segfast.explain(CALLS["separable_conv2d"], Draw(device, False))
    assert [d.operation for d in explanations] == ["separable_conv2d", "depthwise_conv2d", "conv2d"]


def test_a_backend_asked_for_by_name_is_not_measured_against(network, monkeypatch):
    net, x = network
    monkeypatch.setattr(_gpu_measure, "interleave", None)
    monkeypatch.setattr(gains, "interleave", None)
    with segfast.backend("triton"):
        fast = segfast.optimize(net, x)
        assert segfast.report(fast).gain is None
        assert {d.backend for d in segfast.explain(fast, x)} == {"triton"}
