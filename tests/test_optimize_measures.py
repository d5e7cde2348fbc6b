"""`optimize` chooses by measuring on the machine, keeps what is faster and leaves alone what is not."""

import copy
import pickle

import pytest
import torch
from torch import nn

import segfast
from segfast import _choose
from segfast._choose import Gain
from segfast._timing import Timing
from segfast.ops import _choice, _measure
from segfast.ops._choice import ATEN, CANDIDATES, Choice, choices

pytestmark = pytest.mark.measures


class Net(nn.Module):
    """A stem with a norm, a block with a shortcut, an up-convolution and a classifier nothing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.classifier = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.classifier(self.up(torch.relu(x + self.conv(x))))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "cache"))
    _choice.forget_choices()


@pytest.fixture
def wins(monkeypatch, cache):
    """`wins(name)`: this candidate takes the least wherever it serves and is right."""

    def set_winner(winner: str) -> None:
        def times(runs, input):
            return {name: 1.0 if name == winner else 2.0 for name in runs}

        monkeypatch.setattr(_measure, "_times", times)

    return set_winner


@pytest.fixture
def model_takes(monkeypatch):
    """`model_takes(as_given, channels_last, after)`: milliseconds that whole models take."""

    def set_times(*ms: float) -> None:
        def interleave(runs, device, **kwargs):
            nan = float("nan")
            return {
                name: Timing(nan, nan, nan, 1e3 * t, 1e3 * t, 1e3 * t, 3)
                for name, t in zip(runs, ms, strict=True)
            }

        monkeypatch.setattr(_choose, "interleave", interleave)

    return set_times


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.stem[1].running_mean.normal_()
        net.stem[1].running_var.uniform_(0.5, 2)
    return net


def _image() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32)


def _ran(net: nn.Module, x: torch.Tensor) -> list[str]:
    return [decision.backend for decision in segfast.explain(net, x)]


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
    assert gain == Gain(2, 1, "channels_last", torch.get_num_threads(), True, error=gain.error)
    assert gain.error < 1e-5
    assert "2.00 times as fast" in str(segfast.report(fast))
    assert "onednn: 1 us (aten 2" in str(segfast.report(fast))


def test_where_aten_wins_plain_layers_stay_torchs(wins, model_takes):
    wins(ATEN)
    model_takes(3, 2, 1)
    fast = segfast.optimize(_net(), _image())
    assert type(fast.conv) is type(fast.classifier) is nn.Conv2d
    wins("onednn")
    _choice.forget_choices()
    for call in list(choices().measured):
        choices().add(call, Choice("onednn", {}))
    again = segfast.optimize(_net(), _image())
    assert type(again.conv) is segfast.nn.Conv2d
    assert segfast.report(again).replaced == ["conv", "up", "classifier"]
    assert type(segfast.restore(again).conv) is nn.Conv2d


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
        left = segfast.optimize(net, x)
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
    fast = segfast.optimize(_net(), _image(), budget=5)
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


class TestBFloat16:
    def test_inputs_outputs_and_parameters_stay(self, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)
        net, x = _net(), _image()
        fast = segfast.optimize(net, x, dtype=torch.bfloat16)
        with torch.no_grad():
            expected, actual = net(x), fast(x)
        assert actual.dtype == torch.float32
        assert {p.dtype for p in fast.parameters()} == {torch.float32}
        error = (actual - expected).abs().max() / expected.abs().max()
        assert 1e-5 < error < 0.03  # of bfloat16, and no more
        assert segfast.report(fast).gain.error == pytest.approx(error.item(), rel=1e-3)
        assert "in bfloat16, where outputs changed by" in str(segfast.report(fast))
        calls = [call for call in choices().measured if call.dtype == torch.bfloat16]
        assert len(calls) == 4

    def test_gradients_are_computed_as_given(self, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)
        net, x = _net(), _image()
        fast = segfast.optimize(net, x, dtype=torch.bfloat16)
        torch.testing.assert_close(fast(x), net(x))  # gradients are enabled

    def test_where_it_is_slower_the_model_computes_as_given(self, wins, monkeypatch):
        wins("onednn")
        gains = iter([False, True])
        found = []

        def gain(model, plain, inputs, dtype):
            found.append(dtype)
            name = None if dtype is None else "bfloat16"
            return Gain(2, 3, "as given", 1, next(gains), name, 0.01 if name else 0.0)

        monkeypatch.setattr("segfast._optimize.gain", gain)
        net, x = _net(), _image()
        fast = segfast.optimize(net, x, dtype=torch.bfloat16)
        assert found == [torch.bfloat16, None]
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
        assert "Not faster" in str(segfast.report(fast))

    def test_restore_undoes_it(self, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)
        net, x = _net(), _image()
        plain = segfast.restore(segfast.optimize(net, x, dtype=torch.bfloat16))
        assert type(plain) is Net
        with torch.no_grad():
            assert torch.equal(plain(x), net(x))

    def test_dicts_and_other_outputs(self, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)

        class Both(Net):
            def forward(self, image):
                out = super().forward(image)
                return {"out": out, "labels": out.argmax(1), "size": 3}

        torch.manual_seed(0)
        fast = segfast.optimize(Both().eval(), {"image": _image()}, dtype=torch.bfloat16)
        with torch.no_grad():
            result = fast(image=_image())
        assert result["out"].dtype == torch.float32
        assert result["labels"].dtype == torch.int64
        assert result["size"] == 3


class TestBadInput:
    @pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), "60", None])
    def test_budget(self, budget):
        net = _net()
        with pytest.raises(ValueError, match="budget must be a positive number of seconds"):
            segfast.optimize(net, _image(), budget=budget, inplace=True)
        assert type(net.up) is nn.ConvTranspose2d

    @pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "bfloat16"])
    def test_dtype(self, dtype):
        with pytest.raises(ValueError, match="dtype must be None or"):
            segfast.optimize(_net(), _image(), dtype=dtype)

    def test_dtype_without_examples(self):
        with pytest.raises(ValueError, match="dtype needs example_inputs"):
            segfast.optimize(_net(), dtype=torch.bfloat16)

    def test_two_devices(self):
        net = _net()
        net.classifier.to("meta")
        with pytest.raises(ValueError, match="one device to be measured, got cpu, meta"):
            segfast.optimize(net, _image(), inplace=True)
        assert type(net.up) is nn.ConvTranspose2d

    def test_an_example_the_model_cannot_run_on(self):
        net = _net()
        with pytest.raises(RuntimeError, match="channels"):
            segfast.optimize(net, torch.randn(1, 4, 32, 32), inplace=True)
        assert type(net.up) is nn.ConvTranspose2d

    def test_an_unwritable_cache(self, tmp_path, monkeypatch, wins, model_takes):
        from segfast.ops import _choice_files

        wins("onednn")
        model_takes(3, 2, 1)
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "file"))
        _choice_files._warn_once.cache_clear()
        with pytest.warns(UserWarning, match="cannot be written"):
            fast = segfast.optimize(_net(), _image())
        assert _ran(fast, _image()) == ["onednn"] * 4


def test_every_candidate_serves_a_real_network(cache, monkeypatch):
    """Whatever wins, the outputs are the model's: each candidate in turn is the fastest one."""
    monkeypatch.setattr(
        _choose, "interleave", lambda runs, device, **kw: dict.fromkeys(runs, Timing(*[1.0] * 7))
    )
    from segfast.models import create

    torch.manual_seed(0)
    net, x = create("deeplabv3plus_mobilenet_v2", num_classes=3).eval(), torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        expected = net(x)
    names = {name for candidates in CANDIDATES.values() for name in candidates}
    for winner in sorted(names):
        monkeypatch.setattr(
            _measure, "_times", lambda runs, _, winner=winner: {n: 1.0 if n == winner else 2.0 for n in runs}
        )
        _choice._choices = _choice.Choices()
        fast = segfast.optimize(net, x)
        with torch.no_grad():
            actual = fast(x)
        for call, choice in choices().measured.items():
            assert (choice.name == winner) == CANDIDATES[call.operation][winner].serves(call)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


