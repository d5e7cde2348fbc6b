"""Every public function under torch.compile, symbolic tracing and DistributedDataParallel."""

import os
import socket

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import segfast
from segfast.ops import _backend
from tests.fused_conv import BACKENDS, draw

from .families import EXAMPLES, ROUTES, on, over
from .test_gradients import leaves_of, sum_of


def grown(example, height: int, width: int):
    """All operands but the residual, with images so much larger; a skip grows by twice as much."""
    tensors = {}
    for name, shape in example.shapes(4).items():
        if name in example.batched and name != "residual":
            times = 2 if name == "skip" else 1
            shape = (*shape[:2], shape[2] + times * height, shape[3] + times * width)
        if name != "residual":
            tensors[name] = draw(*shape, channels_last=len(shape) == 4)
    return tensors


class Layer(torch.nn.Module):
    """The example with its weights and vectors as parameters."""

    def __init__(self, example):
        super().__init__()
        self.example, self.activation = example, "silu" if example.activations else None
        for name, tensor in grown(example, 0, 0).items():
            if name not in example.batched:
                self.register_parameter(name, torch.nn.Parameter(tensor))

    def forward(self, **images):
        tensors = {name: images.get(name, getattr(self, name, None)) for name in self.example.shapes(4)}
        tensors.pop("residual", None)
        return self.example.run(tensors, self.activation)


def train_step(model, images):
    leaves = leaves_of(images)
    results = model(**leaves)
    return *results, *torch.autograd.grad(sum_of(results), [*leaves.values(), *model.parameters()])


def is_compiled(example, route) -> bool:
    """True for every function on our operators; of those on ATen, for one a family."""
    several = (
        "in groups",
        "of images",
        "of each pixel",
        "separable",
        "parallel",
        "dice",
        "mean_field",
        "up_",
    )
    return example.differentiates and (route != "aten" or not any(part in example.name for part in several))


@pytest.mark.compat
@pytest.mark.parametrize(
    ("example", "route"),
    [
        pytest.param(each, *route.values, marks=route.marks, id=f"{each} {route.values[0]}")
        for each in EXAMPLES
        for route in (pytest.param(r) if isinstance(r, str) else r for r in ROUTES)
        if is_compiled(each, route.values[0])
    ],
)
def test_compiles_whole_and_trains(example, route):
    torch._dynamo.reset()
    dynamic = route != "triton"
    model = Layer(example)
    with on(route, example):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        # At the first no two sizes are equal by chance: they would have to stay so.
        for i, size in enumerate(((8, 17), (9, 15)) if dynamic else ((0, 0),)):
            images = {n: t for n, t in grown(example, *size).items() if n in example.batched}
            expected = train_step(model, images)
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                actual = train_step(compiled, images)
            assert actual[0].stride() == expected[0].stride()
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4 * (1 + b.abs().max().item()), rtol=1e-4)


@over(lambda example: example.differentiates)
def test_compiles_whole_with_weights_of_any_size(example):
    """Where they are inputs: the sizes of a module's own are numbers to the compiler."""
    torch._dynamo.reset()
    tensors = grown(example, 8, 17)
    compiled = torch.compile(lambda **t: example.run(t), backend="eager", fullgraph=True, dynamic=True)
    with on("aten", example), torch.no_grad():
        for a, b in zip(compiled(**tensors), example.run(tensors), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * (1 + b.abs().max().item()), rtol=1e-4)


@over(lambda example: bool(example.activations))
def test_the_compiled_graph_holds_our_operators_and_no_layout_copies(example):
    graphs = []

    def boxed(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    with on("registered", example):
        backend = aot_autograd(fw_compiler=boxed, bw_compiler=boxed)
        compiled = torch.compile(lambda t: example.run(t, "relu"), backend=backend, fullgraph=True)
        leaves = leaves_of(example.least(example.tensors(channels_last=True)))
        y = compiled(leaves)[0]
        # As a model's next layer would give it.
        y.backward(torch.ones_like(y))
    forward, backward = graphs
    branches = sum(name.startswith("weight") for name in leaves)
    assert sum(target.startswith("segfast.") for target in forward) == branches or "separable" in example.name
    assert sum(target.startswith("segfast.") for target in backward) >= 2
    copies = [target for target in forward + backward if "clone" in target or "contiguous" in target]
    assert copies + [target for target in forward + backward if "_to_copy" in target] == []
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert leaves[next(iter(leaves))].grad.is_contiguous(memory_format=torch.channels_last)


@over(lambda example: example.family != "dense_crf")
def test_compiled_code_follows_the_backend_chosen_when_it_runs(example):
    torch._dynamo.reset()
    compiled = torch.compile(example.run, backend="eager", fullgraph=True)
    tensors = example.tensors()
    torch.testing.assert_close(compiled(tensors), example.run(tensors))
    if not _backend._INTERPRETING:
        # Not the code compiled under another choice: the kernels cannot run here, and it says so.
        with segfast.backend("triton"), pytest.raises(Exception, match="on a CPU"):
            compiled(tensors)


@pytest.mark.parametrize("name", segfast.functional.__all__)
def test_symbolic_tracing_keeps_the_call_whole(name):
    traced = torch.fx.symbolic_trace(lambda x, y: getattr(segfast.functional, name)(x, y))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls == [getattr(segfast.functional, name)]


def network(channels_last=False):
    """A layer of every convolution family."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        segfast.nn.Conv2d(3, 4, 3, padding=2, dilation=2, activation="relu"),
        segfast.nn.DepthwiseConv2d(4, 4, 3, padding=1, activation="silu"),
        segfast.nn.SeparableConv2d(4, 6, 3, norm_layer=None),
        segfast.nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2),
        segfast.nn.ConvTranspose2d(4, 2, 2, stride=2, activation="silu"),
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


def train(model, x, ranks=1):
    """Two steps; the mean of several ranks' gradients is their part of the sum over all images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):  # the second time the gradients are views into DDP's buckets
        optimizer.zero_grad(set_to_none=False)
        (model(x).square().sum() / ranks).backward()
        optimizer.step()


def _rank(rank: int, port: int, backend: str, results) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = network(channels_last=True)
    with segfast.backend(backend):
        x = draw(4, 3, 4, 6, channels_last=True)[rank::2]
        train(torch.nn.parallel.DistributedDataParallel(model), x)
    results[rank] = [p.detach().clone().contiguous() for p in model.parameters()]
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("error:Grad strides do not match")
def test_two_ranks_of_ddp_train_as_one_process(backend):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (port, backend, results), nprocs=2)
        ranks = [results[0], results[1]]
    model, start = network(), network()
    with segfast.backend("aten"):
        train(model, draw(4, 3, 4, 6), ranks=2)
    for name, first, second in zip(dict(model.named_parameters()), *ranks, strict=True):
        expected = model.get_parameter(name).detach()
        assert torch.equal(first, second), name
        assert not torch.equal(expected, start.get_parameter(name)), name
        torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5, msg=name)
