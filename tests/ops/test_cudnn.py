"""cuDNN's fused calls as candidates of conv2d: what they serve, and what they are called with.

No GPU: ATen's fused calls and the `cudnn` package are stood in for.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.ops import _cudnn, _cudnn_graph, _gpu
from segfast.ops._backend import taken_by_kernels
from segfast.ops._conv2d_aten import conv2d_aten
from segfast.ops._cudnn import GRAPH, RELU, candidates, conv2d_cudnn
from tests.cudnn import GEOMETRY, close, drawn, expected, has_cudnn

__all__ = ["has_cudnn"]


@pytest.fixture
def fused_calls(monkeypatch):
    """ATen's fused calls, in plain ATen and with fp32 sums as cuDNN has them; what they were given."""
    calls = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        return add_relu(x, weight, torch.zeros(()), 0.0, bias, stride, padding, dilation, groups)

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        calls.append((x, weight, bias))
        wide = None if bias is None else bias.float()
        y = F.conv2d(x.float(), weight.float(), wide, stride, padding, dilation, groups)
        return F.relu(y + alpha * z.float()).to(x.dtype)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return calls


@pytest.mark.parametrize("operands", ["shift", "scale shift", "bias", "bias scale shift", "bias scale", ""])
@pytest.mark.parametrize("residual", [False, True])
def test_the_fused_call_is_the_layer(has_cudnn, fused_calls, operands, residual):
    x, weight, bias, scale, shift, added = drawn()
    bias, scale, shift = (
        t if name in operands else None for name, t in (("bias", bias), ("scale", scale), ("shift", shift))
    )
    args = (x, weight, bias, scale, shift, added if residual else None, "relu")
    y = conv2d_cudnn(RELU, x, weight, bias, *GEOMETRY, *args[3:])
    close(y, expected(*args))
    (given,) = fused_calls
    assert given[1].dtype == torch.bfloat16 and given[1].is_contiguous(memory_format=torch.channels_last)
    assert given[2] is None or given[2].dtype == torch.bfloat16
    if scale is None:
        assert given[1] is weight  # nothing folded, nothing copied


def test_what_cannot_be_served_is_left_to_aten(has_cudnn, fused_calls):
    x, weight, bias, scale, shift, residual = drawn()

    def call(x=x, weight=weight, bias=bias, geometry=GEOMETRY, scale=scale, residual=residual, act="relu"):
        return conv2d_cudnn(RELU, x, weight, bias, *geometry, scale, shift, residual, act)

    assert call() is not None
    for wrong in (
        {"x": x.contiguous()},
        {"act": "silu"},
        {"x": x.float()},
        {"x": x[:, :, :1, :1].expand(2, 8, 7, 7)},
        {"weight": weight[:, :4]},
        {"bias": bias[:8]},
        {"bias": bias.float()},
        {"scale": scale[:8]},
        {"scale": scale.clone().requires_grad_()},
        {"residual": residual[:, :, :5]},
        {"residual": residual[:, :, :1, :1].expand_as(residual)},
        {"residual": residual.contiguous()},
        {"geometry": ((1, 1), (0, 0), (5, 5), 1)},
        {"geometry": ((1, 1), (2, 2), (2, 2), 2)},
    ):
        assert call(**wrong) is None, wrong.keys()
    # One element on: no longer at a multiple of 16 bytes.
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(2, 7, 7, 8).permute(0, 3, 1, 2).copy_(x)
    assert shifted.is_contiguous(memory_format=torch.channels_last)
    assert call(x=shifted) is None
    assert len(fused_calls) == 1


def test_who_has_to_see_the_operator_sees_it(has_cudnn, fused_calls):
    x, weight, *_ = drawn()

    def call(x, weight):
        y = conv2d_cudnn(RELU, x, weight, None, *GEOMETRY, None, None, None, "relu")
        return F.relu(F.conv2d(x, weight, None, *GEOMETRY)) if y is None else y

    reference = F.relu(F.conv2d(x, weight, None, *GEOMETRY))
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.func.vmap(call, (0, None))(x[:, None], weight)
    torch.jit.trace(call, (x, weight), check_trace=False)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        call(x, weight)
    assert counter.get_total_flops() > 0
    torch.export.export(_Layer(call), (x, weight))
    call(x, weight.requires_grad_())
    close(compiled(x, weight.detach()), reference.double())
    assert fused_calls == []
    with torch.no_grad():
        close(call(x, weight), reference.double())
    assert len(fused_calls) == 1


