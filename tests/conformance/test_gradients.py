"""Gradients of every function: against differences in float64 and definitions, and only those asked for."""

import itertools
from collections import Counter

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import segfast
from tests.fused_conv import REFERENCE_ACTIVATIONS, draw

from .families import EXAMPLES, ON_ANY_CPU, on, over, with_hardsigmoid

# Of all ten those whose gradients are computed in different ways: from the output, or from what came before.
FEW_ACTIVATIONS = (None, "leaky_relu", "silu", "hardsigmoid")


def differentiates(example) -> bool:
    return example.differentiates


def is_convolution(example) -> bool:
    return bool(example.activations)


def has_pixels(example) -> bool:
    return example.differentiates and example.name not in ("upsample_cross_entropy", "upsample_dice")


def by_activation(activations=REFERENCE_ACTIVATIONS):
    """Parametrizes a test by `example` and, of those that take one, by `activation`."""
    cases = [
        pytest.param(each, activation, id=f"{each} {activation}")
        for each in filter(differentiates, EXAMPLES)
        for activation in (activations if each.activations else (None,))
    ]
    return pytest.mark.parametrize(("example", "activation"), cases)


def leaves_of(tensors, asked=None):
    """The tensors as leaves of their own, in their own strides; `asked`: those that want a gradient."""
    return {
        name: t.detach()
        .clone(memory_format=torch.preserve_format)
        .requires_grad_(asked is None or name in asked)
        for name, t in tensors.items()
    }


