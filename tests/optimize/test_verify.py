"""How `segfast.optimize` compares the fused model with the plain one: exactly, and leaving all as it was."""

import collections
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segfast
from segfast._optimize.verify import leaves, undisturbed
from segfast.commands.check import check_model
from segfast.nn._fused import sequence


class InPlace(nn.Module):
    """Works on its input in place, counts its calls, and draws a random number."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, x):
        x.mul_(2).add_(1)
        self.calls += 1
        self.replaced = self.replaced + 1
        return self.relu(self.norm(self.conv(x))) + torch.rand(())


def test_a_model_made_in_inference_mode_stays_as_it_was():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with undisturbed(model), torch.no_grad():
        model(torch.zeros(1, 3, 8, 8))
    assert not model[1].num_batches_tracked


@pytest.mark.parametrize("kind", ["sparse", "inference"])
def test_unusual_buffers_are_put_back(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with torch.inference_mode(kind == "inference"), torch.no_grad():
        kept = torch.eye(3)
        model.register_buffer("kept", kept.to_sparse() if kind == "sparse" else kept)
    with undisturbed(model), torch.inference_mode():
        model.kept.mul_(2)
    assert model.kept.is_inference() == (kind == "inference")
    torch.testing.assert_close(model.kept.to_dense(), torch.eye(3))


def test_buffers_that_a_run_registers_are_gone():
    model = nn.Conv2d(3, 4, 3)
    with undisturbed(model):
        model.register_buffer("grid", torch.zeros(3), persistent=False)
    assert not hasattr(model, "grid") and not model._non_persistent_buffers_set
    model.register_buffer("grid", torch.zeros(3))


class Uncopyable:
    """Something that holds what cannot be copied, and is of several modules."""

    def __init__(self):
        self.lock, self.scale = threading.Lock(), 2.0


def test_what_cannot_be_copied_stays_whole_in_every_module():
    shared = Uncopyable()
    model = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
    model[0].own, model[1].own, model[2].own = shared, shared, [shared, [1]]
    with undisturbed(model):
        assert model[1].own.scale == model[2].own[0].scale == 2
    assert model[0].own is model[1].own is shared


def undone(model):
    return [
        r
        for m in model.modules()
        if "undone" in (r := m.__dict__.get("_segfast_optimize", {}).get("not_fused", ""))
    ]


@pytest.fixture
def tf32(monkeypatch):
    """Where a GPU would, a convolution rounds its operands to TF32, and a fused one truncates them."""
    real = F.conv2d

    def rounded(t):
        bits = t.detach().clone(memory_format=torch.preserve_format).view(torch.int32)
        return ((bits + (0 if getattr(sequence._threads, "forced", None) else 0x1000)) & ~0x1FFF).view(
            torch.float32
        )

    def conv2d(x, weight, *rest, **named):
        if torch.backends.cudnn.conv.fp32_precision == "tf32" and not torch.compiler.is_exporting():
            x, weight = rounded(x), rounded(weight)
        return real(x, weight, *rest, **named)

    monkeypatch.setattr(F, "conv2d", conv2d)
    conv, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    conv.fp32_precision = "tf32"
    yield
    conv.fp32_precision = before


def test_tf32_undoes_no_fusion(tf32):
    torch.manual_seed(0)
    layers = []
    for channels in (3, *[16] * 11):
        layers += [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for norm in layers[1::3]:
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    model = segfast.optimize(nn.Sequential(*layers).eval(), torch.randn(1, 3, 33, 33))
    assert undone(model) == []
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_the_precision_is_put_back_after_an_error(tf32):
    class Fails(InPlace):
        def forward(self, x):
            if torch.backends.cudnn.conv.fp32_precision == "ieee":
                raise RuntimeError("under exact fp32")
            return self.relu(self.norm(self.conv(x)))

    model = segfast.optimize(Fails().eval(), torch.rand(1, 3, 8, 8))
    assert undone(model) == ["undone: RuntimeError: under exact fp32"]
    assert "Not fused: undone: RuntimeError: under exact fp32" in str(segfast.report(model))
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_that_writes_leaves_all_as_it_was(inplace):
    model = InPlace().train()
    model.norm.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.norm.bias.requires_grad_(False)
    x = torch.rand(1, 3, 8, 8)
    before, state = x.clone(), {name: t.clone() for name, t in model.state_dict().items()}
    replaced = model.replaced
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fast = segfast.optimize(model, x, inplace=inplace)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(x, before)
    assert model.replaced is replaced
    for changed in (model, fast):
        for name, values in changed.state_dict().items():
            assert torch.equal(values, state[name]), name
        assert changed.training and not changed.norm.training
        assert not changed.norm.bias.requires_grad and changed.conv.weight.requires_grad
    assert torch.equal(model.conv.weight.grad, torch.ones(4, 3, 3, 3))  # a deep copy has none
    assert undone(fast) == [] and type(fast.conv) is not nn.Conv2d


def test_check_leaves_the_example_as_it_was():
    class Scales(InPlace):
        def forward(self, x):
            return self.relu(self.norm(self.conv(x.mul_(2))))

    x = torch.rand(1, 3, 8, 8)
    before = x.clone()
    assert check_model(Scales(), x, budget_s=0.0).output.relative < 1e-5
    assert torch.equal(x, before)


def test_the_fields_of_a_dataclass_are_compared():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        others: dict

    class Misled(nn.Module):
        """Gives other results where its layers are fused."""

        def __init__(self, output):
            super().__init__()
            self.output = output
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            wrong = bool(getattr(sequence._threads, "forced", None))
            y = self.layers(x)
            return Output(y, {"more": [y + wrong]}) if self.output else y + wrong

    for output in (False, True):
        model = segfast.optimize(Misled(output).eval(), torch.rand(1, 3, 8, 8))
        assert "an output changed by 1" in undone(model)[0]


class Named(InPlace):
    """Takes keyword arguments and returns a mapping, as the models of transformers do."""

    def forward(self, pixel_values, labels=None):
        logits = super().forward(pixel_values)
        return {"logits": logits} if labels is None else {"loss": logits.mean(), "logits": logits}


def test_a_dict_of_example_inputs_holds_keyword_arguments():
    x = torch.rand(1, 3, 9, 9)
    example = {"labels": torch.zeros(1), "pixel_values": x.clone()}
    model = segfast.optimize(Named().eval(), example)
    assert sequence.sequence_of(model.conv) is not None and undone(model) == []
    assert torch.equal(example["pixel_values"], x)
    assert check_model(Named(), example, budget_s=0.01).agrees


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict):
    """As transformers': a dataclass that is a mapping of those of its fields that are not None."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, ...] | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setattr__(self, name, value):
        if name in self and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        super().__setattr__(name, value)


