"""`optimize` chooses by measuring on the machine, keeps what is faster and leaves alone what is not."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import segfast
from segfast._optimize import gain as gains
from segfast._optimize.gain import Gain
from segfast._timing import Timing
from segfast.nn._fused import sequence
from segfast.nn._rules import own_class
from segfast.ops import _choice, _measure
from segfast.ops._call import CANDIDATES
from segfast.ops._choice import ATEN, Choice, choices
from tests.optimize.measured_network import image as _image
from tests.optimize.measured_network import net as _net
from tests.optimize.measured_network import ran as _ran

pytestmark = pytest.mark.measures


def test_every_convolution_runs_what_won(wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 1)
    net, x = _net(), _image()
    fast = segfast.optimize(net, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
        assert _ran(fast, x) == ["onednn"] * 4
        assert not any(name == "onednn" for name in _ran(net, x))
    gain = segfast.report(fast).gain
    assert gain == Gain(
        2, 1, "channels_last", torch.get_num_threads(), True, error=gain.error, allowed=gain.allowed
    )
    assert gain.error < 1e-5
    assert "2.00 times as fast" in str(segfast.report(fast))
    assert "onednn: 1000 us (aten 2000" in str(segfast.report(fast))


def test_where_aten_wins_plain_layers_stay_torchs(wins, model_takes):
    wins(ATEN)
    model_takes(3, 2, 1)
    fast = segfast.optimize(_net(), _image())
    assert type(fast.conv) is own_class(fast.classifier) is nn.Conv2d
    wins("onednn")
    _choice.forget_choices()
    for call in list(choices().measured):
        choices().add(call, Choice("onednn", {}))
    again = segfast.optimize(_net(), _image())
    assert type(again.conv) is segfast.nn.Conv2d
    assert segfast.report(again).replaced == ["conv", "up", "classifier"]
    assert type(segfast.restore(again).conv) is nn.Conv2d


class _Pairs(nn.Module):
    """Convolutions with an activation and without a norm, called one by one and by a Sequential."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.act = nn.Conv2d(4, 8, 1), activation
        self.rest = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        return self.rest(self.act(self.first(x)))


def _fused_heads(model):
    found = {name: sequence.sequence_of(module) for name, module in model.named_modules()}
    return [
        name for name, of in found.items() if of is not None and of.layers[0] is model.get_submodule(name)
    ]


_CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize(
    "winner, layout, activation, large, fused",
    [
        (ATEN, _CHANNELS_LAST, nn.ReLU(inplace=True), True, []),
        (ATEN, _CHANNELS_LAST, nn.Hardswish(), False, []),
        # It would be written to memory of its own.
        (ATEN, _CHANNELS_LAST, nn.Hardswish(), True, ["first"]),
        # Layers of their own would not change the layout.
        (ATEN, torch.contiguous_format, nn.ReLU(inplace=True), False, ["first"]),
        ("onednn", _CHANNELS_LAST, nn.ReLU(inplace=True), False, ["first", "rest.0"]),
    ],
)
def test_sequences_that_save_nothing_are_let_go(winner, layout, activation, large, fused, wins, model_takes):
    """There and in a model that is known."""
    wins(winner)
    model_takes(3, 2, 1)
    side = 96 if large else 16
    x = torch.randn(1, 4, side, side).contiguous(memory_format=layout)
    torch.manual_seed(0)
    net = _Pairs(activation).eval()
    for _ in range(2):
        fast = segfast.optimize(net, x)
        assert _fused_heads(fast) == fused
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
        kinds = {type(m) for m in (fast, fast.rest, fast.act)}
        if not fused:
            assert kinds == {_Pairs, nn.Sequential, type(activation)}
        assert [type(m) for m in segfast.restore(fast).modules()] == [type(m) for m in net.modules()]
        _choice.forget_choices()
    assert segfast.report(segfast.optimize(net, x)).gain.measured_on


def test_what_is_timed_is_what_runs(wins, model_takes, monkeypatch):
    """Convolutions that ATen computes are torch's by then."""
    wins(ATEN)
    model_takes(3, 2, 1)
    timed, gain = [], gains.gain
    from segfast._optimize import optimize as module

    def noted(model, *args):
        timed.append({name: own_class(each) for name, each in model.named_modules()})
        return gain(model, *args)

    monkeypatch.setattr(module, "gain", noted)
    fast = segfast.optimize(_net(), _image())
    assert timed == [{name: own_class(each) for name, each in fast.named_modules()}]
    assert timed[0]["conv"] is nn.Conv2d