def assert_near(actual, expected, error, what=""):
    for (name, a), b in zip(actual.items(), expected.values(), strict=True):
        size = 1 + b.abs().max().item()
        torch.testing.assert_close(
            a.double(), b.double(), atol=error * size, rtol=error, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


def sum_of(results):
    """A scalar whose gradient is another at each place of each result."""
    # No random numbers: vmap takes none.
    return sum((y * torch.arange(1, 1 + y.numel()).sin().reshape(y.shape).to(y.dtype)).sum() for y in results)


@pytest.mark.parametrize("route", ON_ANY_CPU)
@by_activation()
def test_gradcheck_and_gradgradcheck(example, activation, route):
    tensors = leaves_of(example.tensors(torch.float64))

    def run(*leaves):
        return example.run(dict(zip(tensors, leaves, strict=True)), activation)

    # Along a random direction; of a loss, whose second gradients are small, in every one.
    fast = example.family != "segmentation_head"
    with on(route, example):
        assert torch.autograd.gradcheck(run, list(tensors.values()), fast_mode=fast)
        # torch's hardsigmoid has no second derivative; of our mean field as an operator see its own tests.
        twice = example.family != "dense_crf" or (route == "aten" and "filter" in example.name)
        if twice and (activation != "hardsigmoid" or route == "registered"):
            assert torch.autograd.gradgradcheck(run, list(tensors.values()), fast_mode=fast)


def first_and_second(run, tensors, activation):
    """{"output": ..., name: gradient, "second name": gradient of a gradient}."""
    leaves = leaves_of(tensors)
    results = run(leaves, activation)
    first = torch.autograd.grad(sum_of(y.square() for y in results), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum_of(first), list(leaves.values()))
    found = {f"output {i}": y.detach() for i, y in enumerate(results)}
    found |= dict(zip(leaves, first, strict=True))
    return found | {f"second {name}": t for name, t in zip(leaves, second, strict=True)}


@pytest.mark.interpreter
@by_activation(FEW_ACTIVATIONS)
def test_values_and_both_gradients_of_the_kernels(example, activation, poisoned_empty):
    if example.family == "dense_crf":
        pytest.skip("its kernels' gradients have tests of their own")
    tensors = example.tensors(channels_last=activation in (None, "silu"))
    wide = {name: t.double() for name, t in tensors.items()}
    expected = first_and_second(with_hardsigmoid(example.reference), wide, activation)
    with on("triton", example):
        actual = first_and_second(example.run, tensors, activation)
    assert_near({n: t.detach() for n, t in actual.items()}, expected, 3e-5)


@over(lambda example: not example.differentiates)
def test_labels_have_no_gradients(example):
    assert not any(y.requires_grad for y in example.run(leaves_of(example.tensors())))


UPSTREAM = {
    "sum": lambda y: y.sum(),
    "expanded": lambda y: (y * y.new_ones(1).expand_as(y)).sum(),
    "cat first": lambda y: torch.cat([y, y.detach()], 1).square().sum(),
    "cat second": lambda y: torch.cat([y.detach(), y], 1).square().sum(),
    "cat batch": lambda y: torch.cat([y.detach(), y], 0).square().sum(),
    "channel slice": lambda y: y[:, 1:].square().sum(),
    "row slice": lambda y: y[:, :, 1:-1].square().sum(),
    "every other": lambda y: y[..., ::2].square().sum(),
    "permuted": lambda y: (y.movedim(1, -1) * draw(*y.movedim(1, -1).shape)).sum(),
    "transposed": lambda y: (y.transpose(-2, -1) * draw(*y.transpose(-2, -1).shape)).sum(),
    "one pixel": lambda y: y[(0,) * y.dim()],
    "mean": lambda y: y.mean(tuple(range(2, y.dim()))).square().sum(),
}


def check_upstream(upstream, channels_last, example, route):
    tensors, found = example.tensors(channels_last=channels_last), []
    activation = "leaky_relu" if example.activations else None
    if route == "triton":
        # Without an epilogue, whose gradient would be dense, it comes to the kernels as it is.
        tensors, activation = example.least(tensors), None
    for run, dtype, way in ((example.reference, torch.float64, "aten"), (example.run, torch.float32, route)):
        leaves = leaves_of({name: t.to(dtype) for name, t in tensors.items()})
        with on(way, example):
            UPSTREAM[upstream](run(leaves, activation)[0]).backward()
        found.append({name: t.grad for name, t in leaves.items()})
    assert_near(found[1], found[0], example.error, upstream)


@pytest.mark.parametrize("route", ON_ANY_CPU)
@over(has_pixels)
def test_upstream_gradients_of_any_strides(example, route):
    for upstream, channels_last in itertools.product(UPSTREAM, (False, True)):
        check_upstream(upstream, channels_last, example, route)


# Those whose strides differ; in the others' backward torch fills a dense tensor.
STRIDED = ("sum", "cat first", "cat second", "cat batch", "permuted", "transposed", "mean")


@pytest.mark.interpreter
@pytest.mark.parametrize("upstream", STRIDED)
@over(lambda example: has_pixels(example) and example.family != "dense_crf")
def test_upstream_gradients_of_any_strides_on_the_kernels(example, upstream, poisoned_empty):
    check_upstream(upstream, upstream != "cat second", example, "triton")


def subsets_of(example):
    """Some operands, to ask for the gradients of: each main one, each two, all but the first, the last."""
    names = list(example.shapes(4))
    main = names[: example.required]
    yield from (set(each) for size in (1, 2) for each in itertools.combinations(main, size))
    yield from filter(None, ({names[-1]}, set(names[1:]), set(names[:-1])))


@pytest.mark.parametrize("route", ON_ANY_CPU)
@over(differentiates)
def test_only_the_gradients_asked_for_are_given(example, route):
    tensors = example.tensors()
    with on(route, example):
        full = leaves_of(tensors)
        sum_of(example.run(full)).backward()
        for asked in subsets_of(example):
            leaves = leaves_of(tensors, asked)
            sum_of(example.run(leaves)).backward()
            assert {name for name, t in leaves.items() if t.grad is not None} == asked
            assert_near({n: leaves[n].grad for n in asked}, {n: full[n].grad for n in asked}, 1e-5)


@pytest.mark.interpreter
@over(is_convolution)
def test_a_gradients_kernels_run_for_that_gradient_alone(example):
    launches = {}
    with on("triton", example), segfast.kernels.record_launches() as recorded:  # nothing is computed
        for asked in subsets_of(example):
            loss = sum_of(example.run(example.least(leaves_of(example.tensors(), asked))))
            recorded.clear()
            if loss.requires_grad:
                loss.backward()
            launches[frozenset(asked)] = Counter(launch.kernel.__name__ for launch, _ in recorded)
    for pair, both in launches.items():
        if len(pair) == 2 and pair <= {*example.least(example.shapes(4))}:
            first, second = (launches[frozenset({name})] for name in pair)
            assert both == first + second or both == first | second, pair
            # But for a list's images, whose gradients one launch computes; a skip's is a part of what comes.
            assert "skip" in pair or "input1" in pair or first != both != second, pair


@pytest.mark.parametrize("route", ON_ANY_CPU)
@over(differentiates)
def test_func_grad_and_gradients_of_each_sample(example, route):
    activation = "silu" if example.activations else None
    tensors = example.tensors()

    def loss(tensors, run=example.run):
        return sum_of(run(tensors, activation))

    wide = {name: t.double() for name, t in tensors.items()}
    expected = grad(lambda t: loss(t, example.reference))(wide)
    with on(route, example):
        assert_near(grad(loss)(tensors), expected, 5 * example.error)
        if example.family == "segmentation_head":
            return  # whose targets would have to be split as well
        apart = {n: t[:, None] if n in example.batched else t for n, t in tensors.items()}
        each = vmap(grad(loss), ({n: 0 if n in example.batched else None for n in tensors},))(apart)
    for i in range(2):
        sample = {n: t[i : i + 1] if n in example.batched else t for n, t in wide.items()}
        alone = grad(lambda t: loss(t, example.reference))(sample)
        assert_near({n: t[i] for n, t in each.items()}, alone, 5 * example.error)


@pytest.mark.parametrize("route", ON_ANY_CPU)
@over(differentiates)
def test_grad_modes(example, route):
    tensors = example.tensors()
    leaves = leaves_of(tensors, {[*tensors][example.required - 1]})
    with on(route, example):
        expected = example.run(leaves)
        assert all(y.requires_grad for y in expected)
        with torch.no_grad():
            results = example.run(leaves)
        assert not any(y.requires_grad for y in results)
        with torch.inference_mode():
            inferred = example.run(leaves)
        assert all(y.is_inference() for y in inferred)
        # What inference mode has left behind serves training.
        sum_of(example.run(leaves)).backward()
        plain = example.run(tensors)
        assert not any(y.requires_grad for y in plain)
    for other in (results, inferred, plain):
        for a, b in zip(other, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), atol=example.error, rtol=example.error)