class _Layer(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def test_autocast_decides_the_dtype(has_cudnn, fused_calls):
    x, weight, bias, scale, shift, residual = drawn(torch.float32)
    args = (x, weight, bias, *GEOMETRY, scale, shift, residual, "relu")
    assert conv2d_cudnn(RELU, *args).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d_cudnn(RELU, *args)
    assert y.dtype == torch.bfloat16
    close(y, expected(x, weight, bias, scale, shift, residual, "relu"))


def test_candidates_by_activation_dtype_and_switches(has_cudnn, monkeypatch):
    x, weight, *_ = drawn()

    def of(activation, x=x, **changes):
        operands = dict.fromkeys(("bias", "scale", "shift", "residual")) | changes
        return candidates(x, weight, **operands, activation=activation)

    assert of("relu") == (RELU, GRAPH)
    assert of("silu") == of(None) == (GRAPH,)
    assert of("hardswish") == ()
    assert of("relu", x.float()) == (RELU,)
    assert of("relu", x.double()) == of("relu", [x, x]) == ()
    assert of("relu", residual=torch.zeros(2, 16, 1, 1).expand(2, 16, 7, 7)) == ()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert of("relu") == (RELU,)
    assert of(None) == ()


def test_on_a_cpu_there_is_no_candidate():
    x, weight, *_ = drawn()
    assert candidates(x, weight, None, None, None, None, "relu") == ()
    assert conv2d_cudnn(RELU, x, weight, None, *GEOMETRY, None, None, None, "relu") is None


@pytest.fixture
def chosen(has_cudnn, monkeypatch):
    """`chosen(name)`: what `choose` says of a convolution from now on."""
    from segfast.ops.conv2d import functional, parallel

    def choose(name):
        def answer(operation, *args, **options):
            return name if operation == "conv2d" and segfast.get_backend() == "auto" else None

        for module in (functional, parallel):
            monkeypatch.setattr(module, "choose", answer)

    monkeypatch.setattr(_gpu, "kernel_reason_not", lambda *args: None)
    monkeypatch.setattr(functional, "certainly_aten", lambda input: False)
    return choose


@pytest.mark.parametrize("residual", [False, True])
def test_conv2d_takes_the_fused_call_where_it_was_chosen(chosen, fused_calls, residual):
    x, weight, bias, scale, shift, added = drawn()
    options = {"scale": scale, "shift": shift, "residual": added if residual else None, "activation": "relu"}

    def call():
        return segfast.functional.conv2d(x, weight, bias, 1, 2, 2, **options)

    chosen(RELU)
    assert list(map(str, segfast.explain(call))) == ["conv2d: cudnn_relu (cudnn_relu)"]
    assert len(fused_calls) == 1
    assert [id(t) for t in taken_by_kernels(call, [weight, x[:1]])] == [id(weight)]
    assert len(fused_calls) == 2
    close(call(), expected(x, weight, bias, scale, shift, options["residual"], "relu"))
    assert len(fused_calls) == 3
    with segfast.backend("aten"):
        segfast.explain(call)
    for name in ("aten", None):
        chosen(name)
        assert segfast.explain(call)[0].backend == "aten"
        assert taken_by_kernels(call, [weight]) == []
    assert len(fused_calls) == 3


def test_atens_call_serves_what_the_chosen_one_does_not_take(chosen, fused_calls):
    """As an image that is not aligned, or one in another layout: a choice holds for shapes."""
    chosen(RELU)
    x, weight, bias, scale, shift, _ = drawn()
    options = {"scale": scale, "shift": shift, "activation": "relu"}
    for image in (x.contiguous(), x[:, :, ::2]):
        y = segfast.functional.conv2d(image, weight, bias, 1, 2, 2, **options)
        close(y, expected(image, weight, bias, scale, shift, None, "relu"))
        (explanation,) = segfast.explain(segfast.functional.conv2d, image, weight, bias, 1, 2, 2, **options)
        assert explanation.backend == "aten"
    assert fused_calls == []


def test_a_graph_runs_where_it_was_chosen(chosen, fused_calls, monkeypatch):
    graphs = []
    monkeypatch.setitem(_cudnn.CALLS, GRAPH, lambda *args: graphs.append(args) or _cudnn.conv2d_relu(*args))
    x, weight, bias, scale, shift, _ = drawn()
    chosen(GRAPH)
    options = {"scale": scale, "shift": shift, "activation": "relu"}
    (explanation,) = segfast.explain(segfast.functional.conv2d, x, weight, bias, 1, 2, 2, **options)
    assert explanation.backend == GRAPH and len(graphs) == 1

    def refused(*args):
        raise _cudnn_graph.GraphRefused

    monkeypatch.setitem(_cudnn.CALLS, GRAPH, refused)
    (explanation,) = segfast.explain(segfast.functional.conv2d, x, weight, bias, 1, 2, 2, **options)
    assert explanation.backend == "aten"


def test_the_branches_of_a_pyramid_take_it_too(chosen, fused_calls, monkeypatch):
    x, weight, _, scale, shift, _ = drawn()
    weights = [weight[:, :, :1, :1].contiguous(memory_format=torch.channels_last), weight]
    vectors = {"scale": scale.repeat(2), "shift": shift.repeat(2)}
    chosen(RELU)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    y = segfast.functional.parallel_conv2d(x, weights, [1, 2], **vectors, activation="relu")
    assert len(fused_calls) == 2
    pads = ((0, 0), (2, 2))
    parts = [
        conv2d_aten(
            x.double(), w.double(), None, (1, 1), pads[i], (i + 1,) * 2, 1, scale.double(), shift.double(),
            None, "relu", 0.0,
        )
        for i, w in enumerate(weights)
    ]  # fmt: skip
    close(y, torch.cat(parts, 1))


def test_the_folded_filter_is_remembered_until_something_is_written(monkeypatch):
    seen = []

    def convolution_relu(input, weight, bias, stride, padding, dilation, groups):
        seen.append(weight)
        return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution_relu, raising=False)
    x, weight, scale, shift = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(6), torch.randn(6)
    one = (1, 1)

    def run():
        y = _cudnn.conv2d_relu(x, weight, None, one, one, one, 1, scale, shift, None)
        conv = torch.nn.functional.conv2d(x, weight, None, 1, 1)
        torch.testing.assert_close(y, (conv * scale[:, None, None] + shift[:, None, None]).relu())

    run()
    run()
    assert seen[0] is seen[1]
    for part in (weight, scale, shift):
        part.mul_(2)
        run()
        assert seen[-1] is not seen[-2] or part is shift
    with torch.inference_mode():
        scale = torch.randn(6)
        run()
        scale.mul_(3)
        run()


