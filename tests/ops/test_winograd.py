"""Winograd's convolution on a CPU against fp64: odd sizes, strides, epilogues, threads, dirty scratch."""

import threading

import pytest
import torch
import torch.nn.functional as F

from segfast.ops import _team
from segfast.ops import _winograd as winograd
from segfast.ops import _winograd_scratch as scratch
from segfast.ops._call import Call
from segfast.ops._epilogue import ACTIVATIONS
from tests.tolerances import assert_close_to_reference

pytestmark = pytest.mark.skipif(not winograd._has_onednn(), reason="oneDNN's packed convolution is not here")

LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


DENSE = Call(
    operation="conv2d",
    dtype=torch.float32,
    channels_last=True,
    input=(1, 64, 16, 16),
    weight=(64, 64, 3, 3),
    stride=(1, 1),
    padding=(1, 1),
    output_padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    bias=False,
    residual=False,
    activation=None,
    threads=1,
)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_scratch():
    """As in a thread that has computed nothing yet."""
    scratch.scratches(0).clear()


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def layer(in_channels, out_channels):
    return numbers(out_channels, in_channels, 3, 3) / (9 * in_channels) ** 0.5, numbers(out_channels)


def ours(
    x, weight, bias=None, padding=(1, 1), residual=None, activation=None, slope=0.01, tiles=None, step=1
):
    tiles = winograd.tiles(x.shape, padding, step) if tiles is None else tiles
    transformed = winograd.transform_weight(weight, tiles, torch.get_num_threads())
    return winograd.convolution(x, transformed, bias, padding, residual, activation, slope, step)


def aten(x, weight, bias=None, padding=(1, 1), residual=None, activation=None, slope=0.01, step=1):
    y = F.conv2d(x, weight, bias, padding=padding, dilation=step)
    return ACTIVATIONS[activation](y if residual is None else y + residual, slope)


def hold(actual, x, weight, bias=None, padding=(1, 1), residual=None, activation=None, slope=0.01, step=1):
    """Holds a result to the error rule. No activation's slope is above 1.13, which the rule's 2 covers."""
    x64, weight64, bias64, residual64 = (
        None if t is None else t.double() for t in (x, weight, bias, residual)
    )
    reference = aten(x64, weight64, bias64, padding, residual64, activation, slope, step)
    absolute = (None if t is None else t.abs() for t in (x64, weight64, bias64))
    magnitude = aten(*absolute, padding, step=step)
    ordinary = aten(x, weight, bias, padding, residual, activation, slope, step)
    assert_close_to_reference(actual, reference, ordinary, magnitude, 9 * x.shape[1])
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_the_matrices_convolve():
    """In one direction, and exactly: the points' polynomials through six inputs and three weights."""
    inputs, weights = numbers(6).double(), numbers(3).double()
    outputs = scratch.OUTPUT64 @ ((scratch.WEIGHT64 @ weights) * (scratch.INPUT64 @ inputs))
    torch.testing.assert_close(outputs, inputs.unfold(0, 3, 1) @ weights, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 2), (0, 2), (9, 1)])
@pytest.mark.parametrize("size", [(8, 12), (13, 10), (11, 33), (40, 9)])
@pytest.mark.parametrize("images", [1, 3])
def test_sizes_paddings_batches(images, size, padding):
    x, (weight, bias) = numbers(images, 32, *size), layer(32, 48)
    hold(ours(x, weight, bias, padding), x, weight, bias, padding)


@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0)], ids="times the dilation {}".format)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_dilations(step, padding, layout):
    arrange, padding = LAYOUTS[layout], (step * padding[0], step * padding[1])
    x, (weight, bias) = arrange(numbers(2, 32, 27, 30)), layer(32, 48)
    residual = arrange(numbers(*aten(x, weight, None, padding, step=step).shape))
    y = ours(x, weight, bias, padding, residual, "silu", step=step)
    hold(y, x, weight, bias, padding, residual, "silu", step=step)


