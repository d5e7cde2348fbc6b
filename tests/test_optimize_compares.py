"""How `segfast.optimize` compares the fused model with the plain one: exactly, and leaving all as it was."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segfast
from segfast._check import check_model
from segfast.nn import _fused_chain


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
        return ((bits + (0 if getattr(_fused_chain._threads, "forced", None) else 0x1000)) & ~0x1FFF).view(
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
            wrong = bool(getattr(_fused_chain._threads, "forced", None))
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
    assert _fused_chain.chain_of(model.conv) is not None and undone(model) == []
    assert torch.equal(example["pixel_values"], x)
    assert check_model(Named(), example, budget_s=0.01).agrees


def test_a_dict_in_a_tuple_of_example_inputs_is_a_positional_argument():
    class Positional(InPlace):
        def forward(self, x, options):
            return super().forward(x) * options["scale"]

    model = segfast.optimize(Positional().eval(), (torch.rand(1, 3, 9, 9), {"scale": torch.ones(1)}))
    assert _fused_chain.chain_of(model.conv) is not None and undone(model) == []


def test_scripting_a_fused_model_says_to_restore_it_first():
    model = segfast.optimize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval())
    with pytest.raises(RuntimeError, match=r"segfast\.restore"):
        torch.jit.script(model)
    torch.jit.script(segfast.restore(model))
