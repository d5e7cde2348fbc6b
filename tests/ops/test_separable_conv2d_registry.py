"""The depthwise and separable operators as torch sees them: opcheck, fakes, FLOPs, transforms."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from segfast.ops import OPERATORS
from segfast.ops.separable_conv2d import FORWARD
from tests.fused_conv import ACTIVATIONS, BACKENDS, INTERPRETING_ONLY, draw
from tests.operators import check_decomposition, check_fake, operators_of
from tests.separable import define_separable, plain_depthwise

pytestmark = pytest.mark.usefixtures("small_tiles")


def operator_calls(channels_last: bool, channels: int, multiplier: int):
    """(operator, arguments): each with everything and with next to nothing, detached, of odd sizes."""

    def t(*shape, seed=0):
        return draw(*shape, seed=seed, channels_last=channels_last and len(shape) == 4)

    filters = channels * multiplier
    x, w, y = t(2, channels, 5, 3), t(filters, 1, 3, 3), t(2, filters, 3, 2)
    vectors = [t(filters, seed=i) for i in range(3)]
    geometry = ([2, 2], [1, 1], [1, 1])
    plain = ([1, 1], [0, 1], [2, 1])
    for name in ("depthwise_conv2d", "depthwise_conv2d_statistics"):
        yield OPERATORS[name].overload, (x, w, *vectors, *geometry, "gelu", 0.1)
        yield OPERATORS[name].overload, (x, w, None, None, None, *plain, None, 0.0)
    yield OPERATORS["depthwise_conv2d_grad_input"].overload, (y, w, channels, 5, 3, *geometry)
    yield OPERATORS["depthwise_conv2d_grad_input"].overload, (y, w, channels, 6, 4, *geometry)
    yield OPERATORS["depthwise_conv2d_grad_weight"].overload, (y, x, w, *geometry)
    pointwise, residual = t(7, filters, 1, 1), t(2, 7, 3, 2)
    rest = [t(7, seed=i) for i in range(3)]
    separable = OPERATORS["separable_conv2d"].overload
    yield separable, (x, w, *vectors, pointwise, *rest, residual, *geometry, "relu6", "silu", 0.1)
    yield separable, (x, w, None, None, None, pointwise, *[None] * 4, *plain, None, None, 0.0)


CALLS = {
    f"{call[0]._name.removeprefix('segfast::')} {i} {layout} c{c}m{m}": call
    for layout, (c, m) in itertools.product(("nchw", "channels_last"), ((5, 1), (1, 1), (3, 2)))
    for i, call in enumerate(operator_calls(layout == "channels_last", c, m))
}


def test_every_operator_has_a_call_here():
    assert {name.split()[0] for name in CALLS} == operators_of("separable_conv2d")
    assert len(operators_of("separable_conv2d")) == 5


@pytest.mark.parametrize("name", [n for n in CALLS if n.endswith("c3m2")])
def test_opcheck(name):
    torch.library.opcheck(*CALLS[name])


@INTERPRETING_ONLY
@pytest.mark.parametrize("name", [n for n in CALLS if n.endswith("last c5m1")])
def test_opcheck_of_the_kernels(name):
    torch.library.opcheck(*CALLS[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", CALLS)
def test_fakes_have_the_shape_and_strides_of_the_real_thing(name):
    check_fake(*CALLS[name])


@INTERPRETING_ONLY
@pytest.mark.parametrize("name", CALLS)
def test_fakes_have_the_shape_and_strides_of_the_kernels(name):
    with segfast.kernels.record_launches():  # nothing is computed
        check_fake(*CALLS[name])


@INTERPRETING_ONLY
@pytest.mark.parametrize("name", CALLS)
def test_kernels_and_decompositions_agree(name, poisoned_empty):
    check_decomposition(*CALLS[name])


@INTERPRETING_ONLY
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_flops_are_counted_as_atens(multiplier, backward):
    counts = []
    for backend in ("aten", "triton"):
        x, w = draw(2, 3, 5, 4).requires_grad_(), draw(3 * multiplier, 1, 3, 2).requires_grad_()
        with FlopCounterMode(display=False) as counter, segfast.backend(backend):
            y = depthwise_conv2d(x, w, stride=2, padding=1)
            if backward:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    forward = 2 * (2 * 3 * 3) * 3 * multiplier * 6
    if not backward:
        assert counts[0] == counts[1]
    # ATen's formula for the weight's gradient forgets the groups; ours is three times the forward.
    assert counts[1] == forward * (3 if backward else 1)


@INTERPRETING_ONLY
def test_flops_of_statistics_and_of_the_separable_operator():
    x, w, pointwise = draw(2, 3, 5, 4), draw(6, 1, 3, 3), draw(5, 6, 1, 1)
    counts = []
    for backend in ("aten", "triton"):
        with FlopCounterMode(display=False) as counter, segfast.backend(backend):
            separable_conv2d(x, w, pointwise, padding=1)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 20 * 6 * (9 + 5)] * 2
    with FlopCounterMode(display=False) as counter, segfast.backend("triton"):
        depthwise_conv2d(x, w, padding=1, return_statistics=True)
    assert counter.get_total_flops() == 2 * 2 * 20 * 6 * 9


def loss(weight, x, bias=None):
    return depthwise_conv2d(x, weight, bias, stride=2, padding=1, activation="silu").square().sum()


def reference_loss(weight, x, bias=None):
    return F.silu(plain_depthwise(x, weight, bias, 2, 1)).square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_and_per_sample_gradients(backend):
    w, x, bias = draw(3, 1, 3, 3), draw(4, 1, 3, 4, 3), draw(3)
    with segfast.backend(backend):
        actual = grad(loss, argnums=(0, 1, 2))(w, x[0], bias)
        each = vmap(grad(loss), in_dims=(None, 0, None))(w, x, bias)
        second = grad(lambda w: grad(loss)(w, x[0]).square().sum())(w)
    expected = grad(reference_loss, argnums=(0, 1, 2))(w, x[0], bias)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    loop = torch.stack([grad(reference_loss)(w, sample, bias) for sample in x])
    torch.testing.assert_close(each, loop, atol=1e-4, rtol=1e-4)
    twice = grad(lambda w: grad(reference_loss)(w, x[0].double()).square().sum())(w.double())
    torch.testing.assert_close(second.double(), twice, atol=1e-3, rtol=1e-4)


def separable_loss(run, tensors):
    options = {"padding": 1, "depthwise_activation": "relu6", "activation": "silu"}
    return run(**tensors, **options).square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_and_per_sample_gradients_of_the_separable_operator(backend):
    tensors = {
        "input": draw(1, 3, 3, 4),
        "depthwise_weight": draw(3, 1, 3, 3),
        "pointwise_weight": draw(4, 3, 1, 1),
        "depthwise_scale": draw(3),
        "scale": draw(4),
        "residual": draw(1, 4, 3, 4),
    }
    images = draw(3, 1, 3, 3, 4, seed=5)

    def gradients(run, tensors, image=None):
        return grad(lambda t: separable_loss(run, t))(tensors | ({} if image is None else {"input": image}))

    with segfast.backend(backend):
        actual = gradients(separable_conv2d, tensors)
        each = vmap(lambda image: gradients(separable_conv2d, tensors, image))(images)
    torch.testing.assert_close(actual, gradients(define_separable, tensors), atol=1e-4, rtol=1e-4)
    for i, image in enumerate(images):
        expected = gradients(define_separable, tensors, image)
        torch.testing.assert_close({n: t[i] for n, t in each.items()}, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None, None),
        (None, 0, None, None),
        (None, None, 0, None),
        (None, None, None, 0),
        (0, None, None, 0),
        (1, None, None, 3),
        (2, 1, 0, None),
    ],
)
def test_vmap_over_any_operand(in_dims, backend):
    shapes = ((2, 3, 2, 3), (3, 1, 3, 3), (4, 3, 1, 1), (2, 4, 2, 3))
    operands = [
        draw(*shape) if d is None else draw(*shape[:d], 5, *shape[d:])
        for shape, d in zip(shapes, in_dims, strict=True)
    ]

    def run(function):
        return lambda x, w, p, r: function(x, w, p, padding=1, residual=r, activation="relu")

    with segfast.backend(backend):
        mapped = vmap(run(separable_conv2d), in_dims)(*operands)
    samples = [
        [t if d is None else t.select(d, i) for t, d in zip(operands, in_dims, strict=True)] for i in range(5)
    ]
    expected = torch.stack([run(define_separable)(*sample) for sample in samples])
    torch.testing.assert_close(mapped, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_dims", [(0, None), (1, 0), (None, 2)])
def test_vmap_of_the_statistics(in_dims, backend):
    shapes = ((2, 3, 3, 2), (3, 1, 3, 3))
    operands = [
        draw(*shape) if d is None else draw(*shape[:d], 4, *shape[d:])
        for shape, d in zip(shapes, in_dims, strict=True)
    ]

    def run(x, w):
        return depthwise_conv2d(x, w, padding=1, activation="relu", return_statistics=True)

    with segfast.backend(backend):
        mapped = vmap(run, in_dims)(*operands)
    for i in range(4):
        x, w = (t if d is None else t.select(d, i) for t, d in zip(operands, in_dims, strict=True))
        y = F.relu(plain_depthwise(x, w, padding=1))
        expected = (y, y.sum((2, 3)), y.square().sum((2, 3)))
        torch.testing.assert_close(tuple(t[i] for t in mapped), expected, atol=1e-4, rtol=1e-5)


@INTERPRETING_ONLY
def test_vmap_over_the_input_is_one_launch_and_over_the_weight_one_each():
    x, w = draw(5, 2, 3, 3, 3), draw(3, 1, 3, 3)
    with segfast.backend("triton"):
        for args, dims, launches in (((x, w), (0, None), 1), ((x[0], w.expand(5, 3, 1, 3, 3)), (None, 0), 5)):
            with segfast.kernels.record_launches() as recorded:
                vmap(lambda a, b: depthwise_conv2d(a, b, padding=1), dims)(*args)
            assert len(recorded) == launches


def test_forward_mode_works_on_aten():
    x, tangent, w, p = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1), draw(3, 1, 3, 3), draw(4, 3, 1, 1)
    residual = draw(1, 4, 4, 4)
    for activation in ACTIVATIONS:
        options = {"padding": 1, "residual": residual, "activation": activation}

        def run(function, options=options):
            return torch.func.jvp(lambda x: function(x, w, p, **options), (x,), (tangent,))

        slope = {"negative_slope": 0.2} if activation == "leaky_relu" else {}
        with segfast.backend("aten"):
            actual = run(lambda *args, **o: separable_conv2d(*args, **o, **slope))  # noqa: B023
        torch.testing.assert_close(actual, run(define_separable), atol=1e-5, rtol=1e-5)


@INTERPRETING_ONLY
@pytest.mark.parametrize("run", [depthwise_conv2d, separable_conv2d])
def test_forward_mode_fails_loudly_on_our_kernels(run):
    x, weights = draw(1, 3, 4, 4), [draw(3, 1, 3, 3), draw(4, 3, 1, 1)]
    weights = weights if run is separable_conv2d else weights[:1]
    with (
        segfast.backend("triton"),
        pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward"),
    ):
        torch.func.jvp(lambda x: run(x, *weights), (x,), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_swaps_the_parameters(backend):
    layer = segfast.nn.DepthwiseConv2d(3, 3, 3, padding=1)
    other = {"weight": draw(3, 1, 3, 3).requires_grad_(), "bias": draw(3)}
    x = draw(1, 3, 2, 2)
    with segfast.backend(backend):
        y = functional_call(layer, other, (x,))
        (gradient,) = torch.autograd.grad(y.sum(), other["weight"])
    torch.testing.assert_close(y, plain_depthwise(x, other["weight"], other["bias"], padding=1))
    assert layer.weight.grad is None and gradient.abs().sum() > 0


@INTERPRETING_ONLY
def test_the_dispatcher_is_passed_by_unless_somebody_listens(monkeypatch):
    through = []
    overload = FORWARD.overload
    monkeypatch.setattr(FORWARD, "overload", lambda *args: through.append(1) or overload(*args))
    x, w = draw(1, 3, 3, 3), draw(3, 1, 3, 3)
    with segfast.backend("triton"):
        depthwise_conv2d(x, w)
        assert through == []
        with FlopCounterMode(display=False):
            depthwise_conv2d(x, w)
    assert through == [1]


@INTERPRETING_ONLY
def test_a_remembered_call_computes_anew(poisoned_empty, checked_plans):
    # The second call of a layout goes straight to the launch: with other values, through another alignment.
    store = draw(400)
    with segfast.backend("triton"):
        for offset in (0, 0, 4, 1, 1, 0):
            x = store[offset : offset + 36].view(1, 3, 3, 4).permute(0, 3, 1, 2)
            w = store[100 + offset : 136 + offset].view(3, 3, 1, 4).permute(3, 2, 0, 1)
            p = store[200 + offset : 220 + offset].view(5, 4, 1, 1)
            y = depthwise_conv2d(x, w, padding=1, activation="relu")
            expected = F.relu(plain_depthwise(x, w, padding=1))
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
            z = separable_conv2d(x, w, p, padding=1, depthwise_activation="relu")
            torch.testing.assert_close(z, F.conv2d(expected, p), atol=1e-5, rtol=1e-5)


@INTERPRETING_ONLY
def test_a_remembered_call_tells_its_options_apart():
    x, w, p = draw(1, 4, 5, 5, channels_last=True), draw(3, 3, 1, 4).permute(3, 2, 0, 1), draw(4, 4, 1, 1)
    cases = [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"activation": "relu"},
             {"activation": "leaky_relu", "negative_slope": 0.5},
             {"activation": "leaky_relu", "negative_slope": 0.1}]  # fmt: skip
    for _ in range(2):
        for options in cases:
            with segfast.backend("aten"):
                expected = depthwise_conv2d(x, w, **options), separable_conv2d(x, w, p, **options)
            with segfast.backend("triton"):
                actual = depthwise_conv2d(x, w, **options), separable_conv2d(x, w, p, **options)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@INTERPRETING_ONLY
@pytest.mark.parametrize("form", ["fused", "two kernels"])
def test_a_remembered_call_does_not_forget_the_precision(form):
    from segfast.kernels import Config, override_config

    x, w = draw(1, 8, 3, 3, channels_last=True), draw(3, 3, 1, 8).permute(3, 2, 0, 1)
    p = draw(8, 8, 1, 1)
    conv = torch.backends.cudnn.conv
    before, precisions = conv.fp32_precision, []
    try:
        with (
            segfast.backend("triton"),
            override_config("separable_conv2d_forward", Config(16, 16, 16, 4, 1, form=form)),
        ):
            for precision in ("ieee", "tf32", "ieee"):
                conv.fp32_precision = precision
                with segfast.kernels.record_launches() as launches:
                    separable_conv2d(x, w, p)
                precisions.append(launches[-1][0].constants["PRECISION"])
    finally:
        conv.fp32_precision = before
    assert precisions == ["tf32x3", "tf32", "tf32x3"]
