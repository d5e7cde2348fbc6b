"""Whatever is chosen, outputs, layouts and unusual models stay as they were."""

import copy
import pickle

import pytest
import torch
from torch import nn

import segfast
from segfast._optimize.verify import undisturbed
from segfast.ops import _measure, _prepared_weights
from segfast.ops._call import CANDIDATES
from tests.optimize.measured_network import Net
from tests.optimize.measured_network import image as _image
from tests.optimize.measured_network import net as _net

pytestmark = pytest.mark.measures


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
    monkeypatch.setattr(_measure, "_is_close", lambda *args: True)
    monkeypatch.setitem(CANDIDATES["conv2d"], "onednn", wrong)
    net, x = _net(), _image()
    fast = segfast.optimize(net, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x))
    assert not segfast.report(fast).gain.kept
    assert "Outputs changed by" in str(segfast.report(fast))


def test_statistics_of_batch_norms_stay_as_they_were():
    """`optimize(train=True)` makes training steps on a GPU; torch writes statistics without counting it."""
    net = _net().train()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    with undisturbed(net):
        net(_image())
        assert not torch.equal(net.stem[1].running_mean, kept["stem.1.running_mean"])
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0, msg=name)


class Box:
    """An object of the model's own, which no pytree knows."""

    def __init__(self):
        self.seen = {}


class Keeps(nn.Module):
    """Keeps what its own layer made of a constant, in one of several ways, and counts its calls."""

    def __init__(self, where):
        super().__init__()
        self.code = nn.Parameter(torch.randn(1, 8, 8, 8))
        self.body, self.make = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.kept, self.seen, self.box, self.calls = None, [{}], Box(), 0
        self.where = where

    def table(self, size):
        if self.where == "attribute":
            if self.kept is None:
                self.kept = self.make(self.code)
            return self.kept
        seen = {"list": self.seen[0], "object": self.box.seen, "module": TABLES}[self.where]
        if size not in seen:
            seen[size] = self.make(self.code)
        return seen[size]

    def forward(self, x):
        self.calls += 1
        y = torch.relu(self.body(x))
        return y * torch.nn.functional.interpolate(self.table(tuple(x.shape)), size=y.shape[2:])


TABLES = {}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("where", ["attribute", "list", "object", "module"])
def test_what_a_model_keeps_is_what_it_computed(where, kept, inplace, wins, model_takes):
    """Not the zeros that calls give while they are only listed."""
    TABLES.clear()
    wins("onednn")
    model_takes(3, 2, 1 if kept else 4)
    torch.manual_seed(0)
    net, x = Keeps(where).eval(), torch.randn(1, 3, 16, 16)
    plain = copy.deepcopy(net)
    fast = segfast.optimize(net, x, inplace=inplace)
    assert segfast.report(fast).gain.kept == kept
    assert fast.calls == net.calls == 0 and not fast.box.seen and fast.kept is None
    with torch.no_grad():
        y = fast(x)
        TABLES.clear()
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)


def test_what_a_hook_keeps_is_what_the_model_computed(wins, model_takes):
    """Not the zeros that calls give while they are only listed."""
    wins("onednn")
    model_takes(3, 2, 1)
    net, x, taken = _net(), _image(), []
    net.classifier.register_forward_hook(lambda module, args, output: taken.append(output.detach()))
    segfast.optimize(net, x)
    with torch.no_grad():
        expected = net(x)
    for each in taken:
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)


class Remembers(nn.Module):
    """A recurrent one: each result depends on the last."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), None

    def forward(self, x):
        y = self.conv(x)
        self.last = y if self.last is None else y + self.last
        return self.last


def test_a_state_stays_as_it_was(wins, model_takes):
    wins("onednn")
    model_takes(3, 2, 1)
    net, x = Remembers().eval(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        last = net(x)
        expected = last.clone()
        segfast.optimize(net, torch.randn(1, 3, 16, 16), inplace=True)
        assert net.last is last
        torch.testing.assert_close(last, expected, rtol=0, atol=0)
        torch.testing.assert_close(net(x), 2 * expected, rtol=1e-4, atol=1e-5)


class Enlarged(torch.nn.Module):
    """Scores of a quarter of the size, enlarged."""

    def __init__(self):
        super().__init__()
        self.net, self.head = _net(), torch.nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return torch.nn.functional.interpolate(self.head(self.net(x)), scale_factor=4.0, mode="bilinear")


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "left"])
def test_scores_are_laid_out_as_the_output_before_they_are_enlarged(kept, wins, model_takes):
    wins("onednn")
    model_takes(*((3, 2, 1) if kept else (3, 1, 2)))
    net, x = Enlarged().eval(), _image()
    fast = segfast.optimize(net, x)
    assert segfast.report(fast).gain.kept == kept
    with torch.no_grad():
        y, expected = fast(x), net(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert y.is_contiguous()
        enlarged = []
        interpolate = torch.nn.functional.interpolate

        def noted(input, *args, **kwargs):
            enlarged.append(input.is_contiguous())
            return interpolate(input, *args, **kwargs)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(torch.nn.functional, "interpolate", noted)
            assert fast(x).is_contiguous()
            last = fast(x.contiguous(memory_format=torch.channels_last))
            assert last.is_contiguous(memory_format=torch.channels_last)
    assert enlarged[0] and not enlarged[-1]  # each may be seen twice, as torch's overrides see it
    restored = segfast.restore(fast)
    assert type(restored) is Enlarged and type(restored.head) is torch.nn.Conv2d


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
    from segfast.nn._fused import ready

    wins("onednn")
    model_takes(2, 2, 3)
    prepared, made = dict(_prepared_weights._kept), sum(map(len, ready._made.values()))
    net = segfast.optimize(_net(), _image(), inplace=True)
    assert _prepared_weights._kept.keys() <= prepared.keys()
    assert sum(map(len, ready._made.values())) <= made
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
