"""The backend of `torch.compile`: what it replaces, that it computes what the model does, and follows it."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import segfast
from segfast._optimize import compiled, rewrite_cpu
from segfast.ops import _choice, _cpu, _measure
from segfast.ops._call import CANDIDATES

EAGER = {"rest": "eager"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def counts(monkeypatch):
    """How many groups of each graph were replaced."""
    counts, rewrite = [], compiled.rewrite
    monkeypatch.setattr(compiled, "rewrite", lambda module: counts.append(rewrite(module)))
    return counts


def compile_all(model, options=EAGER, **kwargs):
    return torch.compile(model, backend=compiled.segfast_backend, options=options, fullgraph=True, **kwargs)


def settled(model):
    """The model with statistics, scales and biases that are not those a norm begins with."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


class Net(nn.Module):
    """All that follows a convolution and is fused with it, small."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(True)
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.same, self.leaky = nn.Conv2d(8, 8, 3, padding="same"), nn.LeakyReLU(0.2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        z = self.pointwise(self.depthwise(y))
        z += y
        u = self.up(self.leaky(self.same(z)))
        return nn.functional.interpolate(u, scale_factor=2, mode="bilinear").argmax(1), u


class Pyramid(nn.Module):
    """An ASPP with a branch of another kind, and a decoder's step."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 4, 3, padding=d, dilation=d), nn.BatchNorm2d(4), nn.ReLU())
            for d in (1, 2)
        )
        self.point = nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.ReLU())
        self.up = nn.ConvTranspose2d(18, 5, 3, stride=2, padding=1)

    def forward(self, x):
        skip, x = x[:, :7], nn.functional.avg_pool2d(x, 2, ceil_mode=True)[:, :6]
        pooled = x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:])
        y = torch.cat([*[branch(x) for branch in self.branches], self.point(x), pooled], dim=1)
        return torch.cat([skip, self.up(y).relu()], 1)


class Norms(nn.Module):
    """A depthwise pair with a norm after each; arguments by name; one tensor twice in a concatenation."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        )  # fmt: skip
        self.weight = nn.Parameter(torch.randn(4, 6, 3, 3))

    def forward(self, x):
        y = nn.functional.conv2d(self.pair(x), weight=self.weight, padding=1)
        z = nn.functional.conv2d(x, self.weight, None, 1, 1)
        return torch.cat([z, z], 1), y


class Overwritten(nn.Module):
    """Writes to the convolution's input before what follows the convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = x * 2
        y = self.conv(x)
        x.add_(1)
        return x, self.norm(y)


def run(model, x, train):
    with torch.set_grad_enabled(train):
        outputs = model(x)
        if train:
            (outputs if isinstance(outputs, torch.Tensor) else outputs[-1]).square().sum().backward()
    return outputs, [p.grad for p in model.parameters()]


@pytest.mark.interpreter
class TestKernels:
    @pytest.mark.parametrize(
        ("kind", "channels", "train", "expected"),
        [
            (Net, 3, False, 5),
            (Net, 3, True, 5),
            (Pyramid, 9, False, 2),
            (Norms, 6, False, 2),
            (Overwritten, 3, False, 1),
        ],
    )
    def test_they_compute_the_same(self, counts, kind, channels, train, expected):
        model, x = settled(kind()).train(train), torch.randn(2, channels, 7, 5)
        with segfast.backend("triton"):
            fast = compile_all(copy.deepcopy(model))
            found, wanted = run(fast, x, train), run(model, x, train)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert counts == [expected]

    def test_one_program_for_all_sizes(self):
        model, counter = settled(Net()), CompileCounterWithBackend("eager")

        def backend(module, inputs):
            assert compiled.rewrite(module) == 5
            return counter(module, inputs)

        with segfast.backend("triton"):
            fast = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
            for size in ((8, 6), (5, 9)):
                x = torch.randn(2, 3, *size)
                torch.testing.assert_close(run(fast, x, False), run(model, x, False), rtol=1e-4, atol=1e-4)
        assert counter.frame_count == 1

    def test_constants_are_folded_once(self, monkeypatch):
        """Scale and shift of a norm in eval are no work of a call's."""
        graphs = []
        monkeypatch.setattr(compiled, "_eagerly", lambda module, *_: graphs.append(module) or module.forward)
        model, x = settled(Net()), torch.randn(1, 3, 4, 4)
        with segfast.backend("triton"), torch.no_grad():
            compile_all(model)(x)
        names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert len(names) == 5 and not any("scale" in name for name in names), names


