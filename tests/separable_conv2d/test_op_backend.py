"""The backend that depthwise and separable convolution take, and what they do on ATen."""

import contextlib
import itertools

import pytest
import torch

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from segfast.ops import _gpu
from tests.fused_conv import BACKENDS, REFERENCE_ACTIVATIONS, draw, fused
from tests.separable_conv2d.reference import (
    VECTORS,
    define_separable,
    depthwise_operands,
    pair,
    plain_depthwise,
    separable_operands,
)

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", REFERENCE_ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_no_operand_is_written_to(channels_last, activation, backend):
    # What is computed in place is ours: also where a convolution might hand its input on.
    tensors = separable_operands(
        (1, 3, 3, 3), 3, kernel=1, residual_shape=(1, 3, 3, 3), channels_last=channels_last
    )
    tensors["depthwise_weight"].fill_(1)
    tensors["pointwise_weight"].copy_(torch.eye(3)[..., None, None])
    before = {name: t.clone() for name, t in tensors.items()}
    same = {"input": tensors["input"], "weight": tensors["depthwise_weight"]}
    with segfast.backend(backend):
        for keep in ((), ("residual",), tuple(tensors)):
            given = {n: tensors[n] for n in ("input", "depthwise_weight", "pointwise_weight", *keep)}
            options = {"activation": activation, "depthwise_activation": activation}
            first = separable_conv2d(**given, **options)
            second = separable_conv2d(**given, **options)
            assert torch.equal(first, second)
        depthwise_conv2d(**same, activation=activation, return_statistics=True)
        depthwise_conv2d(**same, bias=tensors["depthwise_bias"], activation=activation)
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), name


def test_what_is_kept_for_the_backward_is_not_overwritten():
    # A frozen layer between others: its result needs a gradient through the input alone, or not at all.
    x, w, p = draw(1, 3, 4, 4), draw(3, 1, 3, 3), draw(3, 3, 1, 1)
    for leaf in range(3):
        operands = [t.clone().requires_grad_(i == leaf) for i, t in enumerate((x, w, p))]
        with segfast.backend("aten"):
            y = separable_conv2d(*operands, padding=1, depthwise_activation="silu", activation="hardswish")
        expected = define_separable(*operands, padding=1, depthwise_activation="silu", activation="hardswish")
        (actual,) = torch.autograd.grad(y.square().sum(), operands[leaf])
        torch.testing.assert_close(actual, torch.autograd.grad(expected.square().sum(), operands[leaf])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [3, 40], ids=["small", "large"])
def test_scale_and_shift_on_aten(size, dtype):
    # Folded into the filter where that is exact enough, else applied in fp32: never worse than rounding once
    # for each of convolution and result.
    tensors = depthwise_operands((2, 8, size, size), vectors=VECTORS, dtype=dtype)
    tensors |= {name: tensors[name].float() for name in ("scale", "shift")} if dtype.itemsize == 2 else {}
    tensors["scale"][0], tensors["scale"][1] = 0, -1000
    wide = {name: t.double() for name, t in tensors.items()}
    for names in (VECTORS, ("scale",), ("shift",), ("scale", "shift"), ("bias", "shift")):
        names = ("input", "weight", *names)
        with segfast.backend("aten"):
            actual = depthwise_conv2d(**{n: tensors[n] for n in names}, padding=1, activation="relu")
        expected = fused(plain_depthwise)(**{n: wide[n] for n in names}, padding=1, activation="relu")
        assert actual.dtype == dtype
        scale = wide["scale"].abs()[:, None, None] if "scale" in names else 1
        # The convolution's own rounding, multiplied by the scale; and the result's.
        conv = plain_depthwise(wide["input"].abs(), wide["weight"].abs(), wide["bias"].abs(), padding=1)
        allowed = torch.finfo(dtype).eps * (2 * scale * conv + 2 * expected.abs() + 4)
        assert ((actual.double() - expected).abs() <= allowed).all(), names


def test_gradients_of_scale_and_shift_on_aten():
    for activation, tensors in (
        ("relu", depthwise_operands((1, 3, 4, 4), vectors=VECTORS, dtype=torch.float64)),
        (None, depthwise_operands((1, 4, 40, 40), vectors=VECTORS, dtype=torch.float64)),
    ):
        results = []
        for run in (depthwise_conv2d, fused(plain_depthwise)):
            leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
            with segfast.backend("aten"):
                run(**leaves, padding=1, activation=activation).square().sum().backward()
            results.append([leaf.grad for leaf in leaves.values()])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("grad", [False, True])
def test_dilated_filters_that_reach_past_the_image_on_aten(grad):
    # Taps that meet nothing but padding may be left out; the rest must stay where it was.
    for size, kernel, stride, padding, dilation in itertools.product(
        ((1, 1), (2, 5), (7, 4)), ((3, 3), (4, 2), (5, 7)), (1, (2, 3)), (2, 9, (8, 3)), (2, (4, 3), (1, 9))
    ):
        p, d = pair(padding), pair(dilation)
        if any(n + 2 * q - e * (k - 1) < 1 for n, q, e, k in zip(size, p, d, kernel, strict=True)):
            continue
        x, w, b = draw(1, 2, *size), draw(4, 1, *kernel), draw(4)
        x.requires_grad_(grad)
        with segfast.backend("aten"):
            actual = depthwise_conv2d(x, w, b, stride, padding, dilation)
        expected = plain_depthwise(x, w, b, stride, padding, dilation)
        what = f"{size} {kernel} {stride} {padding} {dilation}"
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=what)
        assert actual.stride() == expected.stride(), what


