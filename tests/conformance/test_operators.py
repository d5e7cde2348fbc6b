"""Duties of every registered operator to torch: opcheck, fakes, decompositions, FLOPs, transforms."""

import functools
import itertools
import types

import pytest
import torch
from torch.func import grad, vmap
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.functional import __all__ as FUNCTIONS
from segfast.ops import FAMILIES, OPERATORS
from segfast.ops._operator import Differentiable, Operator
from tests.fused_conv import draw
from tests.operators import check_decomposition, check_fake

from .families import EXAMPLES, ON_ANY_CPU, on, over


@functools.cache
def operator_calls() -> dict[str, list[tuple]]:
    """The arguments of every operator, as the examples come to them: of all operands and of the least.

    In both layouts and with several channels and one that come out.
    """
    calls = {name: {} for name in OPERATORS}

    def record(operator, *args):
        args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        kind = tree_map_only(torch.Tensor, lambda t: (t.shape, t.stride(), t.dtype), args)
        calls[operator.name].setdefault(str(kind), args)
        return operator.reference(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operator, "__call__", record)
        for example, channels_last, channels in itertools.product(EXAMPLES, (False, True), (4, 1)):
            tensors = example.tensors(channels_last=channels_last, channels=channels)
            for operands, activation in ((tensors, "gelu"), (example.least(tensors), None)):
                with on("registered", example):
                    example.run(operands, activation)
                    for asked in ({next(iter(operands))}, set(operands)) if example.differentiates else ():
                        leaves = {name: t.requires_grad_(name in asked) for name, t in operands.items()}
                        results = example.run(leaves, activation)
                        sum(y.square().sum() for y in results).backward()
                    [t.requires_grad_(False) for t in operands.values()]
    return {name: list(each.values()) for name, each in calls.items()}


def test_every_family_and_function_has_an_example():
    assert {example.family for example in EXAMPLES} == {*FAMILIES}
    named = {example.name.partition(" ")[0] for example in EXAMPLES}
    assert named == {*FUNCTIONS} - {"skipped_share", "roi_pool"}  # which have no operators


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator):
    first, *_, last = operator_calls()[operator]
    for args in (first, last):
        torch.library.opcheck(OPERATORS[operator].overload, args)


@pytest.mark.interpreter
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck_of_the_kernels(operator):
    # The same operators: this session's implementation is the kernels.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPERATORS[operator].overload, operator_calls()[operator][-1], test_utils=tests)


@pytest.mark.parametrize("operator", OPERATORS)
def test_fakes_have_the_shape_and_strides_of_the_real_thing(operator):
    for args in operator_calls()[operator]:
        check_fake(OPERATORS[operator].overload, args)


@pytest.mark.interpreter
@pytest.mark.parametrize("operator", OPERATORS)
def test_fakes_have_the_shape_and_strides_of_the_kernels(operator):
    with segfast.kernels.record_launches():  # nothing is computed
        for args in operator_calls()[operator]:
            check_fake(OPERATORS[operator].overload, args)


@pytest.mark.interpreter
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_and_decompositions_agree(operator, poisoned_empty):
    for args in operator_calls()[operator]:
        check_decomposition(OPERATORS[operator].overload, args)


def test_the_short_way_into_autograd_is_the_c_function():
    # Not Function.apply, which binds its signature on every call.
    functions = Differentiable.__subclasses__()
    assert len({function.__module__ for function in functions}) >= len(FAMILIES)
    assert all(isinstance(function._apply, types.BuiltinMethodType) for function in functions)


@over(lambda example: example.differentiates)
def test_function_apply_is_taken_only_under_a_transform(example, monkeypatch):
    taken, apply = [], Differentiable.apply.__func__
    monkeypatch.setattr(Differentiable, "apply", classmethod(lambda *args: taken.append(1) or apply(*args)))
    tensors = {name: t.requires_grad_() for name, t in example.tensors().items()}
    with on("registered", example):
        example.run(tensors)[0].sum().backward()
        assert taken == []
        plain = {name: t.detach() for name, t in tensors.items()}
        grad(lambda t: example.run(t)[0].sum())(plain)
    assert taken


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@over(lambda each: each.flops > 0)
def test_flops_are_those_counted_by_hand(example):
    tensors = example.least(example.tensors())
    with on("registered", example):
        assert flops_of(lambda: example.run(tensors)) == example.flops
        if example.differentiates:
            leaves = {name: t.requires_grad_() for name, t in tensors.items()}
            times = 4 if example.family == "dense_crf" else 3
            both = flops_of(lambda: example.run(leaves)[0].sum().backward())
            again = example.name == "separable_conv2d"  # its backward computes the depthwise result again
            assert both == times * example.flops + again * example.flops * 9 // 13
    if example.family not in ("segmentation_head", "dense_crf"):
        with on("aten", example):  # but for gradients of groups, of which ATen's formula knows nothing
            assert flops_of(lambda: example.run(example.least(example.tensors()))) == example.flops


def axes(example) -> list[dict[str, int]]:
    """The operands that are mapped over, and at which of their dimensions."""
    names = list(example.shapes(4))
    batched = [name for name in names if name in example.batched]
    alone = [name for name in names[: example.required] if name not in batched]
    several = {name: i % (1 + len(example.shapes(4)[name])) for i, name in enumerate(names)}
    return [{names[0]: 0}, dict.fromkeys(batched, 1), *({n: 0} for n in alone), *[several] * (len(names) > 1)]


def check_mapped(run, define, tensors, mapped, error):
    """`run` over a further dimension of the operands `mapped`, against `define` of each."""
    several = tensors | {
        name: torch.stack([draw(*tensors[name].shape, seed=9 * i) for i in range(3)], axis)
        for name, axis in mapped.items()
    }
    in_dims = ({name: mapped.get(name) for name in several},)
    actual = vmap(run, in_dims)(several)
    for i in range(3):
        sample = {n: t.select(mapped[n], i) if n in mapped else t for n, t in several.items()}
        for a, b in zip(actual, define(sample), strict=True):
            torch.testing.assert_close(a[i], b, atol=error * (1 + b.abs().max().item()), rtol=error)


@pytest.mark.parametrize("route", ON_ANY_CPU)
@pytest.mark.parametrize(
    ("example", "mapped"),
    [pytest.param(each, mapped, id=f"{each} {mapped}") for each in EXAMPLES for mapped in axes(each)],
)
def test_vmap_over_any_operand(example, mapped, route):
    with on(route, example):
        check_mapped(example.run, example.reference, example.tensors(), mapped, 10 * example.error)
