"""cuDNN's fused calls as candidates of conv2d: when they are chosen, what they are called with.

No GPU: ATen's fused calls and the `cudnn` package are stood in for, the measured tables are made up.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.ops import _cudnn, _cudnn_graph
from segfast.ops._backend import Decision, measured_reason_not, taken_by_kernels, use_triton
from segfast.ops._conv2d_aten import conv2d_aten
from segfast.ops._cudnn import GRAPH, RELU, conv2d_cudnn, has_epilogue, rivals
from tests.cudnn import (
    BUCKET,
    FUSED,
    GEOMETRY,
    GRAPH_FASTEST,
    PLAIN,
    RELU_FASTEST,
    close,
    drawn,
    expected,
    forget,
    rows,
)

__all__ = ["rows"]


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


def test_our_kernel_must_beat_the_fastest_that_could_serve_the_call(rows):
    rows[FUSED] = RELU_FASTEST | {"config": {}}

    def ask(*found, fused=True):
        forget()
        return measured_reason_not(("conv2d_forward",), *BUCKET, fused, found)

    assert ask() is None
    assert ask(RELU) == "cuDNN's fused call was measured faster (20 against 30 us)"
    assert ask(GRAPH) == "a cuDNN graph was measured faster (25 against 30 us)"
    assert "fused call" in ask(RELU, GRAPH)
    assert "not measured" in ask(RELU, fused=False)
    rows[FUSED] |= {"us": 19.0}
    assert ask(RELU, GRAPH) is None
    rows[FUSED] |= {"us": 50.0}
    assert ask() == "ATen was measured faster (40 against 50 us)"
    # A row from a machine without the package, or before there were such rows.
    rows[FUSED] = {"us": 30.0, "aten_us": 40.0}
    assert ask(RELU, GRAPH) is None


@pytest.mark.parametrize("operands", ["shift", "scale shift", "bias", "bias scale shift", "bias scale", ""])
@pytest.mark.parametrize("residual", [False, True])
def test_the_fused_call_is_the_layer(rows, fused_calls, operands, residual):
    rows[FUSED] = RELU_FASTEST
    x, weight, bias, scale, shift, added = drawn()
    bias, scale, shift = (
        t if name in operands else None for name, t in (("bias", bias), ("scale", scale), ("shift", shift))
    )
    args = (x, weight, bias, scale, shift, added if residual else None, "relu")
    y = conv2d_cudnn(x, weight, bias, *GEOMETRY, *args[3:])
    close(y, expected(*args))
    (given,) = fused_calls
    assert given[1].dtype == torch.bfloat16 and given[1].is_contiguous(memory_format=torch.channels_last)
    assert given[2] is None or given[2].dtype == torch.bfloat16
    if scale is None:
        assert given[1] is weight  # nothing folded, nothing copied


def test_the_faster_of_the_calls_is_taken_and_explained(rows, fused_calls, monkeypatch):
    x, weight, bias, scale, shift, _ = drawn()
    graphs = []
    graph = lambda *args: graphs.append(args) or _cudnn.conv2d_relu(*args)  # noqa: E731
    monkeypatch.setitem(_cudnn.RUN, GRAPH, graph)

    def call():
        args = (x, weight, bias, *GEOMETRY, scale, shift, None, "relu")
        use_triton("conv2d", lambda choice: reason)
        y = conv2d_cudnn(*args)
        return conv2d_aten(*args, 0.01) if y is None else y

    def decided():
        forget()
        (decision,) = segfast.explain(call)
        assert isinstance(decision, Decision) and (decision.operation, decision.backend) == ("conv2d", "aten")
        return decision.reason

    rows[FUSED] = RELU_FASTEST
    reason = "cuDNN's fused call was measured faster (20 against 30 us)"
    assert decided() == reason and len(fused_calls) == 1
    reason = "conv2d_forward in bfloat16 is not proven on this GPU (sm_90)"
    faster = "was measured faster than plain ATen"
    assert decided() == f"{reason}; cuDNN's fused call {faster} (20 against 40 us)"
    assert len(fused_calls) == 2 and graphs == []
    rows[FUSED] = GRAPH_FASTEST
    assert decided() == f"{reason}; a cuDNN graph {faster} (25 against 40 us)"
    assert len(graphs) == 1
    monkeypatch.setattr(_cudnn_graph, "installed", lambda: False)
    assert decided() == f"{reason}; cuDNN's fused call {faster} (28 against 40 us)"
    rows[FUSED] = GRAPH_FASTEST | {"aten_us": 20.0}
    assert decided() == reason
    rows.clear()
    assert decided() == reason
    rows[FUSED] = RELU_FASTEST
    with segfast.backend("aten"):
        (decision,) = segfast.explain(call)
        assert decision.reason == "asked for by name"
    assert len(graphs) == 1 and len(fused_calls) == 4  # the graph stands on the fused call here


def test_a_shape_that_was_not_measured_takes_what_was_faster_on_nearly_all_others(rows, fused_calls):
    x, weight, bias, scale, shift, _ = drawn()

    def measured(count, ending="s1d1-fused-bfloat16", **times):
        buckets = [f"ci{8 * i}-co16-t9-g1-{ending}-p{i % 7}" for i in range(2, count + 2)]
        rows.update({bucket: {"us": 30.0, "aten_us": 40.0} | times for bucket in buckets})

    def taken(activation="relu"):
        forget()
        before = len(fused_calls)
        args = (x, weight, bias, *GEOMETRY, scale, shift, None, activation)

        def call():
            use_triton("conv2d", lambda choice: "not measured")
            return conv2d_cudnn(*args)

        (decision,) = segfast.explain(call)
        assert (len(fused_calls) > before) == ("cuDNN" in decision.reason)
        return decision.reason

    measured(19, cudnn_relu_us=20.0)
    assert taken() == "not measured"
    measured(20, cudnn_relu_us=20.0)
    words = "cuDNN's fused call was measured faster than plain ATen on 20 shapes like it"
    assert taken() == f"not measured; {words}"
    assert taken("silu") == "not measured"
    measured(20, cudnn_relu_us=40.0)  # no gain
    assert taken() == "not measured"
    measured(20, cudnn_relu_us=20.0)
    measured(1, cudnn_relu_us=42.0)  # one in twenty is slower
    assert taken() == "not measured"
    # Other kinds of calls say nothing: bare, of another dtype, in groups.
    for ending in ("s1d1-bfloat16", "s1d1-fused-float16"):
        rows.clear()
        measured(20, ending, cudnn_relu_us=20.0)
        assert taken() == "not measured"
    rows.clear()
    measured(20, cudnn_relu_us=20.0)
    for bucket in list(rows):
        rows[bucket.replace("-g1-", "-g2-")] = rows.pop(bucket)
    assert taken() == "not measured"


def test_what_cannot_be_served_is_left_to_aten(rows, fused_calls):
    rows[FUSED] = rows[PLAIN] = RELU_FASTEST
    x, weight, bias, scale, shift, residual = drawn()

    def call(x=x, weight=weight, bias=bias, geometry=GEOMETRY, scale=scale, residual=residual, act="relu"):
        forget()
        return conv2d_cudnn(x, weight, bias, *geometry, scale, shift, residual, act)

    assert call() is not None
    for wrong in (
        {"x": x.contiguous()},
        {"x": x[:1]},
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


def test_who_has_to_see_the_operator_sees_it(rows, fused_calls):
    rows[FUSED] = RELU_FASTEST
    x, weight, *_ = drawn()

    def call(x, weight):
        y = conv2d_cudnn(x, weight, None, *GEOMETRY, None, None, None, "relu")
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


def test_autocast_decides_the_dtype(rows, fused_calls):
    rows[FUSED] = RELU_FASTEST
    x, weight, bias, scale, shift, residual = drawn(torch.float32)
    args = (x, weight, bias, *GEOMETRY, scale, shift, residual, "relu")
    assert conv2d_cudnn(*args) is None  # no row for float32
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d_cudnn(*args)
    assert y.dtype == torch.bfloat16
    close(y, expected(x, weight, bias, scale, shift, residual, "relu"))


def test_rivals_by_activation_dtype_and_switches(rows, monkeypatch):
    x, weight, *_ = drawn()

    def of(activation, x=x, **changes):
        operands = dict.fromkeys(("bias", "scale", "shift", "residual")) | changes
        return rivals(x, weight, **operands, activation=activation)

    assert of("relu") == (RELU, GRAPH)
    assert of("silu") == of(None) == (GRAPH,)
    assert of("hardswish") == ()
    assert of("relu", x.float()) == (RELU,)
    assert of("relu", x.double()) == of("relu", [x, x]) == ()
    assert of("relu", residual=torch.zeros(2, 16, 1, 1).expand(2, 16, 7, 7)) == ()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert of("relu") == (RELU,)
    assert of(None) == ()
    assert not has_epilogue(None, None, None, None)
    assert has_epilogue(None, None, None, "relu") and has_epilogue(x, None, None, None)


def test_on_a_cpu_there_is_no_rival():
    x, weight, *_ = drawn()
    assert rivals(x, weight, None, None, None, None, "relu") == ()
    assert conv2d_cudnn(x, weight, None, *GEOMETRY, None, None, None, "relu") is None


@pytest.mark.parametrize("residual", [False, True])
def test_conv2d_takes_the_fused_call_where_it_is_fastest(rows, fused_calls, monkeypatch, residual):
    from segfast.ops.dilated_conv2d import functional

    monkeypatch.setattr(functional, "kernel_reason_not", lambda *args: None)
    rows[FUSED] = RELU_FASTEST
    x, weight, bias, scale, shift, added = drawn()
    options = {"scale": scale, "shift": shift, "residual": added if residual else None, "activation": "relu"}

    def call():
        return segfast.functional.conv2d(x, weight, bias, 1, 2, 2, **options)

    (decision,) = segfast.explain(call)
    assert str(decision) == "conv2d: aten (cuDNN's fused call was measured faster (20 against 30 us))"
    assert len(fused_calls) == 1
    assert [id(t) for t in taken_by_kernels(call, [weight, x[:1]])] == [id(weight)]
    assert len(fused_calls) == 2
    with segfast.backend("aten"):
        segfast.explain(call)
    assert len(fused_calls) == 2
    rows[FUSED] = RELU_FASTEST | {"aten_us": 10.0}
    forget()
    assert "ATen was measured faster (10 against 30 us)" in segfast.explain(call)[0].reason
    assert len(fused_calls) == 2
    assert taken_by_kernels(call, [weight]) == []


def test_the_branches_of_a_pyramid_take_it_too(rows, fused_calls, monkeypatch):
    from segfast.ops.dilated_conv2d import functional

    monkeypatch.setattr(functional, "kernel_reason_not", lambda *args: None)
    rows[FUSED] = rows["ci8-co16-t1-g1-s1d1-fused-bfloat16-p6"] = RELU_FASTEST
    x, weight, _, scale, shift, _ = drawn()
    weights = [weight[:, :, :1, :1].contiguous(memory_format=torch.channels_last), weight]
    vectors = {"scale": scale.repeat(2), "shift": shift.repeat(2)}
    found = []

    def call():
        y = segfast.functional.parallel_conv2d(x, weights, [1, 2], **vectors, activation="relu")
        found.append(y)

    (decision,) = segfast.explain(call)
    assert "was measured faster than plain ATen" in decision.reason
    assert len(fused_calls) == 2
    pads = ((0, 0), (2, 2))
    parts = [
        conv2d_aten(
            x.double(), w.double(), None, (1, 1), pads[i], (i + 1,) * 2, 1, scale.double(), shift.double(),
            None, "relu", 0.0,
        )
        for i, w in enumerate(weights)
    ]  # fmt: skip
    close(found[0], torch.cat(parts, 1))


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