class Small(nn.Module):
    """Convolutions that our algorithms serve, with what follows them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(48, 48, 1), nn.BatchNorm2d(48))
        self.up = nn.Sequential(nn.ConvTranspose2d(48, 48, 2, stride=2), nn.BatchNorm2d(48), nn.SiLU())
        self.last = nn.Conv2d(48, 3, 1)

    def forward(self, x):
        y = self.first(x)
        y = torch.relu(self.second(y) + x)
        return self.last(self.up(y))


@pytest.fixture
def measured(monkeypatch):
    """Under `autotune` an algorithm of ours is the fastest where there is one."""

    def measure_and_keep(calls, **_):
        for call in calls:
            known = CANDIDATES[call.operation]
            names = [name for name in known if name not in ("aten", "onednn") and known[name].serves(call)]
            name = names[0] if names else "aten"
            _choice.choices().add(call, _choice.Choice(name, {name: 1.0, "onednn": 2.0}))
        return {call: _choice.choices().measured[call] for call in calls}

    monkeypatch.setattr(_measure, "measure_and_keep", measure_and_keep)


@pytest.fixture
def chosen(monkeypatch):
    """The candidates that ran, by name."""
    names, original = [], _cpu.choose
    monkeypatch.setattr(_cpu, "choose", lambda *args: names.append(original(*args)) or names[-1])
    return names


def images(size=(12, 10), batch=1):
    return torch.randn(batch, 48, *size)


def compare(fast, model, x):
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


class TestOnACPU:
    def test_nothing_is_replaced_where_nothing_was_measured(self, counts):
        model, x = settled(Net()), torch.randn(2, 3, 8, 6)
        torch.testing.assert_close(run(compile_all(model), x, False), run(model, x, False))
        assert counts == [0]

    def test_what_was_chosen_runs(self, measured, chosen, counts):
        model, x = settled(Small()), images()
        fast = compile_all(model)
        with segfast.autotune():
            compare(fast, model, x)
        assert counts == [4] and len(chosen) == 4 and not {None, "aten", "onednn"} & set(chosen), chosen

    def test_a_small_gain_is_not_worth_a_call(self, measured, counts, monkeypatch):
        monkeypatch.setattr(rewrite_cpu, "_LEAST_GAIN", 2.5)
        model, x = settled(Small()), images()
        with segfast.autotune():
            compare(compile_all(model), model, x)
        assert counts == [1]  # the transposed one, which inductor would get wrong

    def test_the_layers_of_segfast_are_known_as_torchs(self, measured, chosen):
        """They run one after the other, or their norms would come as a scale and a shift."""
        model, x = settled(segfast.nn.ConvBNAct(48, 48, 3, padding=1)), images()
        with segfast.autotune():
            compare(compile_all(model), model, x)
            assert len(chosen) == 2 and len(set(chosen)) == 1, chosen  # compiled, and eager

    def test_nothing_is_compiled_anew_after_an_explanation(self):
        model, x, counter = (
            settled(segfast.nn.ConvBNAct(48, 48)),
            images(),
            CompileCounterWithBackend("eager"),
        )
        segfast.ops._backend._main.__init__()  # as in a new process
        fast = torch.compile(model, backend=counter, fullgraph=True)
        compare(fast, model, x)
        segfast.explain(model, x)
        compare(fast, model, x)
        assert counter.frame_count == 1

    def test_a_training_step_is_the_models(self, measured, counts):
        model, x = Net(), torch.randn(2, 3, 8, 6)
        with segfast.autotune():
            found = run(compile_all(copy.deepcopy(model)), x, True)
        torch.testing.assert_close(found, run(model, x, True))
        assert counts == [0]

    def test_another_size_runs_the_same_program(self, measured, counts):
        model = settled(Small())
        fast = compile_all(model, dynamic=True)
        with segfast.autotune():
            for size in ((12, 10), (9, 14)):
                compare(fast, model, images(size))
        assert len(counts) == 1 and counts[0] > 0

    def test_images_keep_their_layout(self, measured):
        model, x = settled(Small()), images()
        fast = compile_all(model)
        with segfast.autotune(), torch.no_grad():
            assert fast(x).stride() == model(x).stride()

    def test_autocast_is_left_alone(self, measured, counts):
        model, x = settled(Small()), images()
        fast = compile_all(model)
        with segfast.autotune(), torch.autocast("cpu", torch.bfloat16):
            compare(fast, model, x)
        assert counts == [0]

    def test_inductor(self, measured, chosen):
        """With a transposed convolution and its norm, which inductor's freezing folds wrongly."""
        model, x = settled(Small()), images()
        fast = compile_all(model, options={})
        with segfast.autotune():
            compare(fast, model, x)
            assert len(chosen) == 4
            with torch.no_grad():
                model.first[0].weight.mul_(2)
            compare(fast, model, x)


