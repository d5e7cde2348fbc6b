"""Bad arguments of the depthwise and separable functionals: the type torch raises, the argument named."""

import re

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from tests.fused_conv import BACKENDS


def _x(*shape, **options):
    return torch.ones(shape or (1, 4, 5, 5), **options)


def _w(*shape, **options):
    return torch.ones(shape or (4, 1, 3, 3), **options)


# What is wrong, the arguments, and the word by which our own message names it.
ERRORS = {
    "input ndim": ((_x(4, 3), _w()), {}, "input"),
    "input ndim 5": ((_x(1, 1, 4, 5, 5), _w()), {}, "input"),
    "weight ndim": ((_x(), _w(4, 3, 3)), {}, "weight"),
    "weight ndim, unbatched": ((_x(4, 5, 5), _w(4, 3, 3)), {}, "weight"),
    "filters not a multiple of channels": (
        (_x(), _w(6, 1, 3, 3)),
        {},
        "6 filters .*multiple of .*4 channels",
    ),
    "fewer filters than channels": ((_x(), _w(2, 1, 3, 3)), {}, "2 filters"),
    "no filters": ((_x(), _w(0, 1, 3, 3)), {}, "0 filters"),
    "no channels": ((_x(1, 0, 5, 5), _w()), {}, "0 channels"),
    "a weight that is not depthwise": ((_x(), _w(4, 4, 3, 3)), {}, r"weight must be .*\[4, 4, 3, 3\]"),
    "no pixels": ((_x(1, 4, 0, 5), _w()), {"padding": 2}, "Only zero batch or zero channel"),
    "zero stride": ((_x(), _w()), {"stride": 0}, "stride"),
    "negative stride": ((_x(), _w()), {"stride": (1, -1)}, "stride"),
    "zero stride, dilated": ((_x(), _w()), {"stride": 0, "dilation": 2}, "stride"),
    "zero dilation": ((_x(), _w()), {"dilation": 0}, "dilation"),
    "negative padding": ((_x(), _w()), {"padding": -1}, "padding"),
    "negative padding of a side": ((_x(), _w()), {"padding": (1, -2)}, "padding"),
    "padding's name": ((_x(), _w()), {"padding": "full"}, "'valid', 'same'.*'full'"),
    "same with a stride": ((_x(), _w()), {"padding": "same", "stride": 2}, "same.*stride"),
    "output size": ((_x(1, 4, 2, 5), _w()), {}, r"size 0x3"),
    "output size through dilation": ((_x(), _w()), {"dilation": (1, 3)}, "size"),
    "dtype": ((_x(), _w(dtype=torch.float16)), {}, "weight.*dtype|type"),
    "bias dtype": ((_x(), _w(), torch.ones(4, dtype=torch.float16)), {}, "bias.*dtype|type"),
    "device": ((_x(), _w(device="meta")), {}, "weight.*device|device"),
    "bias device": ((_x(), _w(), torch.ones(4, device="meta")), {}, "bias.*device|device"),
    "bias length": ((_x(), _w(), torch.ones(3)), {}, "bias"),
    "bias ndim": ((_x(), _w(), torch.ones(1, 4)), {}, "bias"),
    "stride length": ((_x(), _w()), {"stride": (1, 2, 3)}, "stride"),
    "padding length": ((_x(), _w()), {"padding": (1, 2, 3)}, "padding"),
}

# What torch refuses on a GPU, but oneDNN lets through; what torch takes as another layer.
ACCEPTED_ON_CPU = ("bias dtype", "device", "bias device")
TORCHS_OWN = ("no filters",)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", ERRORS)
def test_bad_arguments_raise_what_torch_raises(wrong, backend):
    args, options, word = ERRORS[wrong]
    error = RuntimeError
    groups = args[0].shape[-3] if args[0].dim() > 2 else 4
    if wrong not in ACCEPTED_ON_CPU + TORCHS_OWN:
        with pytest.raises(Exception) as torchs:
            F.conv2d(*args, **options, groups=groups)
        error = type(torchs.value)
    elif wrong in ACCEPTED_ON_CPU and backend == "aten":
        pytest.skip("oneDNN computes it")
    with segfast.backend(backend), pytest.raises(error) as ours:
        depthwise_conv2d(*args, **options)
    assert type(ours.value) is error
    if backend == "triton":
        assert re.search(f"(?i){word}", str(ours.value)), ours.value
    pointwise = torch.ones(2, args[1].shape[0], 1, 1)
    with segfast.backend(backend), pytest.raises(error) as ours:
        separable_conv2d(args[0], args[1], pointwise, *args[2:], **options)
    assert type(ours.value) is error
    if backend == "triton":
        assert re.search(f"(?i){word}", str(ours.value)), ours.value
        assert "depthwise_conv2d:" not in str(ours.value)  # what the user called


