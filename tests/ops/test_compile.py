"""The operators under torch.compile, export, symbolic tracing and DistributedDataParallel."""

import os
import socket

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv_transpose2d, up_concat
from tests import free_sizes
from tests.fused_conv import BACKENDS, INTERPRETING_ONLY, draw


class Decoder(torch.nn.Module):
    """A U-Net's step: every functional, a residual, a folded scale."""

    def __init__(self):
        super().__init__()
        self.up = segfast.nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, activation="silu")
        self.weight = torch.nn.Parameter(draw(4, 3, 2, 2) / 4)
        self.scale = torch.nn.Parameter(draw(4))

    def forward(self, x, skip):
        y = up_concat(x, skip, self.weight, activation="relu")
        x = self.up(x, output_size=skip.shape[-2:])
        return torch.cat(
            [y, conv_transpose2d(x, self.up.weight[..., :1, :1], scale=self.scale, residual=x)], 1
        )


def decoder(channels_last=False):
    torch.manual_seed(0)
    model = Decoder()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def inputs(height=3, width=4, batch=2, channels_last=False):
    x = draw(batch, 4, height, width, channels_last=channels_last)
    return x, draw(batch, 2, 2 * height, 2 * width, channels_last=channels_last)


def train_step(model, x, skip):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x, skip)
    return y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])


@pytest.mark.compat
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_and_trains(dynamic, backend):
    torch._dynamo.reset()
    model = decoder()
    with segfast.backend(backend):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        # The first size has no number of channels in it: equal numbers would have to stay equal.
        for size in ((5, 7), (8, 6), (6, 9)) if dynamic else ((5, 7),):
            expected = train_step(model, *inputs(*size))
            with torch.compiler.set_stance("default" if size == (5, 7) else "fail_on_recompile"):
                actual = train_step(compiled, *inputs(*size))
            assert actual[0].stride() == expected[0].stride()
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@INTERPRETING_ONLY
def test_the_compiled_graph_holds_our_operators_and_no_layout_copies():
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def boxed(graph, example_inputs):
        return make_boxed_func(keep(graph, example_inputs))

    torch._dynamo.reset()
    model = decoder(channels_last=True)
    with segfast.backend("triton"):
        compiled = torch.compile(
            model, backend=aot_autograd(fw_compiler=boxed, bw_compiler=boxed), fullgraph=True
        )
        y, *gradients = train_step(compiled, *inputs(channels_last=True))
    names = [[str(n.target) for n in graph.graph.nodes if n.op == "call_function"] for graph in graphs]
    assert len(names) == 2
    assert sum("segfast.conv_transpose2d.default" in n for n in names[0]) == 2
    assert sum("segfast.up_concat.default" in n for n in names[0]) == 1
    assert sum("grad_input" in n for n in names[1]) == sum("grad_weight" in n for n in names[1]) == 3
    copies = [n for graph in names for n in graph if "clone" in n or "contiguous" in n or "_to_copy" in n]
    assert copies == []
    # The sliced 3x3 weight is the only tensor here that is not dense in channels_last.
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


@INTERPRETING_ONLY
def test_inductor_once():
    torch._dynamo.reset()
    model = decoder(channels_last=True)
    with segfast.backend("triton"):
        compiled = torch.compile(model, fullgraph=True)
        expected = train_step(model, *inputs(channels_last=True))
        actual = train_step(compiled, *inputs(channels_last=True))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert actual[0].stride() == expected[0].stride()