class TestFollowsTheModel:
    @pytest.fixture
    def compiled_once(self, counts):
        model, x = settled(Small()), images()
        fast = compile_all(model)
        compare(fast, model, x)
        assert counts == [1]  # the one transposed convolution
        return model, fast, x

    def test_new_weights(self, compiled_once, counts):
        model, fast, x = compiled_once
        model.load_state_dict(settled(Small()).state_dict())
        compare(fast, model, x)
        compare(fast, model, x)
        assert counts == [1, 1]

    def test_another_parameter(self, compiled_once):
        model, fast, x = compiled_once
        model.last.weight = nn.Parameter(torch.randn(3, 48, 1, 1))
        compare(fast, model, x)

    def test_other_data(self, compiled_once):
        model, fast, x = compiled_once
        model.up[0].weight.data = torch.randn(48, 48, 2, 2)  # folded with its norm
        compare(fast, model, x)

    def test_an_optimizer(self, compiled_once):
        model, fast, x = compiled_once
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        model(x).square().mean().backward()
        optimizer.step()
        compare(fast, model, x)

    def test_statistics_alone(self, compiled_once):
        """Torch writes them in training without counting it."""
        model, fast, x = compiled_once
        with torch.no_grad():
            model.train()(x * 3)
        model.eval()
        compare(fast, model, x)

    def test_many_changes_compile_no_more(self, compiled_once, counts):
        model, fast, x = compiled_once
        for _ in range(compiled._MOST_COMPILATIONS + 4):
            with torch.no_grad():
                model.last.weight.add_(0.1)
            compare(fast, model, x)
        assert len(counts) == compiled._MOST_COMPILATIONS + 1

    def test_a_graph_that_writes_its_own_buffers(self, counts):
        model = nn.Sequential(nn.Conv2d(48, 8, 3), nn.BatchNorm2d(8))
        other, x = copy.deepcopy(model), images()
        fast = compile_all(model)
        for _ in range(4):
            compare(fast, other, x)
        torch.testing.assert_close(model.state_dict(), other.state_dict())
        assert len(counts) <= 2

    def test_inference_tensors(self):
        with torch.inference_mode():
            model, x = settled(Small()), images()
            fast = compile_all(model)
            torch.testing.assert_close(fast(x), model(x))
            model.last.bias.add_(1)
            torch.testing.assert_close(fast(x), model(x))

    def test_gradients_switched_on_within(self, compiled_once):
        model, fast, x = compiled_once
        found = fast(x)
        assert found.requires_grad
        torch.testing.assert_close(found, model(x))


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [({"rest": "aten"}, "must be one of 'inductor', 'eager', got 'aten'"),
         ({"rest": "eager", "max_autotune": True}, "leaves nothing to inductor, got max_autotune")],
    )  # fmt: skip
    def test_errors(self, options, message):
        with pytest.raises(Exception, match=message):
            compile_all(nn.Conv2d(1, 1, 1), options=options)(torch.ones(1, 1, 1, 1))