# Plain weights and packed ones, for few tiles and for many, with tiles of the other number.
@pytest.mark.parametrize("channels", [(32, 33), (130, 260), (256, 128)])
@pytest.mark.parametrize("size", [(8, 8), (34, 30), (8, 270)])
@pytest.mark.parametrize("tiles", [1, 63, 64, 10_000])
def test_weights_packed_for_another_number_of_tiles(channels, size, tiles):
    x, (weight, bias) = numbers(2, channels[0], *size), layer(*channels)
    hold(ours(x, weight, bias, tiles=tiles), x, weight, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [(32, 40), (256, 130)])
def test_strides_of_input_and_residual(layout, channels):
    arrange = LAYOUTS[layout]
    x, (weight, bias) = arrange(numbers(2, channels[0], 18, 23)), layer(*channels)
    residual = arrange(numbers(2, channels[1], 18, 23))
    before = x.clone(), residual.clone()
    hold(ours(x, weight, bias, residual=residual), x, weight, bias, residual=residual)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("tiles", [1, 64])
def test_epilogues(activation, with_bias, with_residual, tiles):
    x, (weight, bias) = numbers(1, 32, 21, 20), layer(32, 32)
    bias = bias if with_bias else None
    residual = numbers(1, 32, 21, 20) if with_residual else None
    y = ours(x, weight, bias, (1, 1), residual, activation, 0.3, tiles)
    hold(y, x, weight, bias, (1, 1), residual, activation, 0.3)


