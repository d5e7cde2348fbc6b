"""torch's own samples of the convolutions, batches of every size, and padding by name."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv2d, conv_transpose2d, depthwise_conv2d
from tests.conv2d.reference import check_conv2d
from tests.fused_conv import BACKENDS, check_fused, draw
from tests.separable_conv2d.reference import check_depthwise, plain_depthwise

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def check_transposed(tensors, **geometry):
    with segfast.backend("triton"):
        return check_fused(conv_transpose2d, F.conv_transpose2d, tensors, **geometry)


# Ours, torch's, and what holds our kernels to it.
FUNCTIONS = {
    "conv2d": (conv2d, F.conv2d, check_conv2d),
    "conv_transpose2d": (conv_transpose2d, F.conv_transpose2d, check_transposed),
    "depthwise_conv2d": (depthwise_conv2d, plain_depthwise, check_depthwise),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def samples(name, dtype):
    """torch's own samples by name; of a depthwise convolution the geometry of the others' on its weights."""
    # The import freezes torch.backends' flags; undone on leaving, for the benchmarks that follow set them.
    with torch.backends.__allow_nonbracketed_mutation():
        database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    torchs = "conv_transpose2d" if name == "conv_transpose2d" else "conv2d"
    (info,) = [op for op in database if op.name == f"nn.functional.{torchs}"]
    found = {}
    for sample in info.sample_inputs("cpu", dtype):
        (weight, bias), kwargs = sample.args, dict(sample.kwargs)
        if name == "depthwise_conv2d":
            channels, groups = sample.input.shape[-3], kwargs.pop("groups", 1)
            if groups != channels:
                weight = weight.reshape(-1, 1, *weight.shape[2:])
                weight = weight[: weight.shape[0] // channels * channels]
                bias = None if bias is None else bias[:1].expand(weight.shape[0]).clone()
        if weight.numel():
            tensors = {"input": sample.input, "weight": weight} | ({} if bias is None else {"bias": bias})
            shapes = [tuple(t.shape) for t in tensors.values()]
            found[f"{shapes} {kwargs}"] = tensors, kwargs
    return list(found.values())


@every_function
def test_torchs_samples_are_of_many_kinds(name):
    found = samples(name, torch.float32)
    assert len(found) >= 8
    assert {tensors["input"].dim() for tensors, _ in found} == {3, 4}
    assert {"bias" in tensors for tensors, _ in found} == {True, False}
    assert len({repr(kwargs.get("stride")) for _, kwargs in found}) > 1
    if name != "conv_transpose2d":
        assert {"same", "valid"} <= {kwargs.get("padding") for _, kwargs in found if "padding" in kwargs}
    if name == "depthwise_conv2d":
        assert any(t["weight"].shape[0] > t["input"].shape[-3] for t, _ in found)


@every_function
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128],
    ids=str,
)
def test_torchs_samples_on_aten(name, dtype):
    ours, torchs, _ = FUNCTIONS[name]
    # The same ATen calls, equal to the last bit; of conv2d up to the taps that the CPU leaves out.
    tolerance = {} if name == "conv2d" else {"rtol": 0, "atol": 0}
    for tensors, kwargs in samples(name, dtype):
        results = []
        for function in (ours, torchs):
            leaves = {key: t.clone().requires_grad_() for key, t in tensors.items()}
            with segfast.backend("aten"):
                y = function(**leaves, **kwargs)
            results.append((y, torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))))
        torch.testing.assert_close(*results, **tolerance)
        assert results[0][0].stride() == results[1][0].stride()


@every_function
def test_integers_are_torchs(name):
    ours, torchs, _ = FUNCTIONS[name]
    x, w = torch.ones(1, 2, 3, 3).long(), torch.ones(2, 1 if name == "depthwise_conv2d" else 2, 3, 3).long()
    assert torch.equal(ours(x, w), torchs(x, w))


# Half precision on some: what differs is the rounding.
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "dtype", "every"),
    [
        ("conv2d", torch.float32, 2), ("conv2d", torch.float16, 5), ("conv_transpose2d", torch.float32, 1),
        ("conv_transpose2d", torch.float16, 3), ("depthwise_conv2d", torch.float32, 1),
        ("depthwise_conv2d", torch.float16, 5),
    ],
)  # fmt: skip
def test_torchs_samples_on_our_kernels(name, dtype, every, poisoned_empty):
    ours, _, check = FUNCTIONS[name]
    for tensors, kwargs in samples(name, dtype)[::every]:
        input = tensors["input"]
        batch = tensors | {"input": input if input.dim() == 4 else input[None]}
        result = check({key: t.detach() for key, t in batch.items()}, **kwargs)["output"]
        if input.dim() == 3:
            with segfast.backend("triton"):
                assert torch.equal(ours(**tensors, **kwargs), result[0])


@every_function
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 3, 2), (2, 3, 3, 2), (3, 3, 2)], ids=["empty", "batch", "unbatched"]
)
def test_batch_sizes(name, shape, backend):
    ours, torchs, _ = FUNCTIONS[name]
    filters = {"conv2d": (6, 3), "conv_transpose2d": (3, 6), "depthwise_conv2d": (6, 1)}[name]
    x, w, bias = [t.requires_grad_() for t in (draw(*shape), draw(*filters, 2, 2), draw(6))]
    expected = torchs(x, w, bias)
    options = {"activation": "relu"}
    if shape[0] and name != "depthwise_conv2d":
        options["residual"] = draw(*expected.shape)
        expected = expected + options["residual"]
    with segfast.backend(backend):
        y = ours(x, w, bias, **options)
        y.sum().backward()
    torch.testing.assert_close(y, F.relu(expected), atol=1e-5, rtol=1e-5)
    assert y.stride() == expected.stride() and x.grad.shape == x.shape and w.grad.shape == w.shape
    others = tuple(i for i in range(y.dim()) if i != y.dim() - 3)
    torch.testing.assert_close(bias.grad, (expected > 0).sum(others).float())


@pytest.mark.parametrize("name", ["conv2d", "depthwise_conv2d"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (2, 3), (4, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("dilation", [1, (2, 1)], ids=str)
def test_padding_by_name(name, kernel, dilation, backend):
    ours, torchs, _ = FUNCTIONS[name]
    shapes = [(1, 2, 7, 6), (4, 1 if name == "depthwise_conv2d" else 2, *kernel), (4,)]
    for padding in ("same", "valid"):
        results = []
        for function in (ours, torchs):
            leaves = [draw(*shape).requires_grad_() for shape in shapes]
            with segfast.backend(backend):
                y = function(*leaves, padding=padding, dilation=dilation)
            results.append((y, torch.autograd.grad(y.square().sum(), leaves), y.stride()))
        (y, grads, strides), (expected, expected_grads, expected_strides) = results
        assert strides == expected_strides
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grads, expected_grads, atol=1e-3, rtol=1e-4)
