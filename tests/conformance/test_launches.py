"""A call's launches: how many, past the dispatcher, and remembered from the call before."""

import pytest
import torch
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.ops import OPERATORS
from tests.fused_conv import precisions_of

from .families import on, over

pytestmark = pytest.mark.interpreter


def is_ours(example) -> bool:
    """True but for the dense CRF: a filter or a mean field is many launches, tested in its own folder."""
    return example.family != "dense_crf"


def is_product(example) -> bool:
    return bool(example.activations) and not example.name.startswith("depthwise")


@over(lambda example: example.activations and "parallel" not in example.name)
def test_vmap_over_the_batch_is_one_call_and_over_a_weight_one_each(example):
    tensors = example.tensors()
    weights = [name for name in example.least(tensors) if name not in example.batched]
    with on("triton", example), segfast.kernels.record_launches() as recorded:

        def launches(mapped):
            recorded.clear()
            several = {n: t.expand(5, *t.shape) if n in mapped else t for n, t in tensors.items()}
            vmap(example.run, ({n: 0 if n in mapped else None for n in tensors},))(several)
            return len(recorded)

        example.run(tensors)
        once = len(recorded)
        assert launches(example.batched) == once >= 1
        assert [launches((name,)) for name in weights] == [5 * once] * len(weights)


class Wrapped(torch.Tensor):
    """A subclass may mean anything."""


@over(is_ours)
def test_the_dispatcher_is_passed_by_unless_somebody_listens(example, monkeypatch):
    through = []
    for operator in OPERATORS.values():
        overload = operator.overload
        listening = lambda *args, overload=overload: through.append(1) or overload(*args)  # noqa: E731
        monkeypatch.setattr(operator, "overload", listening)
    tensors = example.least(example.tensors())
    first, *rest = tensors

    def count(tensors=tensors):
        through.clear()
        example.run(tensors)
        return len(through)

    with on("triton", example), segfast.kernels.record_launches():
        assert count() == 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert count() == 1
        assert any(event.key.startswith("segfast::") for event in profile.key_averages())
        with FlopCounterMode(display=False):
            assert count() == 1
        through.clear()
        vmap(example.run, ({n: 0 if n == first else None for n in tensors},))(
            tensors | {first: tensors[first][None]}
        )
        assert len(through) > 0
        for name in (first, *rest[:1]):
            assert count(tensors | {name: tensors[name].as_subclass(Wrapped)}) == 1
            assert count(tensors | {name: torch.nn.Parameter(tensors[name], requires_grad=False)}) == 0


def placed(tensor, offset):
    """The values in channels_last, so many elements from where memory is aligned."""
    dense = tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    return (
        torch.empty(dense.numel() + 8)[offset:].as_strided(dense.shape, dense.stride(), offset).copy_(dense)
    )


@over(is_ours)
def test_a_remembered_call_computes_anew(example, poisoned_empty, checked_launches):
    # The second call of a layout goes straight to the launch: with other values, through another alignment.
    for seed, offset in enumerate((0, 0, 4, 1, 1, 0)):
        tensors = {name: placed(t, offset) for name, t in example.tensors(seed=seed).items()}
        with on("triton", example):
            actual = example.run(tensors, "relu")
        for a, b in zip(actual, example.reference(tensors, "relu"), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * (1 + b.abs().max().item()), rtol=1e-5)


@over(lambda example: bool(example.others))
def test_a_remembered_call_tells_its_options_apart(example):
    tensors = example.tensors(channels_last=True)
    tensors.pop("residual", None)
    cases = [(options, "relu", tensors) for options in example.others]
    cases += [(example.options, activation, tensors) for activation in (None, "relu")]
    cases += [(example.options | {"negative_slope": slope}, "leaky_relu", tensors) for slope in (0.5, 0.1)]
    for name in list(tensors)[example.required :]:
        cases.append((example.options, "relu", {n: t for n, t in tensors.items() if n != name}))
    for options, activation, operands in 2 * cases:
        given = options | dict.fromkeys(example.activations, activation)
        found = []
        for route in ("aten", "triton"):
            with on(route, example):
                found.append(example.ours(**operands, **given))
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-5, msg=lambda m, given=given: f"{given}: {m}")


@over(is_product)
@pytest.mark.parametrize("differentiates", [False, True])
def test_a_remembered_call_does_not_forget_the_precision(example, differentiates):
    # In the kernels' own layout: a call that copies its operands is not remembered.
    least = example.least(example.tensors(channels_last=True))
    tensors = {n: t.requires_grad_(differentiates) for n, t in least.items()}

    def run():
        results = example.run(tensors)
        if differentiates:
            sum(y.sum() for y in results).backward()

    assert precisions_of(run) == [{"tf32x3"}, {"tf32"}, {"tf32x3"}]
