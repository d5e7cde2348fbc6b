"""`segfast.functional.conv_transpose2d` against torch's.

Its own samples, errors, memory formats, gradients.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv_transpose2d
from tests.fused_conv import ACTIVATIONS, BACKENDS, check_fused, draw, fused, values_and_gradients

DTYPES = {
    "aten": [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128],
    "triton": [torch.float32, torch.float16],
}


def samples(dtype, requires_grad=False):
    """torch's own samples of the operator; the same twelve for every dtype."""
    # The import freezes torch.backends' flags; undone on leaving, for the benchmarks that follow set them.
    with torch.backends.__allow_nonbracketed_mutation():
        database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    (info,) = [op for op in database if op.name == "nn.functional.conv_transpose2d"]
    return list(info.sample_inputs("cpu", dtype, requires_grad=requires_grad))


def batched(sample):
    """The sample's operands by name, [1, C, H, W] where it has no batch."""
    weight, bias = sample.args
    input = sample.input if sample.input.dim() == 4 else sample.input[None]
    return {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})


@pytest.mark.parametrize("dtype", DTYPES["aten"], ids=str)
def test_torchs_samples_on_aten(dtype):
    # The same ATen calls: equal to the last bit, gradients included. Integers have no gradient.
    with segfast.backend("aten"):
        for ours, theirs in zip(samples(dtype, True), samples(dtype, True), strict=True):
            theirs.input.data, *rest = ours.input.data, *zip(theirs.args, ours.args, strict=True)
            for theirs_arg, ours_arg in rest:
                if ours_arg is not None:
                    theirs_arg.data = ours_arg.data
            leaves = [[s.input, *[a for a in s.args if a is not None]] for s in (ours, theirs)]
            results = [
                conv_transpose2d(ours.input, *ours.args, **ours.kwargs),
                F.conv_transpose2d(theirs.input, *theirs.args, **theirs.kwargs),
            ]
            grad = torch.ones_like(results[0])
            gradients = [torch.autograd.grad(y, x, grad) for y, x in zip(results, leaves, strict=True)]
            torch.testing.assert_close((results[0], gradients[0]), (results[1], gradients[1]), rtol=0, atol=0)
    assert torch.equal(
        conv_transpose2d(torch.ones(1, 2, 2, 2).long(), torch.ones(2, 2, 2, 2).long()),
        F.conv_transpose2d(torch.ones(1, 2, 2, 2).long(), torch.ones(2, 2, 2, 2).long()),
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES["triton"], ids=str)
def test_torchs_samples_on_our_kernels(dtype, poisoned_empty):
    with segfast.backend("triton"):
        for sample in samples(dtype):
            tensors = {name: t.detach() for name, t in batched(sample).items()}
            result = check_fused(conv_transpose2d, F.conv_transpose2d, tensors, **sample.kwargs)["output"]
            if sample.input.dim() == 3:
                unbatched = conv_transpose2d(sample.input, *sample.args, **sample.kwargs)
                assert torch.equal(unbatched, result[0])


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64, torch.bfloat16], ids=str)
def test_a_dtype_without_kernels_is_refused_by_name(dtype):
    sample = samples(dtype)[-1]
    name = str(dtype).removeprefix("torch.")
    with segfast.backend("triton"), pytest.raises(NotImplementedError, match=name):
        conv_transpose2d(sample.input, *sample.args, **sample.kwargs)


def _layouts(*shape):
    """The same size in every memory format there is, ambiguous ones included."""
    base = draw(*shape)
    yield "contiguous", base
    yield "channels_last", base.contiguous(memory_format=torch.channels_last)
    yield "permuted", base.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    yield "transposed", base.transpose(2, 3).contiguous().transpose(2, 3)
    yield (
        "slice of channels_last",
        torch.cat([base, base], 1).contiguous(memory_format=torch.channels_last)[:, : shape[1]],
    )
    yield "every other column", base.repeat_interleave(2, 3)[..., ::2]
    yield "expanded", base[:1, :1].expand(shape)