def test_a_layer_that_was_built_as_ours_stays_ours_where_aten_computes_it(wins, model_takes):
    wins(ATEN)
    model_takes(3, 2, 1)
    net = nn.Sequential(segfast.nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    kinds = [type(m) for m in net]
    fast = segfast.optimize(net, _image())
    assert [own_class(m) for m in fast] == kinds
    assert [type(m) for m in segfast.restore(fast)] == kinds


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_is_not_faster_is_left_as_it_was(inplace, wins, model_takes):
    wins("onednn")
    model_takes(2, 3, 2.5)
    net, x = _net(), _image()
    strides = [p.stride() for p in net.parameters()]
    with torch.no_grad():
        expected = net(x)
    kinds = [type(m) for m in net.modules()]
    fast = segfast.optimize(net, x, inplace=inplace)
    assert [type(m) for m in fast.modules()] == kinds
    assert not segfast.report(fast).replaced
    with torch.no_grad():
        assert torch.equal(fast(x), expected)
    assert "Not faster on this CPU" in str(segfast.report(fast))
    assert segfast.report(fast).gain.layout == "as given"
    assert [p.stride() for p in fast.parameters()] == strides


def test_but_for_channels_last_weights_where_those_are_faster(wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 2.5)
    net, x = _net(), _image()
    strides = [p.stride() for p in net.parameters()]
    fast = segfast.optimize(net, x)
    assert type(fast.conv) is nn.Conv2d
    assert fast.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert "left as it was, but for channels_last weights" in str(segfast.report(fast))
    assert [p.stride() for p in net.parameters()] == strides
    assert [p.stride() for p in segfast.restore(fast).parameters()] == strides


def test_a_model_of_our_own_layers_that_is_not_faster_runs_aten(wins, model_takes):
    from segfast.models import create

    wins("onednn")
    net, x = create("unet", width=4).eval(), torch.randn(1, 1, 32, 32)
    model_takes(3, 2, 1)
    with torch.no_grad():
        assert "onednn" in _ran(segfast.optimize(net, x), x)
        model_takes(2, 2, 3)
        left = segfast.optimize(create("unet", width=4).eval(), x)  # of other weights: not known from before
        assert "onednn" not in _ran(left, x)
        assert "onednn" in _ran(segfast.restore(left), x)


def test_a_second_time_nothing_is_measured(wins, model_takes, monkeypatch):
    wins("onednn")
    model_takes(3, 2, 1)
    segfast.optimize(_net(), _image())
    _choice.forget_choices()
    measured = []
    monkeypatch.setattr(_measure, "measure", lambda call: measured.append(call))
    fast = segfast.optimize(_net(), _image())
    assert not measured
    assert _ran(fast, _image()) == ["onednn"] * 4


def test_what_does_not_fit_the_budget_stays_atens(wins, model_takes, monkeypatch):
    wins("onednn")
    model_takes(3, 2, 1)
    now = iter(range(10**6))
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: next(now))
    fast = segfast.optimize(_net(), _image(), budget=6)
    gain = segfast.report(fast).gain
    assert 0 < gain.unmeasured < 4
    assert f"{gain.unmeasured} calls did not fit into the budget" in str(gain)
    ran = _ran(fast, _image())
    assert ran.count("onednn") == 4 - gain.unmeasured


def test_the_callers_model_inputs_and_random_state_stay(wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 1)
    net, x = _net().train(), _image()
    state, given, rng = copy.deepcopy(net.state_dict()), x.clone(), torch.get_rng_state()
    strides = [p.stride() for p in net.parameters()]
    fast = segfast.optimize(net, x, inplace=True)
    assert fast is net
    assert net.training
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [p.stride() for p in net.parameters()] == strides
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_training_is_not_concerned(wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 1)
    net, x = _net(), _image()
    fast = segfast.optimize(net, x)
    results = []
    for model in (net, fast):
        model.train().zero_grad()
        model(x).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_trained_weights_are_prepared_anew(wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 1)
    x = _image()
    fast = segfast.optimize(_net(), x)
    with torch.no_grad():
        fast(x)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    fast.train()
    fast(x).square().mean().backward()
    optimizer.step()
    fast.eval()
    plain = segfast.restore(copy.deepcopy(fast))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_run_the_same(copied, wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 1)
    net, x = _net(), _image()
    given = segfast.optimize(net, x, dtype=torch.bfloat16)
    fast = copied(given)
    assert _ran(fast, x) == _ran(given, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), given(x))
    assert segfast.report(fast).gain.dtype == "bfloat16"