@pytest.mark.compat
@pytest.mark.parametrize("backend", BACKENDS)
def test_exports_with_dynamic_sizes(backend):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = segfast.nn.ConvTranspose2d(4, 3, 2, stride=2, activation="relu")
            self.weight = torch.nn.Parameter(draw(4, 3, 2, 2))

        def forward(self, x, skip):
            return self.up(x), up_concat(x, skip, self.weight)

    model = Step().eval()
    batch, height, width = (torch.export.Dim(n, min=2, max=64) for n in ("batch", "height", "width"))
    sizes = {"x": {0: batch, 2: height, 3: width}, "skip": {0: batch, 2: 2 * height, 3: 2 * width}}
    with segfast.backend(backend), torch.no_grad():
        program = torch.export.export(model, inputs(5, 7), dynamic_shapes=sizes)
        ours = [n for n in program.graph.nodes if "segfast" in str(n.target)]
        assert len(ours) == (2 if backend == "triton" else 0)
        for size in ((5, 7), (3, 2), (6, 9)):
            torch.testing.assert_close(
                program.module()(*inputs(*size, batch=3)), model(*inputs(*size, batch=3))
            )
        decomposed = program.run_decompositions(segfast.decompositions())
        assert not [n for n in decomposed.graph.nodes if "segfast" in str(n.target)]
        torch.testing.assert_close(decomposed.module()(*inputs(3, 4)), model(*inputs(3, 4)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("crop", [0, 3])
def test_a_decoders_step_exports_for_odd_sizes_too(backend, crop):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(draw(3, 2, 2, 2)), torch.nn.Parameter(draw(2))

        def forward(self, skip):
            small = F.max_pool2d(skip, 2)
            return up_concat(small[..., crop:, crop:], skip, self.weight, self.bias)

    model = Step().eval()
    height, width = free_sizes.dims(10, 64)
    with segfast.backend(backend), torch.no_grad():
        program = torch.export.export(model, (draw(1, 3, 12, 16),), dynamic_shapes=({2: height, 3: width},))
        for size in ((12, 16), (13, 11), (10, 21)):
            skip = draw(1, 3, *size)
            torch.testing.assert_close(program.module()(skip), model(skip))


def test_symbolic_tracing_keeps_the_calls_whole():
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(draw(4, 3, 2, 2))
            self.up = segfast.nn.ConvTranspose2d(5, 2, 2, stride=2)
            torch.nn.init.ones_(self.up.weight), torch.nn.init.zeros_(self.up.bias)

        def forward(self, x, skip):
            x = segfast.functional.conv_transpose2d(x, self.weight, activation="relu")
            x = segfast.functional.up_concat(x, skip, self.weight[:3], stride=1)
            return self.up(x)

    traced = torch.fx.symbolic_trace(Step())
    calls = [
        n.target for n in traced.graph.nodes if n.op == "call_function" and "segfast" in n.target.__module__
    ]
    assert calls == [conv_transpose2d, up_concat, conv_transpose2d]
    x, skip = draw(1, 4, 3, 3), draw(1, 2, 5, 5)
    torch.testing.assert_close(traced(x, skip), Step()(x, skip))


def test_compiled_code_follows_the_backend_chosen_when_it_runs():
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def run(x, w):
        return conv_transpose2d(x, w, stride=2)

    x, w = draw(1, 4, 2, 2), draw(4, 3, 2, 2)
    torch.testing.assert_close(run(x, w), F.conv_transpose2d(x, w, stride=2))
    with segfast.backend("aten"):
        torch.testing.assert_close(run(x, w), F.conv_transpose2d(x, w, stride=2))
    if not segfast.ops._backend._INTERPRETING:
        # Not the code compiled under another choice: the kernels cannot run here, and it says so.
        with segfast.backend("triton"), pytest.raises(Exception, match="on a CPU"):
            run(x, w)


def _rank(rank: int, port: int, backend: str, channels_last: bool, results) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = decoder(channels_last)
    x, skip = inputs(batch=4, channels_last=channels_last)
    with segfast.backend(backend):
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second time the gradients are views into DDP's buckets
            parallel.zero_grad(set_to_none=False)
            parallel(x[rank::2], skip[rank::2]).square().sum().backward()
    results[rank] = [p.grad.clone().contiguous() for p in model.parameters()]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("error:Grad strides do not match")
def test_two_ranks_of_ddp_hold_the_mean_gradient(backend):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (port, backend, True, results), nprocs=2)
        ranks = [results[0], results[1]]
    model = decoder()
    with segfast.backend("aten"):
        (model(*inputs(batch=4)).square().sum() / 2).backward()
    for name, first, second in zip(dict(model.named_parameters()), *ranks, strict=True):
        expected = model.get_parameter(name).grad
        assert torch.equal(first, second), name
        torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4, msg=name)
