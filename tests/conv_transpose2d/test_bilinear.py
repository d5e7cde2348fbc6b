"""The fast path for channelwise separable weights: taken only where it holds, equal to the dense layer."""

import pytest
import torch
import torch.nn.functional as F

from segfast.functional import conv_transpose2d
from segfast.nn.init import bilinear_
from segfast.ops.conv_transpose2d import bilinear as bilinear_module
from segfast.ops.conv_transpose2d.bilinear import Factors, channelwise_factors
from tests.fused_conv import draw, values_and_gradients
from tests.tolerances import assert_close_to_reference

CHANNELS = 3


def x(**options):
    return draw(2, CHANNELS, 4, 5, **options)


def bilinear(size=16, channels=CHANNELS, dtype=torch.float32):
    return bilinear_(torch.empty(channels, channels, size, size, dtype=dtype))


def separable(rows, columns):
    """[C, C, kH, kW], zero off the diagonal, from rows [C, kH] and columns [C, kW]."""
    weight = torch.zeros(len(rows), len(rows), rows.shape[1], columns.shape[1], dtype=rows.dtype)
    each = torch.arange(len(rows))
    weight[each, each] = rows[:, :, None] * columns[:, None, :]
    return weight


@pytest.fixture
def taken(monkeypatch):
    """Counts the calls that `segfast.functional.conv_transpose2d` serves one axis at a time."""
    from segfast.ops.conv_transpose2d import functional

    calls = []

    def counted(*args, **options):
        calls.append(args[1])
        return bilinear_module.upsample_separable(*args, **options)

    monkeypatch.setattr(functional, "upsample_separable", counted)
    return calls


def factors(input=None, weight=None, stride=8, groups=1, dilation=1) -> Factors | None:
    with torch.no_grad():
        return channelwise_factors(
            x() if input is None else input,
            bilinear() if weight is None else weight,
            stride,
            groups,
            dilation,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [8, 15, 16, 31, 64])
def test_bilinear_weights_are_found(size, dtype):
    found = factors(x(dtype=dtype), bilinear(size, dtype=dtype))
    assert found.rows.shape == found.columns.shape == (1, size)
    hat = bilinear(size, 1)[0, 0]
    torch.testing.assert_close(
        (found.rows[0, :, None] * found.columns[0]).float(), hat, atol=2 * torch.finfo(dtype).eps, rtol=0
    )


@pytest.mark.parametrize("stride", [8, (8, 9), 32], ids=str)
@pytest.mark.parametrize("dilation", [1, (1, 1)], ids=str)
def test_strides_and_dilations_that_are_served(stride, dilation):
    assert factors(stride=stride, dilation=dilation) is not None


def _with(position, value, weight=None):
    weight = bilinear() if weight is None else weight
    weight[position] = value
    return weight


eps = torch.finfo(torch.float32).eps
NOT_FOUND = {
    "a value off the diagonal": {"weight": _with((0, 1, 3, 3), 1e-30)},
    "the identity, mixed": {"weight": bilinear()[[1, 0, 2]]},
    "a diagonal that is no product": {"weight": _with((1, 1, 3, 3), 0.5)},
    "by little": {"weight": _with((2, 2, 8, 8), bilinear()[2, 2, 8, 8] * (1 + 8 * eps))},
    "by little, in bfloat16": {
        "input": x(dtype=torch.bfloat16),
        "weight": _with((2, 2, 2, 2), 0.12, bilinear(dtype=torch.bfloat16)),
    },
    "a single tap missing": {"weight": _with((0, 0, 0, 0), 0)},
    "stride below 8": {"stride": 7},
    "one stride below 8": {"stride": (8, 7)},
    "the other stride below 8": {"stride": (2, 16)},
    "groups": {"weight": bilinear()[:, :1].contiguous(), "groups": CHANNELS},
    "groups of one filter": {"input": x()[:, :1], "weight": bilinear(channels=1), "groups": 2},
    "dilation": {"dilation": 2},
    "dilation of an axis": {"dilation": (1, 2)},
    "integers": {"input": torch.ones(1, 1, 4, 4).long(), "weight": torch.ones(1, 1, 8, 8).long()},
    "complex numbers": {"input": x().cfloat(), "weight": bilinear().cfloat()},
    "another dtype": {"input": x().double()},
    "NaN": {"weight": _with((1, 1, 2, 2), float("nan"))},
    "NaN off the diagonal": {"weight": _with((1, 0, 2, 2), float("nan"))},
    "infinity": {"weight": _with((1, 1, 8, 8), float("inf"))},
    "only infinities": {"input": x()[:, :1], "weight": torch.full((1, 1, 8, 8), float("inf"))},
    "C_in != C_out": {"weight": torch.cat([bilinear(), torch.zeros(CHANNELS, 1, 16, 16)], 1)},
    "channels that do not fit": {"input": draw(1, 2, 3, 3)},
    "no batch": {"input": draw(CHANNELS, CHANNELS, 5)},
    "an empty weight": {"input": draw(1, 0, 3, 3), "weight": torch.empty(0, 0, 8, 8)},
    "a device without values": {"input": x().to("meta"), "weight": bilinear().to("meta")},
}


