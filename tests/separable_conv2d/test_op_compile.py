"""Depthwise and separable convolution under torch.compile, export and symbolic tracing."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from tests.fused_conv import BACKENDS, INTERPRETING_ONLY, draw
from tests.separable_conv2d.reference import define_separable

pytestmark = pytest.mark.usefixtures("small_tiles")


class Block(torch.nn.Module):
    """Every functional: a depthwise layer, its statistics as a gate, a separable layer with a residual."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(draw(4, 1, 3, 3))
        self.second = torch.nn.Parameter(draw(8, 1, 2, 3))
        self.pointwise = torch.nn.Parameter(draw(4, 8, 1, 1) / 4)
        self.scale = torch.nn.Parameter(draw(4))

    def forward(self, x):
        y, total, squares = depthwise_conv2d(
            x, self.first, padding=1, dilation=1, scale=self.scale, activation="silu", return_statistics=True
        )
        y = y * torch.sigmoid(total - squares)[..., None, None]
        z = separable_conv2d(
            y, self.second, self.pointwise, padding="same", depthwise_activation="relu6", scale=self.scale,
            residual=x, activation="hardswish",
        )  # fmt: skip
        return depthwise_conv2d(z, self.first, stride=2, padding=2, dilation=2, activation="relu")


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
        conv = F.conv2d(x, model.first, padding=1, groups=4) * model.scale[:, None, None]
        y = F.silu(conv)
        y = y * torch.sigmoid(y.sum((2, 3)) - y.square().sum((2, 3)))[..., None, None]
        between = F.relu6(F.conv2d(y, model.second, padding="same", groups=4))
        z = F.hardswish(F.conv2d(between, model.pointwise) * model.scale[:, None, None] + x)
        expected = F.relu(F.conv2d(z, model.first, None, 2, 2, 2, 4))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("dynamic", "backend"),
    [(False, "aten"), (True, "aten"), pytest.param(True, "triton", marks=INTERPRETING_ONLY)],
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
        if not dynamic:
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
            self.first = torch.nn.Parameter(draw(4, 1, 3, 3, channels_last=True))
            self.pointwise = torch.nn.Parameter(draw(6, 4, 1, 1))

        def forward(self, x):
            y = depthwise_conv2d(x, self.first, padding=1, activation="relu")
            return separable_conv2d(y, self.first, self.pointwise, depthwise_activation="relu")

    torch._dynamo.reset()
    with segfast.backend("triton"):
        compiled = torch.compile(
            Plain(), backend=aot_autograd(fw_compiler=boxed, bw_compiler=boxed), fullgraph=True
        )
        y, *gradients = train_step(compiled, image(channels_last=True))
    names = [[str(n.target) for n in graph.graph.nodes if n.op == "call_function"] for graph in graphs]
    assert len(names) == 2
    assert sum("segfast.depthwise_conv2d.default" in n for n in names[0]) == 1
    assert sum("segfast.separable_conv2d.default" in n for n in names[0]) == 1
    # The separable layer's backward computes its depthwise result again.
    assert sum("segfast.depthwise_conv2d.default" in n for n in names[1]) == 1
    assert sum("grad_input" in n for n in names[1]) == sum("grad_weight" in n for n in names[1]) == 2
    copies = [n for graph in names for n in graph if "clone" in n or "contiguous" in n or "_to_copy" in n]
    assert copies == []
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.compat
@pytest.mark.parametrize("backend", BACKENDS)
def test_exports_with_dynamic_sizes(backend):
    model = block().eval()
    # Of a row of two the layer at stride 2 would leave one: a size of its own to torch.
    least = {"batch": 2, "height": 3, "width": 3}
    batch, height, width = (torch.export.Dim(n, min=k, max=64) for n, k in least.items())
    sizes = {"x": {0: batch, 2: height, 3: width}}
    with segfast.backend(backend), torch.no_grad():
        program = torch.export.export(model, (image(),), dynamic_shapes=sizes)
        ours = [n for n in program.graph.nodes if "segfast" in str(n.target)]
        assert len(ours) == (3 if backend == "triton" else 0)
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
            self.depthwise, self.pointwise = draw(4, 1, 3, 3), draw(4, 4, 1, 1)

        def forward(self, x):
            x = segfast.functional.depthwise_conv2d(x, self.depthwise, activation="relu")
            return segfast.functional.separable_conv2d(x, self.depthwise, self.pointwise, padding="same")

    traced = torch.fx.symbolic_trace(Step())
    calls = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert calls == [depthwise_conv2d, separable_conv2d]
    x, step = draw(1, 4, 5, 5), Step()
    expected = define_separable(
        F.relu(F.conv2d(x, step.depthwise, groups=4)), step.depthwise, step.pointwise, padding=1
    )
    torch.testing.assert_close(traced(x), expected, atol=1e-5, rtol=1e-5)


def test_compiled_code_follows_the_backend_chosen_when_it_runs():
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def run(x, w):
        return depthwise_conv2d(x, w, padding=1)

    x, w = draw(1, 4, 3, 3), draw(4, 1, 3, 3)
    expected = F.conv2d(x, w, padding=1, groups=4)
    torch.testing.assert_close(run(x, w), expected)
    if not segfast.ops._backend._INTERPRETING:
        # Not the code compiled under another choice: the kernels cannot run here, and it says so.
        with segfast.backend("triton"), pytest.raises(Exception, match="on a CPU"):
            run(x, w)
