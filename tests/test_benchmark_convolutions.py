"""What the benchmarks hold convolutions to: cuDNN's fused calls, networks of them, and unseen shapes."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segfast
from benchmarks import baselines, timing
from benchmarks.cases import CASES, find
from benchmarks.fused_models import fused_with_cudnn
from benchmarks.ours import on_auto, ours
from benchmarks.problems import Problem
from benchmarks.timing import Candidate
from benchmarks.unseen import COUNT, unseen_cases, verdict
from segfast._tune_calls import FAMILIES
from segfast._tune_layers import Layer
from segfast.kernels import Config, _configs

CPU = torch.device("cpu")


@pytest.fixture
def fused_calls(monkeypatch):
    """ATen's fused calls in plain ATen; how often each was made."""
    calls = {"relu": 0, "add_relu": 0}

    def relu(x, weight, bias, *geometry):
        calls["relu"] += 1
        return F.relu(F.conv2d(x, weight, bias, *geometry))

    def add_relu(x, weight, z, alpha, bias, *geometry):
        calls["add_relu"] += 1
        return F.relu(F.conv2d(x, weight, bias, *geometry) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return calls


class _Block(nn.Module):
    """A ResNet block whose residual is convolved too, then what must stay as it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last, self.last_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.shortcut, self.shortcut_norm = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False)
        self.grouped, self.seen = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)
        self.six, self.six_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.dilated = nn.Conv2d(8, 4, 3, stride=2, padding=2, dilation=2)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)), inplace=True)
        y = self.last_norm(self.last(y))
        y += self.shortcut_norm(self.shortcut(x))
        y = F.relu(self.grouped(F.relu(y)))
        z = self.seen(y)
        y = F.relu(z) + z
        y = F.relu6(self.six_norm(self.six(y)))
        return F.relu(self.dilated(y))


def _with_statistics(network):
    """In eval, with norms that are no identities."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return network.eval()


def test_a_network_on_fused_calls_is_the_network(fused_calls):
    torch.manual_seed(0)
    network = _with_statistics(_Block())
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = network(x)
        fused, count = fused_with_cudnn(network, x)
        torch.testing.assert_close(fused(x), expected)
    # Not the grouped one, the one whose result is seen elsewhere, nor the one before relu6.
    assert fused_calls == {"relu": 2, "add_relu": 1} and count == 3
    assert not [node for node in fused.graph.nodes if node.target is torch.ops.aten.batch_norm.default]
    torch.testing.assert_close(network(x), expected)  # left as it was


@pytest.mark.parametrize(
    ("name", "relu", "add_relu"), [("unet", 18, 0), ("fcn8s_vgg16", 15, 0), ("deeplabv3_resnet50", 40, 16)]
)
def test_every_chain_of_the_networks_is_fused(fused_calls, name, relu, add_relu):
    from benchmarks.plain_models import plain_model

    network, channels = plain_model(name, small=True)
    size = 188 if name == "unet" else 65
    x = torch.randn(1, channels, size, size)
    with torch.no_grad():
        expected = network.eval()(x)
        fused, count = fused_with_cudnn(network, x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert fused_calls == {"relu": relu, "add_relu": add_relu} and count == relu + add_relu


@pytest.mark.parametrize("name", ["aspp_n8_33", "aspp_branches_n8_33"])
def test_a_pyramid_on_fused_calls_is_the_pyramid(fused_calls, name):
    problem = Problem(find(name).cpu(), CPU)
    output = problem.bind(baselines._fused_pyramid(problem))()
    assert timing.relative_error(problem.sample(output), problem.reference()) < 1e-5
    assert fused_calls["relu"] == (6 if name == "aspp_n8_33" else 4)


@pytest.mark.parametrize("name", ["resnet_layer3_expand", "unet_down1_conv2", "resnet_layer3_d2"])
def test_a_layer_on_fused_calls_is_the_layer(fused_calls, monkeypatch, name):
    problem = Problem(find(name).cpu(), CPU)
    monkeypatch.setattr(problem, "device", torch.device("cuda"))
    found = {peer.name: peer for peer in baselines._fused(problem)}
    call = "cudnn_conv_add_relu" if "add" in problem.case.epilogue else "cudnn_conv_relu"
    monkeypatch.setattr(problem, "device", CPU)
    assert timing.relative_error(problem.sample(found[call].run()), problem.reference()) < 1e-5
    assert sum(fused_calls.values()) == 1


def test_auto_is_measured_whichever_backend_is_in_force():
    seen = []
    candidate = Candidate("segfast", lambda: seen.append(segfast.get_backend()), ours=True, note="kept")
    auto = on_auto(candidate)
    assert (auto.name, auto.ours, auto.note) == ("segfast_auto", True, "kept")
    with segfast.backend("aten"):
        auto.run()
        candidate.run()
    assert seen == ["auto", "aten"]


@pytest.mark.parametrize("direction", ["forward", "backward", "train"])
def test_our_pyramid_has_the_cases_weights(direction):
    """In a forward the module's own, with gradients those that are differentiated."""
    problem = Problem(find("aspp_n8_33").tiny().replace(direction=direction), CPU)
    error = timing.relative_error(problem.sample(next(ours(problem)).run()), problem.reference())
    assert error < 1e-5


def test_unseen_shapes_are_drawn_anew_and_alike_and_in_no_table():
    cases = unseen_cases()
    assert len(cases) == COUNT == 300
    assert cases == unseen_cases() and [c.params for c in cases] == [c.params for c in unseen_cases()]
    assert [c.params for c in unseen_cases(5, seed=1)] != [c.params for c in cases[:5]]

    def key(case):
        return tuple(case[name] for name in ("ci", "co", "k", "s", "d"))

    assert len({key(case) for case in cases}) == COUNT
    assert not {key(case) for case in cases} & {key(case) for case in CASES if case.op == "conv2d"}
    tuned = [layer for layer in FAMILIES["dilated_conv2d"].layers if isinstance(layer, Layer)]
    fields = ("c_in", "c_out", "kernel", "stride", "dilation")
    assert not {key(case) for case in cases} & {tuple(getattr(t, f) for f in fields) for t in tuned}
    assert {case["k"] for case in cases} == {1, 3, 5, 7} and {case["d"] for case in cases} >= {1, 2, 12}
    assert {"silu", "relu", None} == {case.activation for case in cases}
    for case in (cases[0], next(case for case in cases if "add" in case.epilogue)):
        problem = Problem(case.tiny(), CPU)
        assert timing.relative_error(next(ours(problem)).run(), problem.bind(problem.formula)()) < 1e-5


def _row(case, candidate, us, ours=False, status="ok"):
    key = {"dtype": "bfloat16", "direction": "forward", "size": "full"}
    return {"case": case, "candidate": candidate, "ours": ours, "status": status, "gpu_us": us, **key}


def test_the_verdict_counts_what_was_slower():
    rows = []
    for case, aten, auto in (("a", 10.0, 5.0), ("b", 10.0, 10.2), ("c", 10.0, 12.5)):
        rows += [_row(case, "aten_nhwc", aten), _row(case, "aten_nchw", 3 * aten)]
        rows += [_row(case, "segfast_auto", auto, True), _row(case, "segfast", 1.0, True)]
    rows.append(_row("d", "aten_nhwc", 1.0))
    text = verdict(rows)
    assert text.startswith("3 unseen shapes: ATen's time over auto's 1.162 in the geometric mean")
    assert text.endswith("66.7 % at 0.97 or more, least 0.80")
    assert verdict([]) == "no unseen shape was measured"


def test_auto_chooses_by_what_the_run_has_found(tmp_path, monkeypatch):
    from benchmarks.tiers import Session
    from segfast.kernels import _device

    row = _configs.config_row(Config(64, 32, 32, 4, 3), 1.0, 2.0, cudnn_relu=1.5)
    content = {"architecture": "sm_90", "gpu": "card", "operations": {"conv2d_forward": {"b-p4": row}}}
    monkeypatch.setenv("SEGFAST_DRY_RUN", "1")
    session = Session("unseen", tmp_path, 1.0)
    monkeypatch.setattr(_device, "gpu_slug", lambda device: "card")
    monkeypatch.setattr("segfast.kernels.gpu_slug", lambda device: "card")
    monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "cache"))
    session.dry = False
    try:
        session.use_found_tables()  # nothing found yet: the user's stay
        assert _configs.cache_folder() == tmp_path / "cache"
        (tmp_path / "configs.json").write_text(json.dumps(content))
        session.use_found_tables()
        assert _configs.measured("conv2d_forward", "b-p5", "card", "sm_90") == row
        assert _configs.cache_folder() not in (tmp_path, tmp_path / "cache")
    finally:
        monkeypatch.undo()
        _configs.forget_tables()


def test_the_unseen_tier_measures_auto_beside_aten(tmp_path, monkeypatch):
    from benchmarks.rows import read_rows
    from benchmarks.tiers import Session, run_tier

    monkeypatch.setenv("SEGFAST_DRY_RUN", "1")
    with segfast.backend("auto"):
        run_tier(Session("unseen", tmp_path, 60.0))
    found = read_rows(tmp_path / "rows.csv")
    assert {row["candidate"] for row in found} == {"aten_nhwc", "aten_nchw", "segfast_auto"}
    assert {row["case"] for row in found} == {f"unseen_{i:03}" for i in range(3)}
    assert {row["status"] for row in found} == {"ok"}