class Registered(ModelOutput):
    """Known to torch.export, as transformers' are."""


torch.utils._pytree.register_pytree_node(
    Registered,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Registered(**dict(zip(names, values, strict=True))),
    serialized_type_name="tests.optimize.test_verify.Registered",
)


class Transformers(Named):
    """Takes keyword arguments and returns a ModelOutput; wrong by one where it is `misled` by fusion."""

    def __init__(self, output, misled=False):
        super().__init__()
        self.output, self.misled = output, misled

    def forward(self, pixel_values, labels=None):
        found = super().forward(pixel_values, labels)
        wrong = self.misled and bool(getattr(sequence._threads, "forced", None))
        return self.output(found.get("loss"), found["logits"], (found["logits"] + wrong,))


@pytest.mark.parametrize("labels", [None, torch.zeros(1)], ids=["", "labels"])
def test_a_model_that_returns_a_model_output(labels):
    given = {} if labels is None else {"labels": labels}
    example = {"pixel_values": torch.rand(1, 3, 9, 9), **given}
    torch.manual_seed(0)
    model = Transformers(Registered).eval()
    fast = segfast.optimize(model, example)
    assert sequence.sequence_of(fast.conv) is not None and undone(fast) == []
    outputs = []
    for m in (model, fast):
        torch.manual_seed(0)
        outputs.append(m(**{name: t.clone() for name, t in example.items()}))
    assert type(outputs[1]) is Registered and list(outputs[1]) == list(outputs[0])
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits)
    found = check_model(model, example, budget_s=0.0)
    assert found.agrees and found.output.where.startswith("output['")


@pytest.mark.parametrize("output", [Registered, ModelOutput], ids=["registered", "unknown to torch.export"])
def test_what_a_model_output_holds_is_compared(output):
    class InASequential(Transformers):
        def __init__(self):
            super().__init__(output, misled=True)
            self.layers = nn.Sequential(self.conv, self.norm, self.relu)
            del self.conv, self.norm, self.relu

        def forward(self, pixel_values):
            y = self.layers(pixel_values)
            return self.output(hidden=(y, y + bool(getattr(sequence._threads, "forced", None))))

    fast = segfast.optimize(InASequential().eval(), {"pixel_values": torch.rand(1, 3, 9, 9)})
    assert any("an output changed by 1" in reason for reason in undone(fast))


class Boxed:
    """No mapping, sequence or dataclass, but known to torch's pytrees."""

    def __init__(self, *values):
        self.values = values


torch.utils._pytree.register_pytree_node(
    Boxed, lambda boxed: (list(boxed.values), None), lambda values, _: Boxed(*values)
)


def test_the_leaves_of_an_output_and_their_paths():
    @dataclasses.dataclass
    class Fields:
        value: torch.Tensor

    a, b, c, d, e = (torch.full((1,), float(value)) for value in range(5))
    output = {
        "main": a,
        "more": [b, (ModelOutput(logits=c), None)],
        "last": Fields(d),
        "boxed": Boxed(0, [e]),
    }
    found = list(leaves(output))
    assert [path for path, _ in found] == [
        "output['main']",
        "output['more'][0]",
        "output['more'][1][0]['logits']",
        "output['more'][1][1]",
        "output['last'].value",
        "output['boxed']<0>",
        "output['boxed']<1>",
    ]
    assert [leaf for _, leaf in found] == [a, b, c, None, d, 0, e]
    assert list(leaves(a)) == [("output", a)]


def test_a_dict_in_a_tuple_of_example_inputs_is_a_positional_argument():
    class Positional(InPlace):
        def forward(self, x, options):
            return super().forward(x) * options["scale"]

    model = segfast.optimize(Positional().eval(), (torch.rand(1, 3, 9, 9), {"scale": torch.ones(1)}))
    assert sequence.sequence_of(model.conv) is not None and undone(model) == []


def test_scripting_a_fused_model_says_to_restore_it_first():
    model = segfast.optimize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval())
    with pytest.raises(RuntimeError, match=r"segfast\.restore"):
        torch.jit.script(model)
    torch.jit.script(segfast.restore(model))