@pytest.mark.parametrize("case", NOT_FOUND)
def test_every_condition_is_looked_at(case):
    assert factors() is not None
    assert factors(**NOT_FOUND[case]) is None


def test_a_weight_to_be_trained_is_served_only_without_gradients(taken):
    input, weight = x(), bilinear().requires_grad_()
    assert channelwise_factors(input, weight, 8, 1, 1) is None
    conv_transpose2d(input, weight, stride=8).sum().backward()
    assert not taken and weight.grad.count_nonzero() == weight.numel()
    with torch.no_grad():
        assert channelwise_factors(input, weight, 8, 1, 1) is not None
        y = conv_transpose2d(input, weight, stride=8)
    assert len(taken) == 1
    torch.testing.assert_close(y, F.conv_transpose2d(input, weight, stride=8))
    assert channelwise_factors(input, weight.detach(), 8, 1, 1) is not None


def test_what_traces_or_transforms_sees_the_dense_layer(taken):
    input, weight = x(), bilinear()
    expected = F.conv_transpose2d(input, weight, stride=8)

    def run(input, weight):
        return conv_transpose2d(input, weight, stride=8)

    def grad_of_weight(weight):
        return torch.func.grad(lambda w: run(input, w).sum())(weight)

    torch.testing.assert_close(run(input, weight), expected)
    assert len(taken) == 1
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input, weight), expected)
    stacked = torch.stack([weight, 2 * weight])
    torch.testing.assert_close(torch.func.vmap(run, (None, 0))(input, stacked)[1], 2 * expected)
    assert grad_of_weight(weight).count_nonzero() == weight.numel()
    with torch._subclasses.FakeTensorMode() as mode:
        assert run(mode.from_tensor(input), mode.from_tensor(weight)).shape == expected.shape
    graph = torch.fx.experimental.proxy_tensor.make_fx(run)(input, weight)
    torch.testing.assert_close(graph(input, 3 * weight), 3 * expected)
    assert len(taken) == 1


def test_the_compiled_layer_keeps_no_answer_about_values():
    compiled = torch.compile(
        lambda x, w: conv_transpose2d(x, w, stride=8), backend="aot_eager", fullgraph=True
    )
    for weight in (bilinear(), draw(CHANNELS, CHANNELS, 16, 16)):
        torch.testing.assert_close(
            compiled(x(), weight), F.conv_transpose2d(x(), weight, stride=8), atol=1e-5, rtol=1e-5
        )


LAYERS = {
    "FCN-32s": (bilinear(64), (32, 16)),
    "FCN-8s": (bilinear(16), (8, 4)),
    "odd": (bilinear(15), (8, 7, 7)),
    "kernel below stride": (bilinear(5), (8, 0)),
    "one tap": (bilinear(1), (8, 0, 7)),
    "a filter a channel": (separable(draw(CHANNELS, 16), draw(CHANNELS, 16, seed=1)), (8, 4)),
    "a filter a channel, not square": (
        separable(draw(CHANNELS, 9), draw(CHANNELS, 20, seed=1)),
        ((8, 10), (1, 3), (2, 5)),
    ),
    "one filter, not square": (
        separable(draw(1, 9).repeat(3, 1), draw(1, 20).repeat(3, 1)),
        ((10, 8), (3, 0)),
    ),
    "one filter, scaled": (
        separable(torch.ones(3, 8), torch.tensor([[1.0], [-2], [3]]) * draw(1, 8)),
        (8, 0),
    ),
    "rows alike, columns not": (separable(draw(1, 8).repeat(3, 1), draw(3, 9)), (8, 0)),
    "columns alike, rows not": (
        separable(torch.tensor([[1.0, 0.5], [0.5, 1], [1, 0.25]]), draw(1, 9).repeat(3, 1)),
        (8, 0),
    ),
    "a zero channel": (separable(torch.tensor([[1.0], [0], [-2]]) * draw(1, 16), draw(3, 16)), (8, 4)),
    "all zero": (torch.zeros(CHANNELS, CHANNELS, 8, 8), (8, 0)),
}