class Tied(nn.Module):
    """One weight in a convolution and a transposed one."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.encode = nn.Conv2d(8, 8, kernel, kernel, bias=False)
        self.decode = nn.ConvTranspose2d(8, 8, kernel, kernel, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.relu(self.encode(x)))


@pytest.mark.parametrize("winner", ["onednn", "matmul"])
@pytest.mark.parametrize("kernel", [1, 2])
def test_a_weight_of_two_operations(winner, kernel, wins, model_takes):
    wins(winner)
    model_takes(3, 2, 1)
    torch.manual_seed(0)
    net, x = Tied(kernel).eval(), torch.randn(1, 8, 8, 8)
    fast = segfast.optimize(net, x)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert segfast.report(fast).gain.kept


def test_outputs_that_change_are_not_kept(wins, model_takes, monkeypatch):
    wins("onednn")
    model_takes(3, 2, 1)
    candidate = CANDIDATES["conv2d"]["onednn"]
    wrong = candidate._replace(run=lambda *args: candidate.run(*args) * 1.01)
    monkeypatch.setattr(_measure, "_is_right", lambda *args: True)
    monkeypatch.setitem(CANDIDATES["conv2d"], "onednn", wrong)
    net, x = _net(), _image()
    fast = segfast.optimize(net, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    assert not segfast.report(fast).gain.kept
    assert "Outputs changed by" in str(segfast.report(fast))


def test_outputs_keep_their_layout(wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 1)
    net, x = _net(), _image()
    fast = segfast.optimize(net, x)
    with torch.no_grad():
        assert fast(x).stride() == net(x).stride()
        fast(x).view(1, -1)
        model_takes(3, 2, 4)
        segfast.optimize(net, x)(x).view(1, -1)


def test_a_forward_that_views_its_images_is_left_alone(wins, model_takes):
    class Views(Net):
        def forward(self, x):
            x = self.stem(x)
            return self.classifier(self.up(x)), x.view(x.shape[0], -1)

    wins("onednn")
    model_takes(3, 2, 1)
    torch.manual_seed(0)
    net, x = Views().eval(), _image()
    fast = segfast.optimize(net, x)
    with torch.no_grad():
        for expected, actual in zip(net(x), fast(x), strict=True):
            torch.testing.assert_close(actual, expected)


def test_other_layers_and_empty_batches_do_no_harm(wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 1)

    class Volumes(Net):
        def __init__(self):
            super().__init__()
            self.volume = nn.Conv3d(1, 1, 3, padding=1)

        def forward(self, x):
            return super().forward(self.volume(x[:, None])[:, 0])

    fast = segfast.optimize(Volumes().eval(), _image())
    assert segfast.report(fast).gain.kept
    linear = segfast.optimize(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).eval(), torch.randn(2, 3))
    assert segfast.report(linear).gain is None
    segfast.optimize(_net(), torch.randn(0, 3, 32, 32))
    odd = nn.ConvTranspose2d(8, 8, 3, stride=1, output_padding=1, dilation=2).eval()
    x = torch.randn(1, 8, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(segfast.optimize(odd, x)(x), odd(x))


def test_a_model_that_cannot_be_copied(wins, model_takes):
    import threading

    wins("onednn")
    model_takes(3, 2, 1)
    net, x = _net(), _image()
    with torch.no_grad():
        expected = net(x)
    net.lock = threading.Lock()
    assert segfast.optimize(net, x, inplace=True) is net
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_for_a_model_left_alone(wins, model_takes):
    from segfast.nn import _ready

    wins("onednn")
    model_takes(2, 2, 3)
    prepared, made = dict(_choice._prepared), sum(map(len, _ready._made.values()))
    net = segfast.optimize(_net(), _image(), inplace=True)
    assert _choice._prepared.keys() <= prepared.keys()
    assert sum(map(len, _ready._made.values())) <= made
    assert net is not None


def test_a_dataclass_and_a_fused_root_in_bfloat16(wins, model_takes):
    import dataclasses

    wins("onednn")
    model_takes(3, 2, 1)

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        size: int

    class Wrapped(Net):
        def forward(self, x):
            return Output(super().forward(x), 3)

    torch.manual_seed(0)
    fast = segfast.optimize(Wrapped().eval(), _image(), dtype=torch.bfloat16)
    with torch.no_grad():
        assert fast(_image()).logits.dtype == torch.float32
    root = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fast = segfast.optimize(root, _image(), dtype=torch.bfloat16)
    again = pickle.loads(pickle.dumps(fast))
    x = _image()
    with torch.no_grad():
        torch.testing.assert_close(again(x), fast(x))
    assert torch.export.export(fast, (x,), dynamic_shapes={"input": {2: torch.export.Dim.DYNAMIC}})


def test_forward_mode_keeps_its_tangents(wins, model_takes):
    from torch.autograd import forward_ad

    wins("onednn")
    model_takes(3, 2, 1)
    fast, x = segfast.optimize(_net(), _image()), _image()
    with torch.no_grad(), forward_ad.dual_level():
        y = fast(forward_ad.make_dual(x, torch.ones_like(x)))
        assert forward_ad.unpack_dual(y).tangent is not None
