"""The five operators of conv2d as torch sees them: opcheck, fakes, FLOPs, transforms."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.functional import conv2d, parallel_conv2d
from segfast.ops import OPERATORS
from segfast.ops.dilated_conv2d import FORWARD
from tests.dilated import DENSE, ZONED, define_parallel, launched, names, tiles
from tests.fused_conv import ACTIVATIONS, BACKENDS, INTERPRETING_ONLY, draw, fused
from tests.operators import check_decomposition, check_fake, operators_of


@pytest.fixture(autouse=True)
def small_tiles():
    """Few steps for the interpreter: all sizes here fit one tile."""
    with tiles(64, 16, 64):
        yield


def operator_calls(channels_last: bool, filters: int):
    """(operator, arguments): each with everything and with next to nothing, detached, of odd sizes."""

    def t(*shape, seed=0):
        return draw(*shape, seed=seed, channels_last=channels_last and len(shape) == 4)

    def op(name):
        return OPERATORS[name].overload

    x, w, y = t(2, 4, 5, 3), t(filters, 4, 3, 2), t(2, filters, 3, 2)
    vectors = [t(filters, seed=i) for i in range(3)]
    geometry = ([2, 2], [1, 1], [1, 2])
    yield op("conv2d"), (x, w, *vectors, y, *geometry, 1, "gelu", 0.1)
    yield op("conv2d"), (x, w, *[None] * 4, [1, 1], [0, 1], [2, 1], 1, None, 0.0)
    grouped = t(2 * filters, 2, 1, 1), [1, 1], [0, 0], [1, 1], 2
    yield op("conv2d"), (x, grouped[0], *[None] * 4, *grouped[1:], "relu", 0.0)
    yield op("conv2d_grad_input"), (y, w, 5, 3, *geometry, 1)
    yield op("conv2d_grad_input"), (t(2, filters, 3, 2), w, 5, 3, [1, 1], [0, 0], [1, 1], 1)
    yield op("conv2d_grad_input"), (t(2, 2 * filters, 5, 3), grouped[0], 5, 3, *grouped[1:])
    yield op("conv2d_grad_weight"), (y, x, w, *geometry, 1)
    yield op("conv2d_grad_weight"), (t(2, 2 * filters, 5, 3), x, *grouped)
    others = [t(2, 1, 6, 3), t(2, 3, 5, 4)]
    wide = t(filters, 8, 3, 2)
    yield op("conv2d_concat"), (x, others, wide, *vectors, y, *geometry, "silu", 0.1)
    yield op("conv2d_concat"), (x, others[:1], wide[:, :5], *[None] * 4, [1, 1], [1, 0], [2, 1], None, 0.0)
    weights = [t(filters, 4, 1, 1), t(filters, 4, 3, 3), t(2, 4, 1, 3)]
    scale = t(2 * filters + 2)
    yield op("parallel_conv2d"), (x, weights, scale, scale, [1, 1, 2, 2, 1, 3], "relu", 0.0)
    yield op("parallel_conv2d"), (x, weights[:1], None, None, [1, 1], None, 0.0)


CALLS = {
    f"{call[0]._name.removeprefix('segfast::')} {i} {layout} {c}": call
    for layout, c in itertools.product(("nchw", "channels_last"), (5, 1))
    for i, call in enumerate(operator_calls(layout == "channels_last", c))
}


def test_every_operator_has_a_call_here():
    assert {name.split()[0] for name in CALLS} == operators_of("dilated_conv2d")
    assert len(operators_of("dilated_conv2d")) == 5


@pytest.mark.parametrize("name", [n for n in CALLS if n.endswith("5")])
def test_opcheck(name):
    torch.library.opcheck(*CALLS[name])


@INTERPRETING_ONLY
@pytest.mark.parametrize("name", [n for n in CALLS if n.endswith("last 5")])
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
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 2)])
def test_flops_are_counted_as_atens(stride, groups, backward):
    counts = []
    for backend in ("aten", "triton"):
        x, w = draw(2, 4, 5, 4).requires_grad_(), draw(6, 4 // groups, 3, 2).requires_grad_()
        with FlopCounterMode(display=False) as counter, segfast.backend(backend):
            y = conv2d(x, w, stride=stride, padding=1, groups=groups)
            if backward:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    forward = 2 * y.numel() * w[0].numel()
    if groups == 1 or not backward:
        assert counts[0] == counts[1]
    # ATen's formula for the weight's gradient forgets the groups; ours is three times the forward.
    assert counts[1] == forward * (3 if backward else 1)


@INTERPRETING_ONLY
@pytest.mark.parametrize("backward", [False, True])
def test_flops_of_lists_and_branches(backward):
    w, weights = draw(3, 6, 3, 3).requires_grad_(), [draw(2, 2, 1, 1), draw(3, 2, 3, 3)]
    images = [draw(1, 2, 5, 6).requires_grad_(), draw(1, 4, 4, 4).requires_grad_()]
    weights = [t.requires_grad_(backward) for t in weights]
    counts = {"list": [], "branches": []}
    for backend in ("aten", "triton"):
        for name, run in {
            "list": lambda: conv2d(images, w, padding=1),
            "branches": lambda: parallel_conv2d(
                images[0] if backward else images[0].detach(), weights, (1, 2)
            ),
        }.items():
            with FlopCounterMode(display=False) as counter, segfast.backend(backend):
                y = run()
                if backward:
                    y.sum().backward()
            counts[name].append(counter.get_total_flops())
    assert counts["list"] == [2 * 16 * 3 * 54 * (3 if backward else 1)] * 2
    assert counts["branches"] == [2 * 30 * (2 * 2 + 3 * 18) * (3 if backward else 1)] * 2


def loss(weight, x, bias=None):
    return conv2d(x, weight, bias, padding=2, dilation=2, activation="silu").square().sum()


def reference_loss(weight, x, bias=None):
    return F.silu(F.conv2d(x, weight, bias, padding=2, dilation=2)).square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_and_per_sample_gradients(backend):
    w, x, bias = draw(2, 3, 3, 3), draw(3, 1, 3, 3, 2), draw(2)
    with segfast.backend(backend):
        actual = grad(loss, argnums=(0, 1, 2))(w, x[0], bias)
        each = vmap(grad(loss), in_dims=(None, 0, None))(w, x, bias)
        second = grad(lambda w: grad(loss)(w, x[0]).square().sum())(w)
    expected = grad(reference_loss, argnums=(0, 1, 2))(w, x[0], bias)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    loop = torch.stack([grad(reference_loss)(w, sample, bias) for sample in x])
    torch.testing.assert_close(each, loop, atol=1e-4, rtol=1e-4)
    twice = grad(lambda w: grad(reference_loss)(w, x[0].double()).square().sum())(w.double())
    assert (second - twice).abs().max() <= 1e-5 * twice.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_and_vmap_of_lists_and_branches(backend):
    images = [draw(2, 1, 2, 4, 3), draw(2, 1, 3, 3, 3)]
    w, weights = draw(2, 5, 3, 3), [draw(2, 2, 1, 1), draw(1, 2, 3, 3)]

    def of_list(first, second, w):
        return conv2d([first, second], w, padding=1, activation="silu")

    def define_list(first, second, w):
        return F.silu(F.conv2d(torch.cat([first[:, :, :3], second], 1), w, padding=1))

    def branches(first, *weights):
        return parallel_conv2d(first, weights, (1, 2), activation="silu")

    def define_branches(first, *weights):
        return define_parallel(first, (1, 2), activation="silu", a=weights[0], b=weights[1])

    for run, define, args in (
        (of_list, define_list, (*images, w)),
        (branches, define_branches, (images[0], *weights)),
    ):
        mapped = tuple(0 if t.dim() == 5 else None for t in args)
        with segfast.backend(backend):
            values = vmap(run, mapped)(*args)
            each = vmap(grad(lambda *a, run=run: run(*a).square().sum(), argnums=tuple(range(3))), mapped)(
                *args
            )
        for i in range(2):
            sample = [t[i] if t.dim() == 5 else t for t in args]
            torch.testing.assert_close(values[i], define(*sample), atol=1e-5, rtol=1e-5)
            expected = grad(lambda *a, define=define: define(*a).square().sum(), argnums=tuple(range(3)))(
                *sample
            )
            torch.testing.assert_close(tuple(t[i] for t in each), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "in_dims",
    [(0, None, None), (None, 0, None), (0, 0, None), (None, None, 0), (0, None, 0), (1, None, 3), (2, 1, 0)],
)
def test_vmap_over_any_operand(in_dims, backend):
    shapes = ((2, 3, 2, 3), (4, 3, 3, 3), (2, 4, 2, 3))
    operands = [
        draw(*shape) if d is None else draw(*shape[:d], 3, *shape[d:])
        for shape, d in zip(shapes, in_dims, strict=True)
    ]

    def run(x, w, residual):
        return conv2d(x, w, padding=1, residual=residual, activation="relu")

    with segfast.backend(backend):
        mapped = vmap(run, in_dims)(*operands)
    samples = [
        [t if d is None else t.select(d, i) for t, d in zip(operands, in_dims, strict=True)] for i in range(3)
    ]
    expected = torch.stack([F.relu(F.conv2d(x, w, padding=1) + r) for x, w, r in samples])
    torch.testing.assert_close(mapped, expected, atol=1e-5, rtol=1e-5)


@INTERPRETING_ONLY
def test_vmap_over_the_input_is_one_launch_and_over_the_weight_one_each():
    x, w = draw(5, 2, 3, 3, 3), draw(4, 3, 3, 3)
    with segfast.backend("triton"):
        for args, dims, launches in (((x, w), (0, None), 1), ((x[0], w.expand(5, 4, 3, 3, 3)), (None, 0), 5)):
            with segfast.kernels.record_launches() as recorded:
                vmap(lambda a, b: conv2d(a, b, padding=1), dims)(*args)
            assert len(recorded) == launches


def test_forward_mode_works_on_aten():
    x, tangent, w = draw(1, 3, 5, 4), draw(1, 3, 5, 4, seed=1), draw(2, 3, 3, 3)
    vectors = {"bias": draw(2), "scale": draw(2, seed=1), "residual": draw(1, 2, 5, 4)}
    for activation in ACTIVATIONS:
        options = {"padding": 2, "dilation": 2, "activation": activation, **vectors}
        slope = {"negative_slope": 0.2} if activation == "leaky_relu" else {}

        def run(function, options=options):
            return torch.func.jvp(lambda x: function(x, w, **options), (x,), (tangent,))

        with segfast.backend("aten"):
            actual = run(lambda *args, slope=slope, **o: conv2d(*args, **o, **slope))
        torch.testing.assert_close(actual, run(fused(F.conv2d)), atol=1e-5, rtol=1e-5)


@INTERPRETING_ONLY
@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: conv2d(x, w),
        lambda x, w: conv2d([x, x], torch.cat([w, w], 1)),
        lambda x, w: parallel_conv2d(x, [w, w], (1, 2)),
    ],
    ids=["conv2d", "list", "parallel"],
)
def test_forward_mode_fails_loudly_on_our_kernels(run):
    x, w = draw(1, 3, 4, 4), draw(2, 3, 3, 3)
    with segfast.backend("triton"):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward"):
            torch.func.jvp(lambda x: run(x, w), (x,), (x,))
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward"),
        ):
            run(torch.autograd.forward_ad.make_dual(x, x), w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_swaps_the_parameters(backend):
    layer = segfast.nn.Conv2d(3, 2, 3, padding=2, dilation=2)
    other = {"weight": draw(2, 3, 3, 3).requires_grad_(), "bias": draw(2)}
    x = draw(1, 3, 3, 2)
    with segfast.backend(backend):
        y = functional_call(layer, other, (x,))
        (gradient,) = torch.autograd.grad(y.sum(), other["weight"])
    expected = F.conv2d(x, other["weight"], other["bias"], 1, 2, 2)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected.sum(), other["weight"])[0], atol=1e-5, rtol=1e-5
    )
    assert layer.weight.grad is None


@INTERPRETING_ONLY
def test_the_dispatcher_is_passed_by_unless_somebody_listens(monkeypatch):
    through = []
    overload = FORWARD.overload
    monkeypatch.setattr(FORWARD, "overload", lambda *args: through.append(1) or overload(*args))
    x, w = draw(1, 3, 3, 3), draw(2, 3, 3, 3)
    with segfast.backend("triton"):
        conv2d(x, w)
        assert through == []
        with FlopCounterMode(display=False):
            conv2d(x, w)
    assert through == [1]


@INTERPRETING_ONLY
def test_a_remembered_call_computes_anew(poisoned_empty, checked_plans):
    # The second call of a layout goes straight to the launch: with other values, through another alignment.
    store = draw(600)
    with tiles(), segfast.backend("triton"), launched() as plans:
        for offset in (0, 0, 4, 1, 1, 0):
            x = store[offset : offset + 96].view(1, 3, 2, 16).permute(0, 3, 1, 2)
            w = store[100 + offset : 388 + offset].view(2, 3, 3, 16).permute(0, 3, 1, 2)
            bias = store[offset : offset + 2]
            for geometry in ({"padding": 1}, {"padding": 6, "dilation": 6}):
                y = conv2d(x, w, bias, **geometry, activation="relu")
                expected = F.relu(F.conv2d(x, w, bias, **geometry))
                torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    assert set(names(plans)) == {DENSE, ZONED}


@INTERPRETING_ONLY
def test_a_remembered_call_tells_its_options_apart():
    x, w = draw(1, 4, 4, 3, channels_last=True), draw(2, 4, 2, 2, channels_last=True)
    images, square = [x[:, :1], x[:, 1:]], draw(2, 4, 3, 1, channels_last=True)
    cases = [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"activation": "relu"},
             {"activation": "leaky_relu", "negative_slope": 0.5},
             {"activation": "leaky_relu", "negative_slope": 0.1},
             {"padding": 2, "dilation": 2}, {"padding": (2, 1), "dilation": (2, 1)}]  # fmt: skip
    one = {"dilations": (1, 2), "activation": "relu"}
    branches = [one, one | {"dilations": (2, 1)}, one | {"dilations": ((1, 2), (2, 1))},
                {"dilations": (1, 2)}, one | {"scale": draw(4)}, one | {"shift": draw(4)}]  # fmt: skip
    for _ in range(2):
        for options in cases:
            results = []
            for backend in ("aten", "triton"):
                with segfast.backend(backend):
                    results.append((conv2d(x, w, **options), conv2d(images, w, **options)))
            torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
        for options in branches:
            with segfast.backend("triton"):
                y = parallel_conv2d(x, [square] * 2, **options)
            torch.testing.assert_close(
                y, define_parallel(x, a=square, b=square, **options), atol=1e-5, rtol=1e-5
            )


@INTERPRETING_ONLY
@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: conv2d(x, w, padding=1),
        lambda x, w: conv2d(x, w, padding=9, dilation=9),
        lambda x, w: conv2d([x[:, :4], x[:, 4:]], w),
        lambda x, w: parallel_conv2d(x, [w, w], (1, 2)),
        lambda x, w: conv2d(x.requires_grad_(), w).sum().backward(),
    ],
    ids=["dense", "zoned", "list", "parallel", "gradient"],
)
def test_a_remembered_call_does_not_forget_the_precision(run):
    conv = torch.backends.cudnn.conv
    before, precisions = conv.fp32_precision, []
    x, w = draw(1, 16, 3, 3, channels_last=True), draw(8, 16, 3, 3, channels_last=True)
    try:
        with tiles(), segfast.backend("triton"):
            for precision in ("ieee", "tf32", "ieee"):
                conv.fp32_precision = precision
                with segfast.kernels.record_launches() as launches:
                    run(x, w)
                precisions.append({plan.constants["PRECISION"] for plan, _ in launches})
    finally:
        conv.fp32_precision = before
    assert precisions == [{"tf32x3"}, {"tf32"}, {"tf32x3"}]
