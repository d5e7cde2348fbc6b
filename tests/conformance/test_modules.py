"""Duties of every layer to torch: its constructor, results, copies and conversions are those of torch's."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

import segfast
from segfast.nn import Conv2d, ConvTranspose2d, DepthwiseConv2d
from tests.fused_conv import BACKENDS, REFERENCE_ACTIVATIONS, draw
from tests.separable_conv2d.test_module import results


def depthwise(channels, out, kernel, stride=1, padding=0, dilation=1, groups=6, *args, **options):
    return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, *args, **options)


# Ours, and torch's, of which both take what follows the 6 input channels.
LAYERS = {
    "Conv2d": (Conv2d, nn.Conv2d),
    "ConvTranspose2d": (ConvTranspose2d, nn.ConvTranspose2d),
    "DepthwiseConv2d": (DepthwiseConv2d, depthwise),
}
GEOMETRY = {
    "Conv2d": {
        "dilated": (4, 3, 1, 12, 12),
        "3x3": (4, 3, 1, 1),
        "stride": (4, 5, 2, 2, 2),
        "pairs": (4, (3, 2), (1, 2), (1, 0), (2, 1)),
        "groups": (4, 3, 1, 3, 3, 2),
        "no bias": (4, 3, 1, 2, 2, 1, False),
        "same": (4, 4, 1, "same", 3),
        "valid": (4, 3, 2, "valid", 2),
    },
    "ConvTranspose2d": {
        "plain": (4, 3),
        "stride": (4, 2, 2),
        "padding": (4, 4, 2, 1),
        "output_padding": (4, 3, 2, 1, 1),
        "groups": (4, 3, 2, 1, 1, 2),
        "no bias": (4, 3, 2, 1, 1, 1, False),
        "dilation": (4, 3, 2, 2, 1, 1, True, 2),
        "pairs": (4, (3, 2), (1, 3), (1, 0), (0, 2), 2, True, (2, 1)),
    },
    "DepthwiseConv2d": {
        "3x3": (6, 3, 1, 1),
        "stride": (6, 5, 2, 2),
        "pairs": (6, (3, 2), (1, 2), (1, 0), (2, 1)),
        "multiplier": (12, 3, 1, 1),
        "no bias": (6, 3, 1, 1, 1, 6, False),
        "same": (6, 4, 1, "same", 3),
        "valid": (6, 3, 2, "valid"),
    },
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_geometry = pytest.mark.parametrize(
    ("name", "geometry"), [(name, geometry) for name in LAYERS for geometry in GEOMETRY[name]]
)
# As `draw` makes them, the image alone in channels_last, and with it the weights.
LAYOUTS = ("contiguous", "channels_last", "all channels_last")


def twins(name, *args, **options):
    """The torch layer and ours, with the same parameters; by default 6 to 6 channels, 3x3."""
    ours, torchs = LAYERS[name]
    args = args or (6, 3)
    torchs_own = {key: value for key, value in options.items() if key not in ("activation", "negative_slope")}
    pair = torchs(6, *args, **torchs_own), ours(6, *args, **options)
    pair[1].load_state_dict(pair[0].state_dict(), strict=True)
    return pair


@every_layer
def test_the_constructor_is_torchs_with_two_more_keywords(name):
    ours, torchs = LAYERS[name]
    torchs = nn.Conv2d if torchs is depthwise else torchs
    signature = inspect.signature(torchs.__init__).parameters
    defaults = {n: p.default for n, p in signature.items() if p.default is not inspect.Parameter.empty}
    if name == "DepthwiseConv2d":
        defaults["groups"] = None  # as many as there are channels
    assert repr(ours(in_channels=6, out_channels=6, kernel_size=2, **defaults)) == repr(ours(6, 6, 2))
    own = inspect.signature(ours).parameters.values()
    keywords = {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY}
    assert keywords == {"activation": None, "negative_slope": 0.01}


@every_geometry
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_gradients_and_strides_are_torchs(name, geometry, layout, dtype):
    pair = [layer.to(dtype) for layer in twins(name, *GEOMETRY[name][geometry])]
    if layout == "all channels_last":
        pair = [layer.to(memory_format=torch.channels_last) for layer in pair]
    x = draw(2, 6, 17, 14, dtype=dtype, channels_last=layout != "contiguous")
    (expected, expected_grads), (y, grads) = (results(layer, x, layer.parameters()) for layer in pair)
    torch.testing.assert_close((y, grads), (expected, expected_grads))
    assert y.stride() == expected.stride()
    assert [g.stride() for g in grads] == [g.stride() for g in expected_grads]


@every_layer
def test_a_state_dict_loads_both_ways(name):
    theirs, ours = twins(name, activation="relu")
    with torch.no_grad():
        ours.weight.mul_(2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(theirs.weight, ours.weight) and torch.equal(theirs.bias, ours.bias)
    assert list(ours.state_dict()) == ["weight", "bias"]


@every_layer
def test_the_same_seed_gives_the_same_weights(name):
    layers = []
    for make in LAYERS[name]:
        torch.manual_seed(0)
        layers.append(make(6, 6, 3))
    assert torch.equal(layers[0].weight, layers[1].weight) and torch.equal(layers[0].bias, layers[1].bias)


@pytest.mark.parametrize("name", ["Conv2d", "DepthwiseConv2d"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("options", [{"padding": (1, 2)}, {"padding": "same", "dilation": 2}], ids=str)
def test_padding_modes(name, mode, options):
    theirs, ours = twins(name, 6, 4, **options, padding_mode=mode)
    x = draw(2, 6, 9, 8)
    torch.testing.assert_close(*(results(layer, x, layer.parameters()) for layer in (ours, theirs)))


@every_layer
@pytest.mark.parametrize(
    "shape", [(6, 5, 4), (0, 6, 5, 4), (1, 6, 1, 1)], ids=["unbatched", "empty", "a pixel"]
)
def test_batches(name, shape):
    pair = twins(name, 6, 3, padding=1)
    torch.testing.assert_close(*(results(layer, draw(*shape), layer.parameters()) for layer in pair))


@every_layer
def test_the_meta_device_gives_shapes_and_strides(name):
    theirs, ours = (layer(6, 6, 3, stride=2, device="meta") for layer in reversed(LAYERS[name]))
    x = torch.empty(2, 6, 9, 7, device="meta").to(memory_format=torch.channels_last)
    y, expected = ours(x), theirs(x)
    assert y.is_meta and y.shape == expected.shape and y.stride() == expected.stride()
    assert copy.deepcopy(twins(name, 6, 3, stride=2)[1]).to("meta")(x).shape == expected.shape


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_keyword(name, dtype):
    ours = LAYERS[name][0](6, 6, 2, dtype=dtype, device="cpu", activation="silu")
    assert {p.dtype for p in ours.parameters()} == {dtype} == {ours(draw(1, 6, 2, 2, dtype=dtype)).dtype}
    with pytest.raises(RuntimeError):
        ours(draw(1, 6, 2, 2))


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        ("Conv2d", "dilated"), ("ConvTranspose2d", "output_padding"), ("ConvTranspose2d", "groups"),
        ("DepthwiseConv2d", "3x3"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("activation", REFERENCE_ACTIVATIONS)
def test_the_activation_follows_the_convolution(name, geometry, activation):
    options = {"negative_slope": 0.2} if activation == "leaky_relu" else {}
    theirs, ours = twins(name, *GEOMETRY[name][geometry], activation=activation, **options)
    # Wide enough to reach every piece of the activations.
    x = 4 * draw(2, 6, 9, 8)
    expected = results(lambda x: REFERENCE_ACTIVATIONS[activation](theirs(x)), x, theirs.parameters())
    torch.testing.assert_close(results(ours, x, ours.parameters()), expected)


@every_layer
def test_leaky_relus_slope_is_torchs_by_default(name):
    theirs, ours = twins(name, activation="leaky_relu")
    x = draw(1, 6, 4, 4)
    torch.testing.assert_close(ours(x), nn.functional.leaky_relu(theirs(x)))


@every_layer
@pytest.mark.parametrize("activation", ["swish", "ReLU", "", torch.relu], ids=str)
def test_an_unknown_activation_is_refused_at_once(name, activation):
    with pytest.raises(ValueError, match=r"activation must be one of None, 'relu'.*got"):
        LAYERS[name][0](6, 6, 2, activation=activation)


@every_layer
def test_repr_tells_what_torchs_does_and_the_activation(name):
    theirs, ours = twins(name, 6, 4, 2, 1, bias=False)
    torchs = repr(theirs).replace("Conv2d", name) if name == "DepthwiseConv2d" else repr(theirs)
    assert repr(ours) == torchs
    for activation, more in (("gelu", ""), ("leaky_relu", ", negative_slope=0.2")):
        ours = twins(name, 6, 4, 2, 1, bias=False, activation=activation, negative_slope=0.2)[1]
        assert repr(ours) == f"{torchs[:-1]}, activation={activation}{more})"


@every_layer
def test_a_torch_layer_becomes_one_by_its_class(name):
    options = {} if name == "ConvTranspose2d" else {"padding_mode": "reflect"}
    layer, _ = twins(name, 6, 3, padding=1, **options)
    expected = layer(draw(1, 6, 4, 4))
    layer.__class__ = LAYERS[name][0]
    torch.testing.assert_close(layer(draw(1, 6, 4, 4)), expected)


@pytest.mark.compat
@every_layer
def test_it_compiles_and_exports(name):
    _, ours = twins(name, 6, 3, padding=1, dilation=1, bias=False)
    x = draw(2, 6, 9, 8)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for other in (compiled, torch.export.export(ours, (x,)).module()):
        torch.testing.assert_close(other(x), ours(x))


@every_layer
def test_autocast(name):
    theirs, ours = twins(name, 6, 3, padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(draw(2, 6, 9, 8))
        torch.testing.assert_close(y, theirs(draw(2, 6, 9, 8)))
    assert y.dtype is torch.bfloat16


@every_layer
@pytest.mark.parametrize("channels", [2, 3, 5, 12])
def test_an_input_of_other_channels_is_refused(name, channels):
    # A depthwise operator would take 3 channels for a multiplier of 2.
    message = rf"must have 6 channels, got \[1, {channels}, 4, 4\]" if "Depthwise" in name else "channels"
    with pytest.raises(RuntimeError, match=message):
        LAYERS[name][0](6, 6, 3)(draw(1, channels, 4, 4))


def small(name):
    """A torch layer, ours with an activation, and a small image."""
    geometry = {
        "Conv2d": (2, 3, 1, 2, 2),
        "ConvTranspose2d": (2, 2, 2),
        "DepthwiseConv2d": (6, 3, 1, 1),
    }[name]
    theirs, ours = twins(name, *geometry, activation="leaky_relu", negative_slope=0.3)
    return lambda x: nn.functional.leaky_relu(theirs(x), 0.3), ours, theirs, draw(1, 6, 3, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@every_layer
def test_functional_call_swaps_the_parameters(name, backend):
    function, ours, theirs, x = small(name)
    other = {"weight": draw(*ours.weight.shape).requires_grad_(), "bias": draw(*ours.bias.shape)}
    with torch.no_grad():
        for key, value in other.items():
            getattr(theirs, key).copy_(value)
    expected = function(x)
    with segfast.backend(backend):
        y = functional_call(ours, other, (x,))
        gradient = torch.autograd.grad(y.sum(), other["weight"])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected.sum(), theirs.weight), atol=1e-4, rtol=1e-4
    )
    assert ours.weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@every_layer
def test_a_layer_survives_deepcopy_and_pickle(name, backend):
    function, ours, _, x = small(name)
    with segfast.backend(backend), torch.no_grad():
        torch.testing.assert_close(ours(x), function(x), atol=1e-5, rtol=1e-5)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is type(ours) and repr(twin) == repr(ours)
            assert twin.weight is not ours.weight and torch.equal(twin(x), ours(x))