# Random products, rounded, are not products any more.
IN_BFLOAT16 = ["FCN-32s", "FCN-8s", "odd", "kernel below stride", "one tap"]


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(n, torch.float32) for n in LAYERS] + [(n, torch.bfloat16) for n in IN_BFLOAT16],
    ids=str,
)
def test_it_is_the_dense_layer_within_rounding(layer, with_bias, dtype, taken):
    weight, geometry = LAYERS[layer]
    weight = weight.to(dtype)
    stride, padding, output_padding = (*geometry, 0)[:3]
    tensors = {"input": x(dtype=dtype)} | ({"bias": draw(CHANNELS, dtype=dtype)} if with_bias else {})

    def run(function, fixed, tensors):
        def closed(input, bias=None):
            return function(input, fixed, bias, stride, padding, output_padding)

        return values_and_gradients(closed, tensors, lambda y: draw(*y.shape, dtype=dtype).to(y.dtype))

    wide = {name: t.double() for name, t in tensors.items()}
    actual = run(conv_transpose2d, weight, tensors)
    assert len(taken) == 1
    reference = run(F.conv_transpose2d, weight.double(), wide)
    aten = run(F.conv_transpose2d, weight, tensors)
    sizes = run(F.conv_transpose2d, weight.double().abs(), {name: t.abs() for name, t in wide.items()})
    for name, result in actual.items():
        # The dense layer's number of terms, which is at least ours.
        depth = {"output": weight[:, 0].numel(), "input": weight[0].numel()}.get(
            name, reference["output"][:, 0].numel()
        )
        assert_close_to_reference(result, reference[name], aten[name], sizes[name], depth, what=name)


@pytest.mark.parametrize("channels_last_weight", [False, True], ids=["", "weight channels_last"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "input channels_last"])
@pytest.mark.parametrize("layer", ["FCN-8s", "a filter a channel", "one tap"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 1), (1, 3, 4, 1), (0, 3, 4, 5)], ids=str)
def test_the_strides_are_torchs(shape, layer, channels_last, channels_last_weight, taken):
    weight, (stride, padding, *_) = LAYERS[layer]
    input = draw(*shape)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    if channels_last_weight:
        weight = weight.contiguous(memory_format=torch.channels_last)
    for bias in (None, draw(CHANNELS)):
        y = conv_transpose2d(input, weight, bias, stride, padding)
        expected = F.conv_transpose2d(input, weight, bias, stride, padding)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        assert y.stride() == expected.stride()
    assert len(taken) == 2


def test_a_single_channel_and_no_batch(taken):
    weight, bias = bilinear(channels=1), draw(1)
    for input in (draw(1, 1, 3, 3), draw(2, 1, 3, 4), draw(1, 3, 4)):
        y, expected = (f(input, weight, bias, 8, 4) for f in (conv_transpose2d, F.conv_transpose2d))
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
    assert len(taken) == 3


def test_the_epilogue_follows(taken):
    weight, bias, scale, shift = bilinear(), draw(3), draw(3, seed=1), draw(3, seed=2)
    conv = F.conv_transpose2d(x(), weight, bias, 8, 4)
    residual = draw(*conv.shape)
    y = conv_transpose2d(
        x(), weight, bias, 8, 4, scale=scale, shift=shift, residual=residual, activation="relu"
    )
    torch.testing.assert_close(
        y, F.relu(scale[:, None, None] * conv + shift[:, None, None] + residual), atol=1e-5, rtol=1e-5
    )
    assert len(taken) == 1


def test_gradients_of_the_input_and_the_bias_in_fp64(taken):
    input = draw(1, 2, 2, 2, dtype=torch.float64).requires_grad_()
    bias = draw(2, dtype=torch.float64).requires_grad_()
    per_channel = separable(draw(2, 9).double(), draw(2, 4).double())
    for weight in (bilinear(9, 2, dtype=torch.float64), per_channel):

        def run(input, bias, weight=weight):
            return conv_transpose2d(input, weight, bias, 8)

        assert torch.autograd.gradcheck(run, (input, bias))
        assert torch.autograd.gradgradcheck(run, (input, bias), fast_mode=True)
    assert taken


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_autocast_narrows_as_in_the_dense_layer(with_bias, taken):
    bias = draw(CHANNELS) if with_bias else None
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = (f(x(), bilinear(), bias, 8, 4) for f in (conv_transpose2d, F.conv_transpose2d))
    assert y.dtype == expected.dtype == torch.bfloat16 and len(taken) == 1
    torch.testing.assert_close(y, expected, atol=0.03, rtol=0.02)
