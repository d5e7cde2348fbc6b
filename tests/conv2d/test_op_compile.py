"""conv2d, of images and in branches, exported."""

import pytest
import torch
import torch.nn.functional as F

from segfast.functional import conv2d, parallel_conv2d
from tests.conv2d.reference import define_parallel
from tests.exporting import assert_exports_with_dynamic_sizes, image
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


def test_the_block_is_what_torch_computes():
    # So that the tests below compare with something right.
    model, x = Block(), image()
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
    assert_exports_with_dynamic_sizes(Block().eval(), backend, "conv2d", "conv2d_concat", "parallel_conv2d")
