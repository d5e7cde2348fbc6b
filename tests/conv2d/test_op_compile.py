"""conv2d, of images and in branches, under torch.compile, export, symbolic tracing and DDP."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv2d, parallel_conv2d
from tests.conv2d.reference import define_parallel
from tests.fused_conv import BACKENDS, draw


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
