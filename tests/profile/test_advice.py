"""Advice about rows: candidates of the same call, and a sentence on what `optimize` made of the layer."""

import pytest
import torch
from torch import nn

import segfast
from segfast._optimize.gain import Gain
from segfast._profile import advice, profile
from segfast._profile.advice import Known, Optimized, optimized_copy, with_advice
from segfast._profile.facts import Facts
from segfast._profile.passes import Task
from segfast._profile.rows import Row
from segfast.ops._call import Call
from segfast.ops._choice import Choice, choices

KEPT = Gain(before_ms=30.0, after_ms=20.0, layout="as given", threads=1, kept=True)
LEFT = Gain(before_ms=30.0, after_ms=40.0, layout="as given", threads=1, kept=False)
CHOICE = Choice("onednn", {"aten": 30.0, "onednn": 10.0})


def call(**others) -> Call:
    facts = {
        "operation": "conv2d",
        "dtype": torch.float32,
        "channels_last": False,
        "input": (1, 3, 16, 16),
        "weight": (8, 3, 3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "output_padding": (0, 0),
        "dilation": (1, 1),
        "groups": 1,
        "bias": True,
        "residual": False,
        "activation": None,
        "threads": torch.get_num_threads(),
    }
    return Call(**{**facts, **others})


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).eval()


def facts(**others) -> Facts:
    geometry = ((1, 3, 16, 16), (8, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1, False)
    return Facts(**{"dtype": "float32", "convolution": geometry, **others})


def row(name: str = "0", kind: str = "conv2d", us: float = 30.0) -> Row:
    return Row(name, kind, "forward", 0.0, us, us, us)


def told(of: Row, optimized: Optimized, about: Facts | None = None, whole: float = 100.0) -> Row:
    return with_advice(of, about, optimized, Known(), whole)


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.bfloat16},
        {"input": (1, 3, 16, 32)},
        {"weight": (8, 3, 5, 5)},
        {"stride": (2, 2)},
        {"dilation": (2, 2)},
        {"groups": 3},
        {"threads": 99},
        {"operation": "conv_transpose2d"},
    ],
)
def test_candidates_are_those_of_the_same_call(other):
    choices().add(call(**other), Choice("aten", {"aten": 1.0}))
    assert Known().find(facts()) is None
    choices().add(call(), CHOICE)
    found = told(row(), Optimized(), facts())
    assert found.candidates == (("onednn", 10.0), ("aten", 30.0))


def test_of_several_calls_the_one_with_most_fused_counts():
    choices().add(call(), Choice("aten", {"aten": 1.0}))
    choices().add(call(activation="relu"), CHOICE)
    assert Known().find(facts()) == CHOICE
    assert Known().find(facts(convolution=None)) is None


def test_a_sentence_for_each_layer_of_a_fused_sequence():
    model = segfast.optimize(net())
    optimized = Optimized(model, KEPT, "", *advice._fusions(model))
    choices().add(call(), CHOICE)
    sentences = [
        told(row("0"), optimized, facts()).advice,
        told(row("0"), optimized).advice,
        told(row("1", "batch_norm"), optimized).advice,
        told(row("2", "activation"), optimized).advice,
        told(row("3", "pool"), optimized).advice,
    ]
    assert sentences == [
        "segfast.optimize runs it on onednn, together with 1, 2.",
        "segfast.optimize computes it together with 1, 2.",
        "segfast.optimize computes it within the convolution before it.",
        "segfast.optimize computes it within the convolution before it.",
        "",
    ]


def test_nothing_is_said_of_layers_where_the_model_is_left_as_it_was():
    choices().add(call(), CHOICE)
    found = told(row(), Optimized(net(), LEFT), facts())
    assert (found.advice, len(found.candidates)) == ("", 2)


def test_copies_casts_and_what_lies_between():
    assert "channels_last" in told(row(kind="layout copy"), Optimized()).advice
    assert "one dtype" in told(row(kind="cast"), Optimized()).advice
    assert "torch.compile" in told(row("", "between layers", us=5.0), Optimized()).advice
    assert told(row("", "between layers", us=4.9), Optimized()).advice == ""
    # As where other work on the machine takes most of it.
    noisy = Row("", "between layers", "forward", 0.0, 50.0, 4.9, 50.0)
    assert told(noisy, Optimized()).advice == ""


def test_train_on_a_cpu_is_not_optimized():
    task = Task(net(), (torch.rand(1, 3, 16, 16),), True, torch.device("cpu"))
    assert "inference alone" in optimized_copy(task, 1.0, False).remark


def test_a_model_that_cannot_be_copied_is_profiled_all_the_same():
    class Uncopied(nn.ReLU):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    found = segfast.profile(Uncopied(), torch.rand(1, 3, 8, 8), seconds=0.01, progress=False)
    assert found.rows and found.expected_gain is None
    assert any("cannot be deep-copied (no copies)" in remark for remark in found.remarks)


@pytest.mark.parametrize(("gain", "expected"), [(KEPT, 1.5), (LEFT, 1.0), (None, None)])
def test_the_expected_gain_is_the_measured_one(monkeypatch, gain, expected):
    optimized = Optimized(segfast.optimize(net()), gain, str(gain))
    monkeypatch.setattr(profile, "optimized_copy", lambda task, budget, progress: optimized)
    found = segfast.profile(net(), torch.rand(1, 3, 16, 16), seconds=0.01, progress=False, optimize=True)
    assert found.expected_gain == expected
    assert str(gain) in found.remarks
    if gain is LEFT:  # the same model once more would only seem faster or slower
        assert found.optimized is None and "is not expected to make it faster" in str(found)
    else:
        assert found.optimized is not None and found.optimized.title.endswith(", optimized")
        assert {row.name for row in found.optimized.rows} >= {"0", "3"}


def test_the_model_itself_is_not_optimized():
    model = net()
    segfast.profile(model, torch.rand(1, 3, 16, 16), seconds=0.01, progress=False)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
