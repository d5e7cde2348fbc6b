"""Bad arguments of `segfast.functional.conv2d`: the type torch raises, the argument named."""

import re

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv2d
from tests.fused_conv import BACKENDS


def _x(*shape, **options):
    return torch.ones(shape or (1, 4, 5, 5), **options)


def _w(*shape, **options):
    return torch.ones(shape or (6, 4, 3, 3), **options)


# What is wrong, the arguments, and the word by which our own message names it.
ERRORS = {
    "input ndim": ((_x(4, 5), _w()), {}, "input"),
    "input ndim 5": ((_x(1, 1, 4, 5, 5), _w()), {}, "input"),
    # torch itself says so, and takes it for another layer.
    "weight ndim": ((_x(), _w(4, 3, 3)), {}, "stride .*1 values"),
    "weight ndim, unbatched": ((_x(4, 5, 5), _w(4, 3, 3)), {}, "stride .*1 values"),
    "weight ndim, same": ((_x(), _w(4, 3, 3)), {"padding": "same"}, "stride .*1 values"),
    "channel mismatch": ((_x(1, 3, 5, 5), _w()), {}, "channels"),
    "channel mismatch, unbatched": ((_x(3, 5, 5), _w()), {}, "channels"),
    "groups": ((_x(1, 12, 5, 5), _w()), {"groups": 4}, "groups"),
    "groups that the channels do not have": ((_x(), _w()), {"groups": 2}, "groups"),
    "zero groups": ((_x(), _w()), {"groups": 0}, "groups"),
    "negative groups": ((_x(), _w()), {"groups": -1}, "groups"),
    "no pixels": ((_x(1, 4, 0, 5), _w()), {"padding": 2}, "Only zero batch or zero channel"),
    "zero stride": ((_x(), _w()), {"stride": 0}, "stride"),
    "negative stride": ((_x(), _w()), {"stride": (1, -1)}, "stride"),
    "zero stride, dilated": ((_x(), _w()), {"stride": 0, "dilation": 2}, "stride"),
    "zero dilation": ((_x(), _w()), {"dilation": 0}, "dilation"),
    "negative padding": ((_x(), _w()), {"padding": -1}, "padding"),
    "negative padding of a side": ((_x(), _w()), {"padding": (1, -2)}, "padding"),
    "padding's name": ((_x(), _w()), {"padding": "full"}, "'valid', 'same'.*'full'"),
    "same with a stride": ((_x(), _w()), {"padding": "same", "stride": 2}, "same.*stride"),
    "output size": ((_x(1, 4, 2, 5), _w()), {}, "size 0x3"),
    "output size through dilation": ((_x(), _w()), {"dilation": (1, 3)}, "size"),
    "dtype": ((_x(), _w(dtype=torch.float16)), {}, "weight.*dtype|type"),
    "bias dtype": ((_x(), _w(), torch.ones(6, dtype=torch.float16)), {}, "bias.*dtype"),
    "device": ((_x(), _w(device="meta")), {}, "weight.*device"),
    "bias device": ((_x(), _w(), torch.ones(6, device="meta")), {}, "bias.*device"),
    "bias length": ((_x(), _w(), torch.ones(5)), {}, "bias"),
    "bias ndim": ((_x(), _w(), torch.ones(1, 6)), {}, "bias"),
    "stride length": ((_x(), _w()), {"stride": (1, 2, 3)}, "stride"),
    "padding length": ((_x(), _w()), {"padding": (1, 2, 3)}, "padding"),
    "dilation length": ((_x(), _w()), {"dilation": (1, 2, 3)}, "dilation"),
}

# What torch refuses on a GPU, but oneDNN lets through.
ACCEPTED_ON_CPU = ("bias dtype", "device", "bias device")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", ERRORS)
def test_bad_arguments_raise_what_torch_raises(wrong, backend):
    args, options, word = ERRORS[wrong]
    error = RuntimeError
    if wrong not in ACCEPTED_ON_CPU:
        with pytest.raises(Exception) as torchs:
            F.conv2d(*args, **options)
        error = type(torchs.value)
    elif backend == "aten":
        pytest.skip("oneDNN computes it")
    with segfast.backend(backend), pytest.raises(error) as ours:
        conv2d(*args, **options)
    assert type(ours.value) is error
    if backend == "triton":
        assert re.search(f"(?i){word}", str(ours.value)), ours.value


@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_own_error_inputs(backend):
    with torch.backends.__allow_nonbracketed_mutation():
        database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    (info,) = [op for op in database if op.name == "nn.functional.conv2d"]
    seen = 0
    for wrong in info.error_inputs("cpu"):
        sample = wrong.sample_input
        seen += 1
        with segfast.backend(backend), pytest.raises(wrong.error_type):
            conv2d(sample.input, *sample.args, **sample.kwargs)
    assert seen >= 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"activation": "swish"}, ValueError, "'relu', .*'swish'"),
        ({"scale": torch.ones(4)}, RuntimeError, "scale"),
        ({"scale": torch.ones(1)}, RuntimeError, "scale"),
        ({"shift": torch.ones(6, 1)}, RuntimeError, "shift"),
        ({"shift": torch.ones(6, device="meta")}, RuntimeError, "shift.*device"),
        ({"residual": torch.ones(1, 6, 5, 5)}, RuntimeError, r"residual .*\[1, 6, 3, 3\]"),
        ({"residual": torch.ones(6, 3, 3)}, RuntimeError, "residual"),
        ({"residual": torch.ones(1, 6, 1, 1)}, RuntimeError, "residual"),  # to be expanded by the caller
    ],
)
def test_bad_epilogues_are_named(options, error, word, backend):
    with segfast.backend(backend):
        for size in ((1, 4, 5, 5), (4, 5, 5)):
            if len(size) == 3 and "residual" in options:
                options = {"residual": torch.ones(6, 4, 3)}
            with pytest.raises(error, match=word if len(size) == 4 else word.split(" ")[0]):
                conv2d(_x(*size), _w(), **options)
