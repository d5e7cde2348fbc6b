"""Depthwise and separable convolution, exported."""

import pytest
import torch
import torch.nn.functional as F

from segfast.functional import depthwise_conv2d, separable_conv2d
from tests.exporting import assert_exports_with_dynamic_sizes, image
from tests.fused_conv import BACKENDS, draw

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


def test_the_block_is_what_torch_computes():
    # So that the tests below compare with something right.
    model, x = Block(), image()
    with torch.no_grad():
        conv = F.conv2d(x, model.first, padding=1, groups=4) * model.scale[:, None, None]
        y = F.silu(conv)
        y = y * torch.sigmoid(y.sum((2, 3)) - y.square().sum((2, 3)))[..., None, None]
        between = F.relu6(F.conv2d(y, model.second, padding="same", groups=4))
        z = F.hardswish(F.conv2d(between, model.pointwise) * model.scale[:, None, None] + x)
        expected = F.relu(F.conv2d(z, model.first, None, 2, 2, 2, 4))
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.compat
@pytest.mark.parametrize("backend", BACKENDS)
def test_exports_with_dynamic_sizes(backend):
    assert_exports_with_dynamic_sizes(
        Block().eval(), backend, "depthwise_conv2d", "depthwise_conv2d_statistics", "separable_conv2d"
    )
