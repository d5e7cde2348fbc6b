"""conv2d, of images and in branches, under torch.compile, export, symbolic tracing and DDP."""

import os
import socket

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv2d, parallel_conv2d
from tests.conv2d.reference import define_parallel
from tests.fused_conv import BACKENDS, INTERPRETING_ONLY, draw


class Block(torch.nn.Module):
    """Every functional: a dilated layer with a residual, branches side by side, a list of images."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(draw(4, 4, 3, 3) / 4)
        self.branches = torch.nn.ParameterList([draw(2, 4, 1, 1), draw(3, 4, 3, 3) / 4])
        self.last = torch.nn.Parameter(draw(3, 9, 2, 3) / 4)
        self.scale = torch.nn.Parameter(draw(4))
        self.shift = torch.nn.Parameter(draw(5))

    def forward(self, x):
        y = conv2d(x, self.first, padding=2, dilation=2, scale=self.scale, residual=x, activation="silu")
        z = parallel_conv2d(y, list(self.branches), (1, 3), shift=self.shift, activation="relu")
        return conv2d([z, F.pad(y, (1, 1, 1, 1))], self.last, stride=2, padding=1, activation="hardswish")


def block(channels_last=False):
    model = Block()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def image(height=5, width=7, batch=2, channels_last=False):
    # No size equals another, or the channels: equal numbers would have to stay equal.
    return draw(batch, 4, height, width, channels_last=channels_last)


def train_step(model, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    return y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])


def test_the_block_is_what_torch_computes():
    # So that the tests below compare with something right.
    model, x = block(), image()
    with torch.no_grad():
        y = F.silu(F.conv2d(x, model.first, padding=2, dilation=2) * model.scale[:, None, None] + x)
        z = define_parallel(
            y, (1, 3), shift=model.shift, activation="relu", a=model.branches[0], b=model.branches[1]
        )
        expected = F.hardswish(F.conv2d(torch.cat([z, y], 1), model.last, stride=2, padding=1))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("dynamic", "backend"),
    [(False, "aten"), (True, "aten"), pytest.param(False, "triton", marks=INTERPRETING_ONLY)],
)
def test_compiles_whole_and_trains(dynamic, backend):
    torch._dynamo.reset()
    model = block()
    with segfast.backend(backend):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for size in ((5, 7), (3, 6)) if dynamic else ((5, 7),):
            expected = train_step(model, image(*size))
            with torch.compiler.set_stance("default" if size == (5, 7) else "fail_on_recompile"):
                actual = train_step(compiled, image(*size))
            assert actual[0].stride() == expected[0].stride()
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(image()), model(image()), atol=1e-5, rtol=1e-5)


@INTERPRETING_ONLY
def test_the_compiled_graph_holds_our_operators_and_no_layout_copies():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def boxed(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Parameter(draw(4, 4, 3, 3, channels_last=True))
            self.last = torch.nn.Parameter(draw(3, 8, 3, 3, channels_last=True))

        def forward(self, x):
            y = conv2d(x, self.first, padding=2, dilation=2, activation="relu")
            return conv2d([x, y], self.last, activation="relu")

    torch._dynamo.reset()
    with segfast.backend("triton"):
        compiled = torch.compile(
            Plain(), backend=aot_autograd(fw_compiler=boxed, bw_compiler=boxed), fullgraph=True
        )
        y, *gradients = train_step(compiled, image(channels_last=True))
    names = [[str(n.target) for n in graph.graph.nodes if n.op == "call_function"] for graph in graphs]
    assert len(names) == 2
    assert sum("segfast.conv2d.default" in n for n in names[0]) == 1
    assert sum("segfast.conv2d_concat.default" in n for n in names[0]) == 1
    assert sum("grad_input" in n for n in names[1]) == 2
    assert sum("grad_weight" in n for n in names[1]) == 3  # one for each image
    copies = [n for graph in names for n in graph if "clone" in n or "contiguous" in n or "_to_copy" in n]
    assert copies == []
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients[1:])


@pytest.mark.compat
@pytest.mark.parametrize("backend", BACKENDS)
def test_exports_with_dynamic_sizes(backend):
    model = block().eval()
    # At stride 2 a row of two would leave one: a size of its own to torch.
    least = {"batch": 2, "height": 3, "width": 3}
    batch, height, width = (torch.export.Dim(n, min=k, max=64) for n, k in least.items())
    sizes = {"x": {0: batch, 2: height, 3: width}}
    with segfast.backend(backend), torch.no_grad():
        program = torch.export.export(model, (image(),), dynamic_shapes=sizes)
        ours = {str(n.target) for n in program.graph.nodes if "segfast" in str(n.target)}
        wanted = {f"segfast.{name}.default" for name in ("conv2d", "conv2d_concat", "parallel_conv2d")}
        assert ours == (wanted if backend == "triton" else set())
        for size in ((5, 7), (6, 9)):
            x = image(*size, batch=3)
            torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-5)
        decomposed = program.run_decompositions(segfast.decompositions())
        assert not [n for n in decomposed.graph.nodes if "segfast" in str(n.target)]
        torch.testing.assert_close(decomposed.module()(image(3, 4)), model(image(3, 4)), atol=1e-5, rtol=1e-5)


def test_symbolic_tracing_keeps_the_calls_whole():
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.wide = draw(4, 4, 3, 3), draw(3, 12, 1, 1)

        def forward(self, x):
            x = segfast.functional.conv2d(x, self.weight, activation="relu")
            y = segfast.functional.parallel_conv2d(x, [self.weight, self.weight], (1, 2))
            return segfast.functional.conv2d([x, y], self.wide)

    traced = torch.fx.symbolic_trace(Step())
    calls = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert calls == [conv2d, parallel_conv2d, conv2d]
    x = draw(1, 4, 5, 5)
    torch.testing.assert_close(traced(x), Step()(x), atol=1e-5, rtol=1e-5)


def test_compiled_code_follows_the_backend_chosen_when_it_runs():
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def run(x, w):
        return conv2d(x, w, padding=1), conv2d([x, x], torch.cat([w, w], 1)), parallel_conv2d(x, [w], [1])

    x, w = draw(1, 4, 3, 3), draw(2, 4, 3, 3)
    once = F.conv2d(x, w, padding=1)
    torch.testing.assert_close(run(x, w), (once, 2 * F.conv2d(x, w), once), atol=1e-5, rtol=1e-5)
    if not segfast.ops._backend._INTERPRETING:
        # Not the code compiled under another choice: the kernels cannot run here, and it says so.
        with segfast.backend("triton"), pytest.raises(Exception, match="on a CPU"):
            run(x, w)


def small_net(channels_last=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        segfast.nn.Conv2d(3, 4, 3, padding=2, dilation=2, activation="relu"),
        segfast.nn.Conv2d(4, 4, 1, bias=False),
        segfast.nn.Conv2d(4, 2, 3, stride=2, padding=1, groups=2, activation="silu"),
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


def _rank(rank: int, port: int, results) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = small_net(channels_last=True)
    x = draw(4, 3, 4, 5, channels_last=True)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):  # the second time the gradients are views into DDP's buckets
        optimizer.zero_grad(set_to_none=False)
        parallel(x[rank::2]).square().sum().backward()
        optimizer.step()
    results[rank] = [p.detach().clone().contiguous() for p in model.parameters()]
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("error:Grad strides do not match")
def test_two_ranks_of_ddp_train_as_one_process():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (port, results), nprocs=2)
        ranks = [results[0], results[1]]
    model, start = small_net(), small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with segfast.backend("aten"):
        for _ in range(2):
            optimizer.zero_grad()
            (model(draw(4, 3, 4, 5)).square().sum() / 2).backward()
            optimizer.step()
    for name, first, second in zip(dict(model.named_parameters()), *ranks, strict=True):
        expected = model.get_parameter(name).detach()
        assert torch.equal(first, second), name
        assert not torch.equal(expected, start.get_parameter(name)), name
        torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5, msg=name)
