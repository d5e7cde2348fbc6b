"""The operators under torch.compile, export, symbolic tracing and DistributedDataParallel."""

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
