"""Bad arguments of the convolutions: the type torch raises, the argument named, before any launch."""

import re

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv2d, conv_transpose2d, depthwise_conv2d, separable_conv2d
from tests.fused_conv import BACKENDS

HALF, META = {"dtype": torch.float16}, {"device": "meta"}


def _depthwise(input, weight, *args, **options):
    return F.conv2d(input, weight, *args, groups=input.shape[-3] if input.dim() > 2 else 4, **options)


def _separable(input, weight, bias=None, **options):
    return separable_conv2d(input, weight, torch.ones(2, weight.shape[0], 1, 1), bias, **options)


# Ours, torch's, and the shapes of an image, a weight and a bias that are right.
FUNCTIONS = {
    "conv2d": (conv2d, F.conv2d, (1, 4, 5, 5), (6, 4, 3, 3), 6),
    "conv_transpose2d": (conv_transpose2d, F.conv_transpose2d, (1, 4, 3, 3), (4, 2, 2, 2), 2),
    "depthwise_conv2d": (depthwise_conv2d, _depthwise, (1, 4, 5, 5), (4, 1, 3, 3), 4),
    "separable_conv2d": (_separable, _depthwise, (1, 4, 5, 5), (4, 1, 3, 3), 4),
}
ALL = tuple(FUNCTIONS)
DEPTHWISE = ("depthwise_conv2d", "separable_conv2d")
FORWARDS = ("conv2d", *DEPTHWISE)
CONV, TRANSPOSE = ("conv2d",), ("conv_transpose2d",)
EYE = torch.eye(4)[..., None, None].repeat(1, 1, 8, 8)
# Of which functions, what is wrong with a call, and the word by which our own message names it.
ERRORS = {
    "input ndim": (ALL, {"input": (4, 3)}, "input"),
    "input ndim 5": (ALL, {"input": (1, 1, 4, 5, 5)}, "input"),
    "zero stride": (ALL, {"stride": 0}, "stride"),
    "negative stride": (ALL, {"stride": (1, -1)}, "stride"),
    "zero stride, dilated": (ALL, {"stride": 0, "dilation": 2}, "stride"),
    "stride length": (ALL, {"stride": (1, 2, 3)}, "stride"),
    "zero dilation": (ALL, {"dilation": 0}, "dilation"),
    "negative padding": (ALL, {"padding": -1}, "padding"),
    "negative padding of a side": (ALL, {"padding": (1, -2)}, "padding"),
    "dtype": (ALL, {"weight": HALF}, "weight.*dtype|type"),
    "bias dtype": (ALL, {"bias": HALF}, "bias.*dtype|type"),
    "device": (ALL, {"weight": META}, "weight.*device|device"),
    "bias device": (FORWARDS, {"bias": META}, "bias.*device|device"),
    "bias length": (ALL, {"bias": (3,)}, "bias"),
    "bias ndim": (ALL, {"bias": (1, 4)}, "bias"),
    "padding length": (FORWARDS, {"padding": (1, 2, 3)}, "padding"),
    "dilation length": (CONV, {"dilation": (1, 2, 3)}, "dilation"),
    "padding's name": (FORWARDS, {"padding": "full"}, "'valid', 'same'.*'full'"),
    "same with a stride": (FORWARDS, {"padding": "same", "stride": 2}, "same.*stride"),
    "output size": (FORWARDS, {"input": (1, 4, 2, 5)}, "size 0x3"),
    "output size through dilation": (FORWARDS, {"dilation": (1, 3)}, "size"),
    "no pixels": (FORWARDS, {"input": (1, 4, 0, 5), "padding": 2}, "Only zero batch or zero channel"),
    # torch itself says so, and takes it for another layer.
    "weight ndim of conv2d": (CONV, {"weight": (4, 3, 3)}, "stride .*1 values"),
    "weight ndim of conv2d, unbatched": (
        CONV, {"input": (4, 5, 5), "weight": (4, 3, 3)}, "stride .*1 values",
    ),
    "weight ndim of conv2d, same": (CONV, {"weight": (4, 3, 3), "padding": "same"}, "stride .*1 values"),
    "weight ndim": (("conv_transpose2d", *DEPTHWISE), {"weight": (4, 3, 3)}, "weight"),
    "weight ndim, unbatched": (DEPTHWISE, {"input": (4, 5, 5), "weight": (4, 3, 3)}, "weight"),
    "channels": (("conv2d", "conv_transpose2d"), {"input": (1, 3, 5, 5)}, "channels"),
    "channels, unbatched": (CONV, {"input": (3, 5, 5)}, "channels"),
    "groups": (CONV, {"input": (1, 12, 5, 5), "groups": 4}, "groups"),
    "groups that the channels do not have": (CONV, {"groups": 2}, "groups"),
    "groups of conv_transpose2d": (TRANSPOSE, {"groups": 3}, "groups"),
    "zero groups": (("conv2d", "conv_transpose2d"), {"groups": 0}, "groups"),
    "negative groups": (CONV, {"groups": -1}, "groups"),
    "filters not a multiple of channels": (
        DEPTHWISE, {"weight": (6, 1, 3, 3)}, "6 filters .*multiple of .*4 channels",
    ),
    "fewer filters than channels": (DEPTHWISE, {"weight": (2, 1, 3, 3)}, "2 filters"),
    "no filters": (DEPTHWISE, {"weight": (0, 1, 3, 3)}, "0 filters"),
    "no channels": (DEPTHWISE, {"input": (1, 0, 5, 5)}, "0 channels"),
    "a weight that is not depthwise": (DEPTHWISE, {"weight": (4, 4, 3, 3)}, r"weight must .*\[4, 4, 3, 3\]"),
    "output_padding": (TRANSPOSE, {"stride": 2, "output_padding": 2}, "output.padding"),
    "output_padding, one axis": (
        TRANSPOSE, {"stride": (3, 2), "dilation": (1, 2), "output_padding": (2, 3)}, "output.padding",
    ),
    "output size of conv_transpose2d": (TRANSPOSE, {"input": (1, 4, 1, 1), "padding": 1}, "size"),
    # On the way of the channelwise detection, which must not lose torch's checks.
    "stride 8, input ndim": (TRANSPOSE, {"input": (4, 3), "weight": EYE, "stride": 8}, "input"),
    "stride 8, output_padding": (
        TRANSPOSE, {"weight": EYE, "stride": 8, "output_padding": 8}, "output.padding",
    ),
    "stride 8, negative padding": (TRANSPOSE, {"weight": EYE, "stride": 8, "padding": -1}, "padding"),
    "stride 8, bias length": (TRANSPOSE, {"weight": EYE, "stride": 8, "bias": (1,)}, "bias"),
    "stride 8, bias dtype": (
        TRANSPOSE, {"weight": EYE, "stride": 8, "bias": torch.ones(4).double()}, "dtype|type",
    ),
}  # fmt: skip
# Refused by torch on a GPU, but let through by oneDNN; taken by torch as another layer.
ACCEPTED_ON_CPU = ("bias dtype", "device", "bias device")
TORCHS_OWN = ("no filters",)
CALLS = [(wrong, function) for wrong, (functions, *_) in ERRORS.items() for function in functions]


