"""`segfast.nn.ConvTranspose2d` is `torch.nn.ConvTranspose2d`, with an activation."""

import copy
import inspect
import pickle

import pytest
import torch

import segfast
from segfast.nn import ConvTranspose2d
from tests.fused_conv import REFERENCE_ACTIVATIONS, draw

OPTIONS = {
    "plain": (6, 4, 3),
    "stride": (6, 4, 2, 2),
    "padding": (6, 4, 4, 2, 1),
    "output_padding": (6, 4, 3, 2, 1, 1),
    "groups": (6, 4, 3, 2, 1, 1, 2),
    "no bias": (6, 4, 3, 2, 1, 1, 1, False),
    "dilation": (6, 4, 3, 2, 2, 1, 1, True, 2),
    "pairs": (6, 4, (3, 2), (1, 3), (1, 0), (0, 2), 2, True, (2, 1)),
}


def twins(*args, **options):
    """The torch layer and ours, with the same parameters."""
    theirs, ours = torch.nn.ConvTranspose2d(*args, **options), ConvTranspose2d(*args, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def results(layer, x, *args):
    """Output and every gradient, of a loss that tells the output's pixels apart."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, *args)
    grads = torch.autograd.grad((y * draw(*y.shape, seed=3)).sum(), [x, *layer.parameters()])
    return y, grads


def test_the_constructor_is_torchs_with_two_more_keywords():
    torchs = inspect.signature(torch.nn.ConvTranspose2d.__init__).parameters
    values = {n: p.default for n, p in torchs.items() if p.default is not inspect.Parameter.empty}
    assert isinstance(ConvTranspose2d(2, 3, 2), torch.nn.ConvTranspose2d)
    by_name = ConvTranspose2d(in_channels=2, out_channels=3, kernel_size=2, **values)
    assert repr(by_name) == repr(ConvTranspose2d(2, 3, 2))
    own = {
        n: p.default
        for n, p in inspect.signature(ConvTranspose2d).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    assert own == {"activation": None, "negative_slope": 0.01}
    with pytest.raises(ValueError, match="zeros"):
        ConvTranspose2d(2, 3, 2, padding_mode="reflect")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("args", OPTIONS.values(), ids=OPTIONS)
def test_values_gradients_and_strides_are_torchs(args, channels_last):
    pair = twins(*args)
    if channels_last:
        pair = [layer.to(memory_format=torch.channels_last) for layer in pair]
    x = draw(2, 6, 5, 4, channels_last=channels_last)
    (expected, expected_grads), (y, grads) = (results(layer, x) for layer in pair)
    torch.testing.assert_close((y, grads), (expected, expected_grads))
    assert y.stride() == expected.stride()
    assert [g.stride() for g in grads] == [g.stride() for g in expected_grads]


def test_a_state_dict_loads_both_ways():
    ours = ConvTranspose2d(3, 2, 2, activation="relu")
    theirs = torch.nn.ConvTranspose2d(3, 2, 2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(theirs.weight, ours.weight) and torch.equal(theirs.bias, ours.bias)
    with torch.no_grad():
        theirs.weight.mul_(2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(theirs.weight, ours.weight)
    assert list(ours.state_dict()) == ["weight", "bias"]


def test_the_same_seed_gives_the_same_weights():
    layers = []
    for cls in (torch.nn.ConvTranspose2d, ConvTranspose2d):
        torch.manual_seed(0)
        layers.append(cls(3, 2, 3))
    assert torch.equal(layers[0].weight, layers[1].weight) and torch.equal(layers[0].bias, layers[1].bias)


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (6, 5, 4)], ids=["batch", "unbatched"])
@pytest.mark.parametrize("size", [[9, 7], [10, 8], [9, 8], [2, 6, 10, 7]], ids=str)
def test_output_size(size, shape):
    if len(shape) == 3 and len(size) == 4:
        size = size[1:]
    theirs, ours = twins(6, 4, 3, stride=2, padding=1)
    expected, actual = results(theirs, draw(*shape), size), results(ours, draw(*shape), size)
    torch.testing.assert_close(actual, expected)
    assert list(actual[0].shape[-2:]) == size[-2:]


def test_output_size_of_a_dilated_layer():
    theirs, ours = twins(6, 4, 3, stride=2, dilation=2)
    expected, actual = (results(layer, draw(1, 6, 5, 4), [14, 12]) for layer in (theirs, ours))
    torch.testing.assert_close(actual, expected)
    assert actual[0].shape == (1, 4, 14, 12)


@pytest.mark.parametrize("size", [[8, 7], [9, 9], [9], [1, 2, 3, 9, 7]], ids=str)
def test_an_output_size_out_of_range_is_torchs_error(size):
    theirs, ours = twins(6, 4, 3, stride=2, padding=1)
    messages = []
    for layer in (theirs, ours):
        with pytest.raises(ValueError) as error:
            layer(draw(1, 6, 5, 4), size)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "shape", [(6, 5, 4), (0, 6, 5, 4), (1, 6, 1, 1)], ids=["unbatched", "empty", "a pixel"]
)
def test_batches(shape):
    theirs, ours = twins(6, 4, 3, stride=2, padding=1, output_padding=1)
    expected, actual = results(theirs, draw(*shape)), results(ours, draw(*shape))
    torch.testing.assert_close(actual, expected)


def test_the_meta_device_gives_shapes_and_strides():
    ours = ConvTranspose2d(6, 4, 3, stride=2, device="meta", activation="gelu")
    assert ours.weight.device.type == ours.bias.device.type == "meta"
    x = draw(2, 6, 5, 4, channels_last=True)
    y, torchs = ours(x.to("meta")), torch.nn.ConvTranspose2d(6, 4, 3, stride=2, device="meta")(x.to("meta"))
    assert y.is_meta and y.shape == (2, 4, 11, 9) and y.stride() == torchs.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_keyword(dtype):
    ours = ConvTranspose2d(3, 2, 2, dtype=dtype, device="cpu", activation="silu")
    assert {p.dtype for p in ours.parameters()} == {dtype} == {ours(draw(1, 3, 2, 2, dtype=dtype)).dtype}
    with pytest.raises(RuntimeError):
        ours(draw(1, 3, 2, 2))


@pytest.mark.parametrize("args", [OPTIONS["output_padding"], OPTIONS["groups"]], ids=["dense", "groups"])
@pytest.mark.parametrize("activation", REFERENCE_ACTIVATIONS)
def test_the_activation_follows_the_convolution(activation, args):
    options = {"negative_slope": 0.2} if activation == "leaky_relu" else {}
    theirs, _ = twins(*args)
    ours = ConvTranspose2d(*args, activation=activation, **options)
    ours.load_state_dict(theirs.state_dict())
    # Wide enough to reach every piece of the activations.
    x = 4 * draw(2, 6, 5, 4)
    y, grads = results(ours, x)
    x.requires_grad_()
    expected = REFERENCE_ACTIVATIONS[activation](theirs(x))
    loss = (expected * draw(*expected.shape, seed=3)).sum()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(loss, [x, *theirs.parameters()]))


def test_leaky_relus_slope_is_torchs_by_default():
    theirs, _ = twins(6, 4, 3)
    ours = ConvTranspose2d(6, 4, 3, activation="leaky_relu")
    ours.load_state_dict(theirs.state_dict())
    x = draw(1, 6, 3, 3)
    torch.testing.assert_close(ours(x), torch.nn.functional.leaky_relu(theirs(x)))


@pytest.mark.parametrize("activation", ["swish", "ReLU", "", torch.relu], ids=str)
def test_an_unknown_activation_is_refused_at_once(activation):
    with pytest.raises(ValueError, match="activation must be one of None, 'relu'"):
        ConvTranspose2d(3, 2, 2, activation=activation)


def test_copies_keep_parameters_and_activation():
    layer = ConvTranspose2d(3, 2, 2, stride=2, activation="leaky_relu", negative_slope=0.3)
    x = draw(1, 3, 2, 2)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is ConvTranspose2d and repr(twin) == repr(layer)
        assert twin.weight is not layer.weight and torch.equal(twin(x), layer(x))


def test_repr_tells_what_torchs_does_and_the_activation():
    args = (3, 2, 4, 2, 1, 1)
    torchs = repr(torch.nn.ConvTranspose2d(*args, bias=False))
    assert repr(ConvTranspose2d(*args, bias=False)) == torchs
    assert repr(ConvTranspose2d(*args, bias=False, activation="gelu")) == torchs[:-1] + ", activation=gelu)"
    leaky = ConvTranspose2d(*args, bias=False, activation="leaky_relu", negative_slope=0.2)
    assert repr(leaky) == torchs[:-1] + ", activation=leaky_relu, negative_slope=0.2)"


def test_a_torch_layer_becomes_one_by_its_class():
    layer = torch.nn.ConvTranspose2d(3, 2, 2, stride=2)
    expected = layer(draw(1, 3, 2, 2))
    layer.__class__ = ConvTranspose2d
    torch.testing.assert_close(layer(draw(1, 3, 2, 2)), expected)


def _worked_example():
    """The lecture notes' layer, filled by hand: input, layer, output."""
    layer = ConvTranspose2d(1, 1, 1, stride=2, output_padding=1)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.fill_(1)
    output = [[2, 1, 3, 1], [1, 1, 1, 1], [4, 1, 5, 1], [1, 1, 1, 1]]
    return torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), layer, torch.tensor([[output]]).float()


def test_the_worked_example():
    x, layer, expected = _worked_example()
    assert torch.equal(layer(x), expected)


@pytest.mark.interpreter
def test_the_module_runs_our_kernels(poisoned_empty):
    from segfast.kernels import record_launches

    x, layer, expected = _worked_example()
    with segfast.backend("triton"):
        assert torch.equal(layer(x), expected)
        with record_launches() as launches:  # instead of running them
            layer(x)
    ((launch, _),) = launches
    assert launch.kernel.__name__.startswith("_conv_transpose2d_forward")

    theirs, _ = twins(*OPTIONS["groups"])
    ours = ConvTranspose2d(*OPTIONS["groups"], activation="leaky_relu", negative_slope=0.2)
    ours.load_state_dict(theirs.state_dict())
    sequence = torch.nn.Sequential(theirs, torch.nn.LeakyReLU(0.2))
    expected = results(sequence, draw(2, 6, 3, 4))
    with segfast.backend("triton"):
        torch.testing.assert_close(results(ours, draw(2, 6, 3, 4)), expected, atol=1e-5, rtol=1e-5)
