"""What a registered operator owes torch.

Opcheck, fakes, FLOPs, transforms; and the short ways around the machinery.
"""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import segfast
from segfast.functional import conv_transpose2d, up_concat
from segfast.ops import OPERATORS, _operator
from segfast.ops.conv_transpose2d import FORWARD
from segfast.ops.conv_transpose2d.autograd import _Forward
from tests.fused_conv import BACKENDS, draw
from tests.operators import check_decomposition, check_fake, operators_of

INTERPRETER = pytest.mark.interpreter


def operator_calls(channels_last: bool, channels_out: int = 5):
    """(operator, arguments).

    Each operator with everything and with next to nothing, detached, of odd sizes.
    """

    def t(*shape, seed=0):
        return draw(*shape, seed=seed, channels_last=channels_last and len(shape) == 4)

    c = channels_out
    x, w, y = t(2, 4, 3, 2), t(4, c, 3, 3), t(2, c, 6, 4)
    bias, scale, shift = (t(c, seed=i) for i in range(3))
    s, p, one = [2, 2], [1, 1], [1, 1]
    yield FORWARD.overload, (x, w, bias, scale, shift, y, s, p, [1, 1], 1, one, "gelu", 0.1)
    yield FORWARD.overload, (x, t(4, c, 2, 2), None, None, None, None, s, [0, 0], [0, 0], 1, one, None, 0.0)
    yield OPERATORS["conv_transpose2d_grad_input"].overload, (y, w, 3, 2, s, p, 1, one)
    yield OPERATORS["conv_transpose2d_grad_weight"].overload, (y, x, w, s, p, 1, one)
    skip = t(2, 3, 7, 5)
    yield OPERATORS["up_concat"].overload, (x, skip, t(4, c, 2, 2), bias, s, [0, 0], "relu", 0.0)
    yield OPERATORS["up_concat"].overload, (x, t(2, 3, 9, 8), t(4, c, 2, 2), None, s, [0, 0], None, 0.0)


CALLS = {
    f"{call[0]._name.removeprefix('segfast::')} {i} {layout} {c}": call
    for layout, c in itertools.product(("nchw", "channels_last"), (5, 1))
    for i, call in enumerate(operator_calls(layout == "channels_last", c))
}


def test_every_operator_has_a_call_here():
    assert {name.split()[0] for name in CALLS} == operators_of("conv_transpose2d")


@pytest.mark.parametrize("name", [n for n in CALLS if n.endswith("5")])
def test_opcheck(name):
    torch.library.opcheck(*CALLS[name])