def arguments(function, given):
    """A right call with what is wrong in it: shapes, or what a tensor of the right shape has otherwise."""
    _, _, image, weight, channels = FUNCTIONS[function]
    right = {"input": image, "weight": weight, "bias": (channels,)}
    options = {name: value for name, value in given.items() if name not in right}
    tensors = {}
    for name, shape in right.items():
        wrong = given.get(name, {} if name != "bias" else None)
        if isinstance(wrong, tuple):
            tensors[name] = torch.ones(wrong)
        elif isinstance(wrong, dict):
            tensors[name] = torch.ones(shape, **wrong)
        elif wrong is not None:
            tensors[name] = wrong
    return tensors | options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("wrong", "function"), CALLS)
def test_bad_arguments_raise_what_torch_raises(wrong, function, backend):
    ours, torchs, *_ = FUNCTIONS[function]
    _, given, word = ERRORS[wrong]
    call = arguments(function, given)
    error = RuntimeError
    if wrong not in ACCEPTED_ON_CPU + TORCHS_OWN:
        with pytest.raises(Exception) as theirs:
            torchs(**call)
        error = type(theirs.value)
    elif wrong in ACCEPTED_ON_CPU and backend == "aten":
        pytest.skip("oneDNN computes it")
    launching = segfast.kernels.record_launches()
    with segfast.backend(backend), launching as launches, pytest.raises(error) as found:
        ours(**call)
    assert type(found.value) is error and launches == []
    if backend == "triton":
        assert re.search(f"(?i){word}", str(found.value)), found.value
        # The error names the function that the user called.
        assert function != "separable_conv2d" or "depthwise_conv2d:" not in str(found.value)


EPILOGUES = {
    "activation": ({"activation": "swish"}, ValueError, "'relu', .*'swish'"),
    "scale's length": ({"scale": torch.ones(3)}, RuntimeError, "scale"),
    "a scale for all": ({"scale": torch.ones(1)}, RuntimeError, "scale"),
    "shift's ndim": ({"shift": torch.ones(6, 1)}, RuntimeError, "shift"),
    "shift's device": ({"shift": torch.ones(6, device="meta")}, RuntimeError, "shift"),
    "residual's size": ({"residual": torch.ones(1, 6, 5, 4)}, RuntimeError, "residual"),
    "residual's ndim": ({"residual": torch.ones(6, 3, 3)}, RuntimeError, "residual"),
    "a residual for all pixels": ({"residual": torch.ones(1, 6, 1, 1)}, RuntimeError, "residual"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("wrong", EPILOGUES)
def test_bad_epilogues_are_named(wrong, function, batched, backend):
    options, error, word = EPILOGUES[wrong]
    if function == "depthwise_conv2d" and "residual" in options:
        pytest.skip("it takes none")
    call = arguments(function, {})
    if not batched:
        call["input"] = call["input"][0]
        options = {"residual": torch.ones(6, 5, 4)} if "residual" in options else options
    with segfast.backend(backend), pytest.raises(error, match=word):
        FUNCTIONS[function][0](**call, **options)


# One for each sample that torch's own database holds to be wrong, made depthwise where it can be.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", ["conv2d", "depthwise_conv2d"])
def test_torchs_own_error_inputs(function, backend):
    with torch.backends.__allow_nonbracketed_mutation():
        database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    (info,) = [op for op in database if op.name == "nn.functional.conv2d"]
    ours, torchs, *_ = FUNCTIONS[function]
    seen = 0
    for wrong in info.error_inputs("cpu"):
        sample, options = wrong.sample_input, dict(wrong.sample_input.kwargs)
        weight, *args = sample.args
        if function != "conv2d":
            weight = weight[:, :1]
            options.pop("groups", None)
        try:
            torchs(sample.input, weight, *args, **options)
        except Exception as error:
            seen += 1
            with segfast.backend(backend), pytest.raises(type(error)):
                ours(sample.input, weight, *args, **options)
    assert seen >= 6
