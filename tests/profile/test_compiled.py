"""A model under torch.compile: what its graphs run, forward and backward."""

import torch
from torch import nn

import segfast


def test_rows_are_what_the_graphs_run():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    found = segfast.profile(
        net, torch.randn(1, 3, 16, 16), train=True, compile=True, kernels=True, seconds=0.01, progress=False
    )
    by_direction = {
        direction: [row for row in found.rows if row.direction == direction]
        for direction in ("forward", "backward")
    }
    for rows in by_direction.values():
        assert "conv2d" in [row.kind for row in rows]
        assert (rows[-1].name, rows[-1].kind) == ("", "between layers")
        assert len({row.name for row in rows}) > 1
    assert found.title == "Sequential, forward and backward, input [1, 3, 16, 16] float32, compiled"
    assert found.kernels and found.plain_us > 0 and found.train
    assert all(p.grad is None for p in net.parameters())
