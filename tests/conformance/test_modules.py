"""Duties of every layer to torch: parameters that can be swapped, copies that compute the same."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import segfast
from tests.fused_conv import BACKENDS, draw
from tests.separable_conv2d.reference import plain_depthwise

_LEAKY = {"activation": "leaky_relu", "negative_slope": 0.3}
# A layer, an image, and the layer by its weight and bias.
LAYERS = {
    "Conv2d": (
        lambda: segfast.nn.Conv2d(3, 2, 3, padding=2, dilation=2, **_LEAKY),
        (1, 3, 4, 3),
        lambda x, w, b: F.conv2d(x, w, b, padding=2, dilation=2),
    ),
    "ConvTranspose2d": (
        lambda: segfast.nn.ConvTranspose2d(3, 2, 2, stride=2, **_LEAKY),
        (1, 3, 2, 2),
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2),
    ),
    "DepthwiseConv2d": (
        lambda: segfast.nn.DepthwiseConv2d(3, 6, 3, padding=1, **_LEAKY),
        (1, 3, 4, 4),
        lambda x, w, b: plain_depthwise(x, w, b, padding=1),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_functional_call_swaps_the_parameters(name, backend):
    make, shape, define = LAYERS[name]
    layer, x = make(), draw(*shape)
    other = {"weight": draw(*layer.weight.shape).requires_grad_(), "bias": draw(*layer.bias.shape)}
    expected = F.leaky_relu(define(x, *other.values()), 0.3)
    with segfast.backend(backend):
        y = functional_call(layer, other, (x,))
        gradient = torch.autograd.grad(y.sum(), other["weight"])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected.sum(), other["weight"]), atol=1e-4, rtol=1e-4
    )
    assert layer.weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_survives_deepcopy_and_pickle(name, backend):
    make, shape, define = LAYERS[name]
    layer, x = make(), draw(*shape)
    with segfast.backend(backend), torch.no_grad():
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        assert all(torch.equal(layer(x), twin(x)) for twin in copies)
        expected = F.leaky_relu(define(x, layer.weight, layer.bias), 0.3)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
