"""Bad arguments of `segfast.functional.conv_transpose2d`: the type torch raises, the argument named."""

import re

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv_transpose2d
from tests.fused_conv import BACKENDS


def _x(*shape, **options):
    return torch.ones(shape or (1, 4, 3, 3), **options)


def _w(*shape, **options):
    return torch.ones(shape or (4, 2, 2, 2), **options)


# What is wrong, the arguments, and the word by which our own message names it.
ERRORS = {
    "input ndim": ((_x(4, 3), _w()), {}, "input"),
    "input ndim 5": ((_x(1, 1, 4, 3, 3), _w()), {}, "input"),
    "weight ndim": ((_x(), _w(4, 2, 2)), {}, "weight"),
    "channel mismatch": ((_x(1, 3, 3, 3), _w()), {}, "channels"),
    "groups": ((_x(1, 4, 3, 3), _w()), {"groups": 3}, "groups"),
    "zero groups": ((_x(), _w()), {"groups": 0}, "groups"),
    "zero stride": ((_x(), _w()), {"stride": 0}, "stride"),
    "negative stride": ((_x(), _w()), {"stride": (1, -1)}, "stride"),
    "zero dilation": ((_x(), _w()), {"dilation": 0}, "dilation"),
    "negative padding": ((_x(), _w()), {"padding": -1}, "padding"),
    "output_padding": ((_x(), _w()), {"stride": 2, "output_padding": 2}, "output.padding"),
    "output_padding, one axis": (
        (_x(), _w()),
        {"stride": (3, 2), "dilation": (1, 2), "output_padding": (2, 3)},
        "output.padding",
    ),
    "output size": ((_x(1, 4, 1, 1), _w()), {"padding": 1}, "size"),
    "dtype": ((_x(), _w(dtype=torch.float16)), {}, "dtype|type"),
    "bias dtype": ((_x(), _w(), torch.ones(2, dtype=torch.float16)), {}, "dtype|type"),
    "device": ((_x(), _w(device="meta")), {}, "device"),
    "bias length": ((_x(), _w(), torch.ones(3)), {}, "bias"),
    "bias ndim": ((_x(), _w(), torch.ones(1, 2)), {}, "bias"),
    "stride length": ((_x(), _w()), {"stride": (1, 2, 3)}, "stride"),
    # On the way of the channelwise detection, which must not lose torch's checks.
    "stride 8, input ndim": ((_x(4, 3), _w(4, 4, 8, 8)), {"stride": 8}, "input"),
    "stride 8, output_padding": (
        (_x(), torch.eye(4)[..., None, None].repeat(1, 1, 8, 8)),
        {"stride": 8, "output_padding": 8},
        "output.padding",
    ),
    "stride 8, negative padding": (
        (_x(), torch.eye(4)[..., None, None].repeat(1, 1, 8, 8)),
        {"stride": 8, "padding": -1},
        "padding",
    ),
    "stride 8, bias length": (
        (_x(), torch.eye(4)[..., None, None].repeat(1, 1, 8, 8), torch.ones(1)),
        {"stride": 8},
        "bias",
    ),
    "stride 8, bias dtype": (
        (_x(), torch.eye(4)[..., None, None].repeat(1, 1, 8, 8), torch.ones(4).double()),
        {"stride": 8},
        "dtype|type",
    ),
}


# What torch refuses on a GPU, but oneDNN lets through.
ACCEPTED_ON_CPU = ("bias dtype", "device")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", ERRORS)
def test_bad_arguments_raise_what_torch_raises(wrong, backend):
    args, options, word = ERRORS[wrong]
    error = RuntimeError
    if wrong not in ACCEPTED_ON_CPU:
        with pytest.raises(Exception) as torchs:
            F.conv_transpose2d(*args, **options)
        error = type(torchs.value)
    elif backend == "aten":
        pytest.skip("oneDNN computes it")
    with segfast.backend(backend), pytest.raises(error) as ours:
        conv_transpose2d(*args, **options)
    assert type(ours.value) is error
    if backend == "triton":
        assert re.search(f"(?i){word}", str(ours.value)), ours.value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"activation": "swish"}, ValueError, "'relu', .*'swish'"),
        ({"scale": torch.ones(3)}, RuntimeError, "scale"),
        ({"shift": torch.ones(2, 1)}, RuntimeError, "shift"),
        ({"residual": torch.ones(1, 2, 4, 5)}, RuntimeError, "residual"),
        ({"residual": torch.ones(2, 4, 4)}, RuntimeError, "residual"),
    ],
)
def test_bad_epilogues_are_named(options, error, word, backend):
    with segfast.backend(backend), pytest.raises(error, match=word):
        conv_transpose2d(_x(), _w(), **options)