SHAPES = [
    (2, 4, 3, 5),
    (1, 4, 3, 3),
    (2, 1, 3, 4),
    (2, 4, 1, 1),
    (1, 1, 1, 1),
    (1, 4, 1, 5),
    (1, 1, 3, 1),
    (3, 2, 2, 1),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_formats_are_torchs(shape, backend):
    weights = {
        "contiguous": draw(shape[1], 3, 2, 2),
        "channels_last": draw(shape[1], 3, 2, 2, channels_last=True),
        "one channel": draw(shape[1], 1, 2, 2, channels_last=True),
        "1x1": draw(shape[1], 3, 1, 1, channels_last=True),
    }
    for (layout, x), (weight_layout, w) in ((a, b) for a in _layouts(*shape) for b in weights.items()):
        leaves, ours = ([t.detach().requires_grad_() for t in (x, w)] for _ in range(2))
        expected = F.conv_transpose2d(*leaves, stride=2)
        with segfast.backend(backend):
            actual = conv_transpose2d(*ours, stride=2)
        what = f"{layout} input, {weight_layout} weight"
        assert actual.stride() == expected.stride(), what
        assert torch.allclose(actual, expected, atol=1e-5), what
        if weight_layout == "channels_last":
            grads = torch.autograd.grad(actual.square().sum(), ours)
            expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
            for name, a, b in zip(("input", "weight"), grads, expected_grads, strict=True):
                assert torch.allclose(a, b, atol=1e-3, rtol=1e-4), f"gradient of {name}, {what}"


UPSTREAM = {
    "sum": lambda y: y.sum(),
    "expanded": lambda y: (y * y.new_ones(1).expand_as(y)).sum(),
    "cat first": lambda y: torch.cat([y, y.detach()], 1).square().sum(),
    "cat second": lambda y: torch.cat([y.detach(), y], 1).square().sum(),
    "cat batch": lambda y: torch.cat([y.detach(), y], 0).square().sum(),
    "channel slice": lambda y: y[:, 1:].square().sum(),
    "row slice": lambda y: y[:, :, 1:-1].square().sum(),
    "every other": lambda y: y[..., ::2].square().sum(),
    "permuted": lambda y: (y.permute(0, 2, 3, 1) * draw(*y.permute(0, 2, 3, 1).shape)).sum(),
    "transposed": lambda y: (y.transpose(2, 3) * draw(*y.transpose(2, 3).shape)).sum(),
    "one pixel": lambda y: y[0, 0, 0, 0],
    "mean": lambda y: y.mean((2, 3)).square().sum(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_upstream_gradients_of_any_strides(upstream, channels_last, backend, poisoned_empty):
    tensors = {
        "input": draw(2, 5, 3, 4, channels_last=channels_last),
        "weight": draw(5, 4, 3, 3, channels_last=channels_last),
        "bias": draw(4),
        "scale": draw(4, seed=1),
        "shift": draw(4, seed=2),
        "residual": draw(2, 4, 6, 8, channels_last=channels_last),
    }
    geometry = {"stride": 2, "padding": 1, "output_padding": 1, "activation": "leaky_relu"}
    results = []
    for function, wide, slope in (
        (fused(F.conv_transpose2d), True, {}),
        (conv_transpose2d, False, {"negative_slope": 0.2}),
    ):
        leaves = {name: (t.double() if wide else t.clone()).requires_grad_() for name, t in tensors.items()}
        with segfast.backend(backend):
            UPSTREAM[upstream](function(**leaves, **geometry, **slope)).backward()
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, reference in results[0].items():
        scale = reference.abs().max().item() + 1
        torch.testing.assert_close(
            results[1][name].double(), reference, atol=1e-5 * scale, rtol=1e-5, msg=name
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_fused_epilogue(activation):
    slope = 0.2 if activation == "leaky_relu" else 0.01
    wide = {"dtype": torch.float64}
    args = [
        draw(1, 2, 2, 2, **wide),
        draw(2, 2, 2, 2, **wide),
        draw(2, **wide),
        draw(2, seed=1, **wide),
        draw(2, seed=2, **wide),
        draw(1, 2, 3, 3, **wide),
    ]

    def run(input, weight, bias, scale, shift, residual):
        options = {"activation": activation, "negative_slope": slope}
        return conv_transpose2d(input, weight, bias, scale=scale, shift=shift, residual=residual, **options)

    assert torch.autograd.gradcheck(run, [a.requires_grad_() for a in args])
    if activation != "hardsigmoid":  # torch's has no second derivative
        assert torch.autograd.gradgradcheck(run, args)


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_double_backward_of_the_kernels(activation, poisoned_empty):
    names = ("input", "weight", "bias", "scale", "shift", "residual")
    shapes = ((2, 4, 3, 2), (4, 3, 3, 3), (3,), (3,), (3,), (2, 3, 6, 4))
    tensors = {n: draw(*s, seed=i) for i, (n, s) in enumerate(zip(names, shapes, strict=True))}
    geometry = {"stride": 2, "padding": 1, "output_padding": 1, "activation": activation}
    slope = {"negative_slope": 0.2} if activation == "leaky_relu" else {}
    results = []
    reference = fused(F.conv_transpose2d)
    if activation == "hardsigmoid":  # torch's has no second derivative

        def reference(*args, activation, **options):
            return (fused(F.conv_transpose2d)(*args, activation=None, **options) + 3).clamp(0, 6) / 6

    for function, dtype, options in (
        (reference, torch.float64, {}),
        (conv_transpose2d, torch.float32, slope),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in tensors.values()]
        with segfast.backend("triton"):
            y = function(**dict(zip(names, leaves, strict=True)), **geometry, **options)
            grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            penalty = sum((g * draw(*g.shape, seed=7).to(dtype)).sum() for g in grads)
            results.append(torch.autograd.grad(penalty, leaves))
    for name, reference, actual in zip(names, *results, strict=True):
        assert (actual - reference).abs().max() <= 2e-5 * (reference.abs().max() + 1), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for_are_computed(backend):
    from segfast.kernels import _launch

    for wanted in range(1, 8):
        tensors = [draw(1, 3, 2, 2), draw(3, 2, 2, 2), draw(2)]
        asked = [bool(wanted >> i & 1) for i in range(3)]
        leaves = [t.requires_grad_(ask) for t, ask in zip(tensors, asked, strict=True)]
        with segfast.backend(backend):
            y = conv_transpose2d(*leaves, stride=2)
        if backend == "triton":
            with segfast.kernels.record_launches() as launches:
                y.sum().backward()
            ran = {plan.kernel.__name__ for plan, _ in launches if "conv" in plan.kernel.__name__}
            kernels = ("_conv2d_forward_kernel", "_conv_transpose2d_grad_weight_kernel")
            expected = {name for name, a in zip(kernels, asked, strict=False) if a}
            assert ran == expected, asked
            assert _launch._recorder is None
        else:
            y.sum().backward()
        assert [t.grad is not None for t in tensors] == asked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 2), (2, 3, 2, 2), (3, 2, 2)], ids=["empty", "batch", "unbatched"]
)
def test_batch_sizes(shape, backend):
    x, w, bias = draw(*shape).requires_grad_(), draw(3, 4, 2, 2).requires_grad_(), draw(4).requires_grad_()
    residual = draw(*shape[:-3], 4, 4, 4) if shape[0] else None
    expected = F.conv_transpose2d(x, w, bias, 2)
    if residual is not None:
        expected = expected + residual
    options = {"stride": 2, "residual": residual, "activation": "relu"}
    with segfast.backend(backend):
        y = conv_transpose2d(x, w, bias, **options)
        y.sum().backward()
    torch.testing.assert_close(y, F.relu(expected))
    assert y.stride() == expected.stride() and x.grad.shape == x.shape and w.grad.shape == w.shape
    torch.testing.assert_close(
        bias.grad, (expected > 0).sum(tuple(i for i in range(y.dim()) if i != y.dim() - 3)).float()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_as_torch_does(backend):
    # fp16, which the interpreter computes rightly.
    x, w, bias = (draw(*s).requires_grad_() for s in ((1, 4, 3, 3), (4, 3, 2, 2), (3,)))
    scale = draw(3).requires_grad_()
    with torch.autocast("cpu", torch.float16), segfast.backend(backend):
        expected = F.conv_transpose2d(x, w, bias, 2)
        y = conv_transpose2d(x, w, bias, 2)
        z = conv_transpose2d(x, w, bias, 2, scale=scale, activation="silu")
        assert y.dtype == z.dtype == expected.dtype == torch.float16
        assert conv_transpose2d(x.half(), w.half(), None, 2).dtype == torch.float16
        grads = torch.autograd.grad(z.float().sum(), (x, w, bias, scale))
    assert [g.dtype for g in grads] == [torch.float32] * 4
    torch.testing.assert_close(y, expected, atol=2e-3, rtol=2e-3)
    with torch.autocast("cpu", enabled=False), segfast.backend(backend):
        assert conv_transpose2d(x, w, bias, 2).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_modes(backend):
    x, w = draw(1, 3, 2, 2), draw(3, 2, 2, 2).requires_grad_()
    with segfast.backend(backend):
        reference = conv_transpose2d(x, w, stride=2)
        assert reference.requires_grad
        with torch.no_grad():
            y = conv_transpose2d(x, w, stride=2)
        assert not y.requires_grad and torch.equal(y, reference)
        with torch.inference_mode():
            y = conv_transpose2d(x, w, stride=2)
            assert y.is_inference() and torch.equal(y, reference)
        assert not conv_transpose2d(x, w.detach(), stride=2).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_keeps_the_backend_of_its_forward(backend):
    # The choice is made once, in the forward; the setting at the time of backward does not matter.
    x, w = draw(1, 3, 2, 2).requires_grad_(), draw(3, 2, 2, 2)
    with segfast.backend(backend):
        y = conv_transpose2d(x, w, stride=2, activation="silu")
    other = "aten" if backend == "triton" else "auto"
    with segfast.backend(other):
        (grad,) = torch.autograd.grad(y.sum(), x)
    expected = values_and_gradients(
        fused(F.conv_transpose2d), {"input": x, "weight": w}, torch.ones_like, stride=2, activation="silu"
    )
    torch.testing.assert_close(grad, expected["input"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_see_the_gradient_once_and_may_change_it(backend):
    x, w, seen = draw(1, 3, 2, 2).requires_grad_(), draw(3, 2, 2, 2).requires_grad_(), []
    with segfast.backend(backend):
        y = conv_transpose2d(x, w, stride=2, activation="sigmoid")
        y.register_hook(lambda g: seen.append("output") or 2 * g)
        w.register_hook(lambda g: seen.append("weight"))
        w.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
        y.sum().backward()
        doubled = w.grad.clone()
        w.grad = None
        conv_transpose2d(x, w, stride=2, activation="sigmoid").sum().backward()
    assert seen[:3] == ["output", "weight", "accumulated"]
    torch.testing.assert_close(doubled, 2 * w.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_survives_deepcopy_and_pickle(backend):
    layer = segfast.nn.ConvTranspose2d(3, 2, 2, stride=2, activation="leaky_relu", negative_slope=0.3)
    x = draw(1, 3, 2, 2)
    with segfast.backend(backend), torch.no_grad():
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        assert all(torch.equal(layer(x), twin(x)) for twin in copies)
        expected = F.leaky_relu(F.conv_transpose2d(x, layer.weight, layer.bias, 2), 0.3)
        torch.testing.assert_close(layer(x), expected)