# One for each sample that torch's own database holds to be wrong, made depthwise where it can be.
def test_torchs_own_error_inputs():
    with torch.backends.__allow_nonbracketed_mutation():
        database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    (info,) = [op for op in database if op.name == "nn.functional.conv2d"]
    seen = 0
    for wrong in info.error_inputs("cpu"):
        sample = wrong.sample_input
        weight = sample.args[0][:, :1]
        kwargs = {k: v for k, v in sample.kwargs.items() if k != "groups"}
        try:
            F.conv2d(sample.input, weight, *sample.args[1:], **kwargs, groups=sample.input.shape[-3])
        except Exception as error:
            seen += 1
            with segfast.backend("aten"), pytest.raises(type(error)):
                depthwise_conv2d(sample.input, weight, *sample.args[1:], **kwargs)
    assert seen >= 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"activation": "swish"}, ValueError, "'relu', .*'swish'"),
        ({"scale": torch.ones(3)}, RuntimeError, "scale"),
        ({"shift": torch.ones(4, 1)}, RuntimeError, "shift"),
        ({"scale": torch.ones(1)}, RuntimeError, "scale"),
    ],
)
def test_bad_epilogues_are_named(options, error, word, backend):
    with segfast.backend(backend):
        with pytest.raises(error, match=word):
            depthwise_conv2d(_x(), _w(), **options)
        with pytest.raises(error, match=word):
            depthwise_conv2d(_x(), _w(), **options, return_statistics=True)
        depthwise_options = {f"depthwise_{name}": value for name, value in options.items()}
        with pytest.raises(error, match=word):
            separable_conv2d(_x(), _w(), torch.ones(4, 4, 1, 1), **depthwise_options)
        with pytest.raises(error, match=word):
            separable_conv2d(_x(), _w(), torch.ones(4, 4, 1, 1), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("pointwise", "options", "word"),
    [
        (torch.ones(2, 3, 1, 1), {}, r"pointwise_weight must be \[C_out, 4, 1, 1\], got \[2, 3, 1, 1\]"),
        (torch.ones(2, 4, 3, 3), {}, "pointwise_weight"),
        (torch.ones(2, 4), {}, "pointwise_weight"),
        (torch.ones(2, 4, 1, 1).double(), {}, "pointwise_weight.*dtype"),
        (torch.ones(2, 4, 1, 1, device="meta"), {}, "pointwise_weight.*device"),
        (torch.ones(2, 4, 1, 1), {"bias": torch.ones(4)}, "bias"),
        (torch.ones(2, 4, 1, 1), {"bias": torch.ones(2).double()}, "bias.*dtype"),
        (torch.ones(2, 4, 1, 1), {"depthwise_bias": torch.ones(2)}, "bias|\\[2\\]"),
        (torch.ones(2, 4, 1, 1), {"residual": torch.ones(1, 2, 5, 5)}, r"residual .*\[1, 2, 3, 3\]"),
        (torch.ones(2, 4, 1, 1), {"residual": torch.ones(2, 3, 3)}, "residual"),
        (torch.ones(2, 4, 1, 1), {"residual": torch.ones(1, 1, 3, 3)}, "residual"),
    ],
)
def test_bad_pointwise_operands_are_named(pointwise, options, word, backend):
    with segfast.backend(backend), pytest.raises(RuntimeError, match=word):
        separable_conv2d(_x(), _w(), pointwise, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64, torch.bfloat16], ids=str)
@pytest.mark.interpreter
def test_a_dtype_without_kernels_is_refused_by_name(dtype):
    name = str(dtype).removeprefix("torch.")
    x, w, p = (t.to(dtype) for t in (_x(), _w(), torch.ones(2, 4, 1, 1)))
    with segfast.backend("triton"):
        with pytest.raises(NotImplementedError, match=f"depthwise_conv2d: .*{name}"):
            depthwise_conv2d(x, w)
        with pytest.raises(NotImplementedError, match=f"separable_conv2d: .*{name}"):
            separable_conv2d(x, w, p)