@pytest.mark.parametrize("operands", ["bias shift", "scale", "bias scale shift"])
def test_memory_that_captured_graphs_read_does_not_grow(monkeypatch, operands):
    """It is written to when it is computed anew, and goes with the weight or what was folded into it."""
    weight = torch.randn(6, 4, 3, 3, dtype=torch.bfloat16)
    vectors = [torch.randn(6) if name in operands.split() else None for name in ("bias", "scale", "shift")]

    def read(vectors, capturing=False):
        with monkeypatch.context() as patch:
            patch.setattr(_cudnn, "is_captured", lambda tensors: capturing)
            found = _cudnn._folded(weight, *vectors)
        return [t for t in found if t is not None and t is not weight]

    def others():
        return [None if t is None else torch.randn(6) for t in vectors]

    first = read(vectors)
    for _ in range(3):
        assert [id(t) for t in read(vectors, capturing=True)] == [id(t) for t in first]
        before = [t.clone() for t in first]
        next(t for t in vectors if t is not None).mul_(2)
        assert [id(t) for t in read(vectors)] == [id(t) for t in first]
        assert any(not torch.equal(old, t) for old, t in zip(before, first, strict=True))
    kept, before = [weakref.ref(t) for t in first], [t.clone() for t in first]
    del first
    read(others())  # the same weight in another layer: what the graph reads stays as it is
    assert all(torch.equal(ref(), t) for ref, t in zip(kept, before, strict=True))
    vectors = others()
    read(vectors)
    assert all(ref() is None for ref in kept)
    kept = [weakref.ref(t) for t in read(vectors, capturing=True)]
    weight = None
    assert all(ref() is None for ref in kept)


def test_a_graphs_vectors_are_aligned(monkeypatch):
    given = []
    monkeypatch.setattr(_cudnn_graph, "fused_graph", lambda x, w, terms, *rest: given.extend(terms))
    x, weight, long = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(16)
    one = (1, 1)
    _cudnn.conv2d_graph(x, weight, None, one, one, one, 1, long[1:7], long[4:10], None, "relu")
    for (_, vector), values in zip(given, (long[1:7], long[4:10]), strict=True):
        assert vector.data_ptr() % 16 == 0
        assert torch.equal(vector.flatten(), values)
    assert given[1][1].data_ptr() == long[4:].data_ptr()  # no copy that is not needed