@pytest.mark.parametrize("tiles", [1, 64])
def test_error_at_512_channels(tiles):
    x, (weight, bias) = numbers(1, 512, 16, 16), layer(512, 64)
    y = ours(x, weight, bias, tiles=tiles)
    hold(y, x, weight, bias)
    reference = aten(x.double(), weight.double(), bias.double())
    assert (y - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("tiles", [1, 64])
def test_results_do_not_depend_on_what_the_scratch_holds(tiles):
    cases = [(numbers(1, 32, 30, 31), layer(32, 64)), (numbers(2, 64, 9, 50), layer(64, 32))]
    clean = [ours(x, *parameters, tiles=tiles) for x, parameters in cases]
    for (x, parameters), expected in zip(cases, clean, strict=True):
        kept = [each for each in scratch.scratches(1) if each.memory.numel()]
        assert kept
        for each in kept:
            each.memory.fill_(torch.nan)
        assert torch.equal(ours(x, *parameters, tiles=tiles), expected)


def test_scratch_that_is_too_large_is_not_kept(monkeypatch, one_thread, no_scratch):
    monkeypatch.setattr(scratch, "KEPT_BYTES", 1000)
    x, (weight, bias) = numbers(1, 32, 20, 20), layer(32, 32)
    hold(ours(x, weight, bias), x, weight, bias)
    (kept,) = scratch.scratches(1)
    assert not kept.memory.numel() and not kept.workspaces


def test_workspaces_are_bounded(one_thread, no_scratch):
    weight, bias = layer(32, 32)
    for width in range(8, 8 + 2 * scratch.KEPT_WORKSPACES):
        x = numbers(1, 32, 8, width)
        ours(x, weight, bias)
    (kept,) = scratch.scratches(1)
    assert 0 < len(kept.workspaces) <= scratch.KEPT_WORKSPACES
    hold(ours(x, weight, bias), x, weight, bias)


def test_two_threads_at_once():
    cases = [(numbers(1, 32, 60, 61), layer(32, 64)), (numbers(2, 64, 50, 50), layer(64, 32))]
    expected = [ours(x, *parameters) for x, parameters in cases]
    start, wrong = threading.Barrier(2), []

    def run(i):
        x, parameters = cases[i]
        start.wait()
        for _ in range(10):
            if not torch.equal(ours(x, *parameters), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("size", [12, 20, 36, 70])
@pytest.mark.parametrize("channels", [(32, 64), (192, 192)])
def test_on_several_threads_the_number_stays(channels, size, openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(_team, "_openmp", lambda: None)
    x, (weight, bias) = numbers(1, channels[0], size, size), layer(*channels)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        y = ours(x, weight, bias)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    hold(y, x, weight, bias)


@pytest.mark.parametrize(("size", "on_the_team"), [(16, False), (40, True)])
@pytest.mark.parametrize("channels", [(32, 64), (192, 192)])
def test_strips_are_computed_by_the_team_but_few_tiles_are_divided_by_torch(
    channels, size, on_the_team, monkeypatch
):
    """A third of 16 tiles is less than a strip of its own, a third of 100 is one."""
    monkeypatch.setattr(winograd, "team_size", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    strips = []
    monkeypatch.setattr(winograd, "each_on_team", lambda tasks: [strips.append(task(0)) for task in tasks])
    x, (weight, bias) = numbers(1, channels[0], size, size), layer(*channels)
    hold(ours(x, weight, bias), x, weight, bias)
    assert (len(strips) >= 3) == on_the_team == bool(strips)


@pytest.mark.parametrize("dilation", [1, 2])
def test_as_a_candidate(dilation):
    """For all that a layer's call says."""
    x, (weight, bias) = numbers(2, 32, 20, 26), layer(32, 64)
    padding = 2 * dilation, dilation
    residual = numbers(2, 64, 20 + 2 * dilation, 26)
    call = DENSE._replace(input=x.shape, weight=weight.shape, padding=padding, dilation=(dilation, dilation))
    call = call._replace(bias=True, residual=True, activation="leaky_relu")
    assert winograd.CONV2D.serves(call)
    y = winograd.CONV2D.run(call, x, winograd.CONV2D.prepare(weight, call), bias, residual, 0.2)
    hold(y, x, weight, bias, padding, residual, "leaky_relu", 0.2, dilation)


def test_modes_and_state_of_the_caller():
    """Scratch made in inference mode serves outside of it, and the reverse; nothing asks for gradients."""
    x, (weight, bias) = numbers(1, 32, 16, 17), layer(32, 32)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    state = torch.get_rng_state()
    for modes in (
        [torch.inference_mode, torch.no_grad],
        [torch.no_grad, torch.inference_mode],
        [torch.enable_grad],
    ):
        scratch.scratches(0).clear()
        for mode in modes:
            with mode():
                y = ours(x, weight, bias)
                assert not y.requires_grad
            hold(y, x, weight.detach(), bias.detach())
    torch.set_default_dtype(torch.float64)
    try:
        scratch.scratches(0).clear()
        y = ours(x, weight, bias)
    finally:
        torch.set_default_dtype(torch.float32)
    hold(y, x, weight.detach(), bias.detach())
    assert torch.equal(torch.get_rng_state(), state)


def test_tiles_are_those_of_the_output():
    assert winograd.tiles((1, 32, 16, 20), (1, 1)) == 4 * 5
    assert winograd.tiles((3, 32, 17, 15), (0, 2)) == 3 * 4 * 5
    assert winograd.tiles((1, 32, 32, 33), (2, 4), 2) == 4 * 4 * 5


@pytest.mark.parametrize(
    "other",
    [
        {"stride": (2, 2)},
        {"padding": (-1, 1)},
        {"dilation": (2, 2)},  # with a padding of one
        {"dilation": (2, 1), "padding": (2, 1)},
        {"dilation": (6, 6), "padding": (6, 6)},  # images of 3x3, of tiles hardly filled
        {"groups": 2, "weight": (64, 32, 3, 3)},
        {"weight": (64, 64, 1, 1)},
        {"weight": (16, 64, 3, 3)},
        {"input": (1, 32, 16, 16), "weight": (32, 32, 3, 3)},
        {"input": (0, 64, 16, 16)},
        {"input": (1, 64, 16, 2), "padding": (0, 0)},
        {"input": (1, 64, 16, 1), "padding": (0, 0)},
        {"input": (1, 64, 8, 8)},
        {"input": (1, 64, 9, 9)},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_calls_it_does_not_serve(other):
    assert winograd.CONV2D.serves(DENSE)
    assert not winograd.CONV2D.serves(DENSE._replace(**other))


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_matrix_products_in_less_than_fp32_are_not_for_transforms(precision):
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = precision
    try:
        assert not winograd.CONV2D.serves(DENSE)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert winograd.CONV2D.serves(DENSE)