@over(differentiates)
def test_the_backward_keeps_the_route_of_its_forward(example):
    # The choice is made once, in the forward; the setting at the time of backward does not matter.
    activation = "silu" if example.activations else None
    found = []
    for run, way in ((example.reference, "aten"), (example.run, "registered")):
        leaves = leaves_of(example.tensors())
        with on(way, example):
            loss = sum_of(run(leaves, activation))
        with segfast.backend("aten"):
            loss.backward()
        found.append({name: t.grad for name, t in leaves.items()})
    assert_near(found[1], found[0], example.error)


@pytest.mark.parametrize("route", ON_ANY_CPU)
@over(differentiates)
def test_hooks_see_the_gradient_once_and_may_change_it(example, route):
    gradients = []
    for factor in (2, 1):
        leaves, seen = leaves_of(example.tensors()), []
        leaf = leaves[[*leaves][example.required - 1]]
        with on(route, example):
            y = example.run(leaves)[0]
            y.register_hook(lambda g, factor=factor, seen=seen: seen.append("output") or factor * g)
            leaf.register_hook(lambda g, seen=seen: seen.append("leaf"))
            leaf.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append("accumulated"))
            y.sum().backward()
        assert seen == ["output", "leaf", "accumulated"]
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], 2 * gradients[1])


@by_activation()
def test_forward_mode_works_on_aten(example, activation):
    if example.family == "dense_crf":
        pytest.skip("has gradients backwards only")
    tensors = example.tensors()
    tangents = example.tensors(seed=50)
    found = []
    for run in (example.run, example.reference):
        with on("aten", example):
            _, tangent = jvp(lambda t, run=run: run(t, activation), (tensors,), (tangents,))
        found.append(dict(enumerate(tangent)))
    assert_near(*found, example.error)


@over(is_convolution)
def test_forward_mode_fails_loudly_on_our_operators(example):
    tensors = example.tensors()
    first = next(iter(tensors))

    def run(t):
        return example.run(tensors | {first: t})

    fails = pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward")
    with on("registered", example):
        with fails:
            jvp(run, (tensors[first],), (tensors[first],))
        for asks in (False, True):
            with forward_ad.dual_level(), fails:
                run(forward_ad.make_dual(tensors[first].clone().requires_grad_(asks), tensors[first]))
