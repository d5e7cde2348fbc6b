"""`segfast.nn.ConvTranspose2d` is `torch.nn.ConvTranspose2d`, with an activation."""

from functools import partial

import pytest
import torch

import segfast
from segfast.nn import ConvTranspose2d
from tests.fused_conv import draw
from tests.separable_conv2d.test_module import results


def twins(*args, **options):
    """The torch layer and ours, with the same parameters."""
    theirs, ours = torch.nn.ConvTranspose2d(*args, **options), ConvTranspose2d(*args, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (6, 5, 4)], ids=["batch", "unbatched"])
@pytest.mark.parametrize("size", [[9, 7], [10, 8], [9, 8], [2, 6, 10, 7]], ids=str)
def test_output_size(size, shape):
    if len(shape) == 3 and len(size) == 4:
        size = size[1:]
    theirs, ours = twins(6, 4, 3, stride=2, padding=1)
    expected, actual = (
        results(partial(layer, output_size=size), draw(*shape), layer.parameters())
        for layer in (theirs, ours)
    )
    torch.testing.assert_close(actual, expected)
    assert list(actual[0].shape[-2:]) == size[-2:]


def test_output_size_of_a_dilated_layer():
    theirs, ours = twins(6, 4, 3, stride=2, dilation=2)
    expected, actual = (
        results(partial(layer, output_size=[14, 12]), draw(1, 6, 5, 4), layer.parameters())
        for layer in (theirs, ours)
    )
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


def test_reflected_borders_are_refused():
    with pytest.raises(ValueError, match="zeros"):
        ConvTranspose2d(2, 3, 2, padding_mode="reflect")


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

    groups = (6, 4, 3, 2, 1, 1, 2)
    theirs, _ = twins(*groups)
    ours = ConvTranspose2d(*groups, activation="leaky_relu", negative_slope=0.2)
    ours.load_state_dict(theirs.state_dict())
    sequence = torch.nn.Sequential(theirs, torch.nn.LeakyReLU(0.2))
    expected = results(sequence, draw(2, 6, 3, 4), theirs.parameters())
    with segfast.backend("triton"):
        torch.testing.assert_close(
            results(ours, draw(2, 6, 3, 4), ours.parameters()), expected, atol=1e-5, rtol=1e-5
        )