@pytest.mark.parametrize("dilation", [1, 2])
def test_transforms_over_a_vector_alone_on_aten(dilation):
    x, w, vectors = draw(1, 3, 6, 6), draw(3, 1, 3, 3), draw(5, 3)
    for name in ("bias", "scale", "shift"):

        def run(vector, name=name):
            options = {} if name == "bias" else {name: vector}
            bias = vector if name == "bias" else None
            return depthwise_conv2d(x, w, bias, dilation=dilation, activation="relu", **options)

        def define(vector, name=name):
            options = {} if name == "bias" else {name: vector}
            bias = vector if name == "bias" else None
            return fused(plain_depthwise)(x, w, bias, dilation=dilation, activation="relu", **options)

        with segfast.backend("aten"):
            torch.testing.assert_close(
                torch.func.vmap(run)(vectors), torch.stack([define(v) for v in vectors]), atol=1e-5, rtol=1e-5
            )
            actual = torch.func.grad(lambda v: run(v).square().sum())(vectors[0])
            both = torch.func.jvp(run, (vectors[0],), (vectors[1],))
        expected = torch.func.grad(lambda v: define(v).square().sum())(vectors[0])
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(
            both, torch.func.jvp(define, (vectors[0],), (vectors[1],)), atol=1e-5, rtol=1e-5
        )


def test_explain_names_the_operation_and_the_reason():
    x, w, p = draw(1, 4, 5, 5), draw(4, 1, 3, 3), draw(2, 4, 1, 1)
    for function, args in ((depthwise_conv2d, (x, w)), (separable_conv2d, (x, w, p))):
        (explanation,) = segfast.explain(function, *args)
        assert (explanation.operation, explanation.backend) == (function.__name__, "aten")
        assert "CPU" in explanation.reason
        with segfast.backend("aten"):
            assert str(segfast.explain(function, *args)[0]).endswith("aten (asked for by name)")


def test_triton_by_name_says_why_it_cannot():
    x, w, p = draw(1, 4, 5, 5), draw(4, 1, 3, 3), draw(2, 4, 1, 1)
    with segfast.backend("triton"):
        for function, args in ((depthwise_conv2d, (x, w)), (separable_conv2d, (x, w, p))):
            with pytest.raises(NotImplementedError, match=f"{function.__name__}: .*on a CPU"):
                function(*args)


class OnGPU:
    """A tensor on a GPU, as far as the predicate asks."""

    is_cuda, is_cpu = True, False
    device = torch.device("cuda", 0)

    def __init__(self, dtype=torch.bfloat16, shape=(1, 64, 32, 32)):
        self.dtype, self.shape = dtype, torch.Size(shape)

    def numel(self):
        return self.shape.numel()


def test_auto_takes_what_was_chosen(pretended_gpu):
    weight = torch.empty(64, 1, 3, 3)

    def ask(input=None, choice="auto", chosen=None):
        return _gpu.can_use_triton(choice, input or OnGPU(), weight, None, "depthwise_conv2d", chosen)

    assert ask() == "not measured on this GPU"
    assert ask(choice="triton") is None  # by name it runs all the same
    assert ask(chosen="triton") is None
    assert ask(chosen="aten") == "aten"
    assert "empty" in ask(OnGPU(shape=(0, 64, 32, 32)), chosen="triton")
    assert "no kernels for float64" in ask(OnGPU(torch.float64), chosen="triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("chosen", ["triton", "aten", "parts", None])
def test_a_separable_call_that_is_not_our_one_kernel_asks_for_each_of_its_parts(chosen, monkeypatch):
    from segfast.ops.conv2d import functional as dense
    from segfast.ops.separable_conv2d import functional

    asked = []

    def choose(operation, images, weights, options, differentiates, dtype, **_):
        asked.append((operation, [tuple(w.shape) for w in weights]))
        return chosen if operation == "separable_conv2d" else "aten"

    for module in (functional, dense):
        monkeypatch.setattr(module, "choose", choose)
        monkeypatch.setattr(module, "certainly_aten", lambda input: False)
    monkeypatch.setattr(_gpu, "kernel_reason_not", lambda *args: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    tensors = separable_operands((1, 4, 5, 6), 3, kernel=3)
    expected = define_separable(**tensors, padding=1, activation="relu")
    with segfast.kernels.record_launches() if chosen == "triton" else contextlib.nullcontext([]) as launches:
        actual = separable_conv2d(**tensors, padding=1, activation="relu")
    whole = ("separable_conv2d", [(4, 1, 3, 3), (3, 4, 1, 1)])
    parts = [("depthwise_conv2d", [(4, 1, 3, 3)]), ("conv2d", [(3, 4, 1, 1)])]
    assert asked == [whole] + (parts if chosen != "triton" else [])
    assert bool(launches) == (chosen == "triton")
    if chosen != "triton":
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