@INTERPRETER
@pytest.mark.parametrize("name", [n for n in CALLS if n.endswith("5")])
def test_opcheck_of_the_kernels(name):
    torch.library.opcheck(*CALLS[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", CALLS)
def test_fakes_have_the_shape_and_strides_of_the_real_thing(name):
    check_fake(*CALLS[name])


@INTERPRETER
@pytest.mark.parametrize("name", CALLS)
def test_fakes_have_the_shape_and_strides_of_the_kernels(name):
    check_fake(*CALLS[name])


@INTERPRETER
@pytest.mark.parametrize("name", CALLS)
def test_kernels_and_decompositions_agree(name, poisoned_empty):
    check_decomposition(*CALLS[name])


@INTERPRETER
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_flops_are_counted_as_atens(backward, groups):
    counts = []
    for backend in ("aten", "triton"):
        x, w = draw(2, 4, 3, 5).requires_grad_(), draw(4, 6 // groups, 3, 3).requires_grad_()
        with FlopCounterMode(display=False) as counter, segfast.backend(backend):
            y = conv_transpose2d(x, w, stride=2, groups=groups)
            if backward:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    forward = 2 * (2 * 3 * 5) * 4 * (6 // groups) * 9
    if groups == 1:
        assert counts[0] == counts[1]
    # ATen's formula for the weight's gradient forgets the groups; ours is three times the forward.
    assert counts[1] == forward * (3 if backward else 1)


@INTERPRETER
def test_flops_of_up_concat():
    x, skip, w = draw(1, 4, 3, 3), draw(1, 2, 7, 7), draw(4, 2, 2, 2)
    with FlopCounterMode(display=False) as counter, segfast.backend("triton"):
        up_concat(x, skip, w)
    assert counter.get_total_flops() == 2 * 9 * 4 * 2 * 4


def loss(weight, x, bias=None):
    return conv_transpose2d(x, weight, bias, stride=2, activation="silu").square().sum()


def reference_loss(weight, x, bias=None):
    return F.silu(F.conv_transpose2d(x, weight, bias, stride=2)).square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_and_per_sample_gradients(backend):
    w, x, bias = draw(3, 2, 2, 2), draw(4, 1, 3, 2, 2), draw(2)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None),
        (None, 0, None),
        (0, 0, None),
        (1, None, None),
        (0, None, 0),
        (None, None, 1),
        (2, 1, 0),
    ],
)
def test_vmap_over_any_operand(in_dims, backend):
    shapes = ((2, 3, 2, 3), (3, 4, 2, 2), (2, 4, 4, 6))
    operands = [
        draw(*shape) if d is None else draw(*shape[:d], 5, *shape[d:])
        for shape, d in zip(shapes, in_dims, strict=True)
    ]

    def run(x, w, residual):
        return conv_transpose2d(x, w, stride=2, residual=residual, activation="relu")

    with segfast.backend(backend):
        mapped = vmap(run, in_dims)(*operands)
    samples = [
        [t if d is None else t.select(d, i) for t, d in zip(operands, in_dims, strict=True)] for i in range(5)
    ]
    expected = torch.stack([F.relu(F.conv_transpose2d(x, w, stride=2) + r) for x, w, r in samples])
    torch.testing.assert_close(mapped, expected, atol=1e-5, rtol=1e-5)


@INTERPRETER
def test_vmap_over_the_input_is_one_launch_and_over_the_weight_one_each():
    x, w = draw(5, 2, 3, 2, 2), draw(3, 4, 2, 2)
    with segfast.backend("triton"):
        for args, dims, launches in (((x, w), (0, None), 1), ((x[0], w.expand(5, 3, 4, 2, 2)), (None, 0), 5)):
            with segfast.kernels.record_launches() as recorded:
                vmap(lambda a, b: conv_transpose2d(a, b, stride=2), dims)(*args)
            assert len(recorded) == launches


@INTERPRETER
def test_forward_mode_fails_loudly_and_works_on_aten():
    x, w = draw(1, 3, 2, 2), draw(3, 2, 2, 2)
    for x_grad in (False, True):
        with (
            segfast.backend("triton"),
            forward_ad.dual_level(),
            pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward"),
        ):
            conv_transpose2d(forward_ad.make_dual(x.clone().requires_grad_(x_grad), x), w, stride=2)
    with (
        segfast.backend("triton"),
        pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)jvp|forward"),
    ):
        torch.func.jvp(lambda x: conv_transpose2d(x, w, stride=2), (x,), (x,))
    with segfast.backend("aten"):
        _, tangent = torch.func.jvp(lambda x: conv_transpose2d(x, w, stride=2), (x,), (x,))
    torch.testing.assert_close(tangent, F.conv_transpose2d(x, w, stride=2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call_swaps_the_parameters(backend):
    layer = segfast.nn.ConvTranspose2d(3, 2, 2, stride=2)
    other = {"weight": draw(3, 2, 2, 2).requires_grad_(), "bias": draw(2)}
    x = draw(1, 3, 2, 2)
    with segfast.backend(backend):
        y = functional_call(layer, other, (x,))
        (gradient,) = torch.autograd.grad(y.sum(), other["weight"])
    torch.testing.assert_close(y, F.conv_transpose2d(x, other["weight"], other["bias"], 2))
    assert layer.weight.grad is None and gradient.abs().sum() > 0


@INTERPRETER
def test_the_short_way_into_autograd_is_the_long_one():
    # `call` goes below Function.apply, to the C function: the other binds its signature on every call.
    assert isinstance(_Forward._apply, types.BuiltinMethodType)
    results = []
    for enter in (_Forward.call, _Forward.apply, _Forward._apply):
        leaves = [draw(2, 3, 2, 2).requires_grad_(), draw(3, 4, 2, 2).requires_grad_()]
        args = (*leaves, None, None, None, None, (2, 2), (0, 0), (0, 0), 1, (1, 1), "sigmoid", 0.0)
        y = enter(*args)
        assert type(y.grad_fn).__name__ == "_ForwardBackward"
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@INTERPRETER
def test_function_apply_is_taken_only_under_a_transform(monkeypatch):
    taken = []
    apply = _Forward.apply
    monkeypatch.setattr(
        _Forward, "apply", classmethod(lambda cls, *args: taken.append("apply") or apply(*args))
    )
    x, w = draw(1, 3, 2, 2), draw(3, 2, 2, 2).requires_grad_()
    with segfast.backend("triton"):
        conv_transpose2d(x, w, stride=2).sum().backward()
        assert taken == []
        grad(lambda x: conv_transpose2d(x, w.detach(), stride=2).sum())(x)
    assert set(taken) == {"apply"}


@INTERPRETER
def test_the_dispatcher_is_passed_by_unless_somebody_listens(monkeypatch):
    through = []
    overload = FORWARD.overload
    monkeypatch.setattr(FORWARD, "overload", lambda *args: through.append(1) or overload(*args))
    x, w = draw(1, 3, 2, 2), draw(3, 2, 2, 2)

    def count(run=lambda: conv_transpose2d(x, w, stride=2)):
        through.clear()
        with segfast.backend("triton"):
            run()
        return len(through)

    assert count() == 0
    assert _operator._nobody_listens()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert count() == 1
    assert any(event.key == "segfast::conv_transpose2d" for event in profile.key_averages())
    with FlopCounterMode(display=False):
        assert count() == 1
    assert count(lambda: vmap(lambda x: conv_transpose2d(x, w, stride=2))(x[None])) > 0

    class Wrapped(torch.Tensor):
        pass

    # A subclass may mean anything: in either place it goes the official way.
    assert count(lambda: conv_transpose2d(x.as_subclass(Wrapped), w, stride=2)) == 1
    assert count(lambda: conv_transpose2d(x, w.as_subclass(Wrapped), stride=2)) == 1
    assert count(lambda: conv_transpose2d(x, torch.nn.Parameter(w, requires_grad=False), stride=2)) == 0


@INTERPRETER
def test_a_remembered_call_computes_anew(poisoned_empty):
    # The second call of a layout goes straight to the launch: with other values, and through another
    # alignment.
    store = draw(400)
    with segfast.backend("triton"):
        for offset in (0, 0, 4, 1, 1, 0):
            x = store[offset : offset + 36].view(1, 3, 3, 4).permute(0, 3, 1, 2)
            w = store[100 + offset : 148 + offset].view(4, 2, 2, 3).permute(0, 3, 1, 2)
            y = conv_transpose2d(x, w, stride=2, activation="relu")
            torch.testing.assert_close(y, F.relu(F.conv_transpose2d(x, w, stride=2)), atol=1e-5, rtol=1e-5)
            skip = store[offset : offset + 72].view(1, 6, 6, 2).permute(0, 3, 1, 2)
            up = up_concat(x, skip, w)
            expected = torch.cat([skip, F.conv_transpose2d(x, w, stride=2)], 1)
            torch.testing.assert_close(up, expected, atol=1e-5, rtol=1e-5)


@INTERPRETER
def test_a_remembered_call_does_not_forget_the_precision():
    x, w = draw(1, 8, 3, 3, channels_last=True), draw(8, 8, 2, 2, channels_last=True)
    conv = torch.backends.cudnn.conv
    before, precisions = conv.fp32_precision, []
    try:
        with segfast.backend("triton"):
            for precision in ("ieee", "tf32", "ieee"):
                conv.fp32_precision = precision
                with segfast.kernels.record_launches() as launches:
                    conv_transpose2d(x, w, stride=2)
                precisions.append(launches[0][0].constants["PRECISION"])
    finally:
        conv.fp32_precision = before
    assert precisions == ["tf32x3", "tf32", "tf32x3"]