def test_every_candidate_serves_a_real_network(cache, monkeypatch):
    """Whatever wins, the outputs are the model's: each candidate in turn is the fastest one."""
    monkeypatch.setattr(
        gains, "interleave", lambda runs, device, **kw: dict.fromkeys(runs, Timing(*[1.0] * 7))
    )
    from segfast.models import create

    torch.manual_seed(0)
    net, x = create("deeplabv3plus_mobilenet_v2", num_classes=3).eval(), torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        expected = net(x)
    names = {name for candidates in CANDIDATES.values() for name in candidates}
    for winner in sorted(names):
        monkeypatch.setattr(
            _measure, "_times", lambda runs, _, winner=winner: {n: 1e3 if n == winner else 2e3 for n in runs}
        )
        _choice._choices = _choice.Choices()
        fast = segfast.optimize(net, x)
        with torch.no_grad():
            actual = fast(x)
        for call, choice in choices().measured.items():
            assert (choice.name == winner) == CANDIDATES[call.operation][winner].serves(call)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_model_that_does_not_take_zeros_is_measured_too(wins, model_takes):
    """Its calls are listed without computing them first; then it is run as it is."""

    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _net()

        def forward(self, x):
            y = self.net(x)
            if not torch.compiler.is_compiling() and not y.any():
                raise ValueError("nothing to normalize")
            return y / y.abs().max()

    wins("onednn")
    model_takes(3, 2, 1)
    fast = segfast.optimize(Normalized().eval(), _image())
    assert _ran(fast, _image()) == ["onednn"] * 4


CPU = torch.device("cpu")


def test_slow_models_are_timed_once_where_the_one_after_is_clearly_faster(monkeypatch):
    timed = []

    def interleave(runs, device, **kwargs):
        timed.append(kwargs["min_rounds"])
        return {name: Timing(*[1e3] * 7) for name in runs}

    monkeypatch.setattr(gains, "interleave", interleave)
    runs = dict.fromkeys(("as given", "channels_last", "after"), lambda: None)
    slow = {"as given": 2.0, "channels_last": 1.5, "after": 1.0}
    assert gains._milliseconds(runs, slow, CPU) == {name: 1e3 * s for name, s in slow.items()}
    assert not timed
    assert gains._milliseconds(runs, {**slow, "after": 1.45}, CPU)["after"] == 1
    assert gains._milliseconds(runs, {**slow, "after": 3.0}, CPU)["after"] == 1
    assert gains._milliseconds(runs, {name: s / 10 for name, s in slow.items()}, CPU)["after"] == 1
    assert timed[0] == timed[1] > timed[2] > 0


@pytest.mark.parametrize("after, before", [(5, 8), (7, 9)])
def test_a_slow_model_is_not_timed_in_channels_last_where_its_calls_alone_took_longer(
    after, before, wins, monkeypatch
):
    """Its four calls took ATen 2 ms each."""
    wins("onednn")
    times = iter([0.020, after / 1e3, 0.009])  # as given, after, channels_last
    ends = iter(range(99))
    monkeypatch.setattr(gains, "clock", lambda: next(times) if next(ends) % 2 else 0.0)
    monkeypatch.setattr(gains, "_SLOW_S", 0.0)
    gain = segfast.report(segfast.optimize(_net(), _image())).gain
    assert (gain.before_ms, gain.after_ms) == pytest.approx((before, after))
    assert gain.kept and gain.layout == "channels_last"


class _Misled(nn.Module):
    """Other outputs where anything is fused."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = _net(), change

    def forward(self, x):
        return self.change(self.net(x)) if sequence._threads.forced else self.net(x)


@pytest.mark.parametrize(
    "change", [lambda y: y + 1, lambda y: y[:, :1], lambda y: (y, y), lambda y: y * math.nan]
)
def test_fusions_that_change_outputs_are_undone_and_the_rest_is_chosen(change, wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 1)
    net, x = _Misled(change).eval(), _image()
    fast = segfast.optimize(net, x)
    assert sequence.sequence_of(fast.net.stem[0]) is None
    assert any("an output" in remark for remark in segfast.report(fast).remarks)
    assert _ran(fast, x) == ["onednn"] * 4
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
