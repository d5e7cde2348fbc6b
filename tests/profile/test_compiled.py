"""A model under torch.compile: what its graphs run, forward and backward."""

import pytest
import torch
from torch import nn
from torch.profiler import profile

import segfast
from segfast._profile.called import flops_of_call


def test_rows_are_what_the_graphs_run():
    up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), up, nn.Flatten(2), nn.Linear(196, 5))
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
    flops = {direction: [row.flops for row in rows if row.flops] for direction, rows in by_direction.items()}
    convolution, transposed, product = 2 * 14 * 14 * 8 * 27, 2 * 7 * 7 * 8 * 2 * 4, 2 * 4 * 196 * 5
    assert flops["forward"] == [convolution, transposed, product]
    # The images need no gradient.
    assert sorted(flops["backward"]) == sorted([convolution, 2 * transposed, product, product])
    assert len(found.remarks) == 1  # none of FLOPs that are missing


def images(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.mm(images(3, 4), images(4, 5)), 2 * 3 * 4 * 5),
        # Of the same number of arguments as mm's with a dtype.
        (lambda: torch.mm(images(3, 4), images(4, 5), out=images(3, 5)), 2 * 3 * 4 * 5),
        (lambda: torch.addmm(images(5), images(3, 4), images(4, 5)), 2 * 3 * 4 * 5),
        # Which calls bmm.
        (lambda: images(2, 3, 4) @ images(2, 4, 5), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.conv2d(images(1, 4, 6, 7), images(8, 2, 3, 3), groups=2), 2 * 4 * 5 * 8 * 2 * 9),
        (lambda: images(3, 4) + images(3, 4), 0),
        # Of a text the profiler tells nothing.
        (
            lambda: torch.ops.segfast.gaussian_filter(
                images(1, 2, 5), images(1, 2, 5), "exact", None, 0.0, "aten"
            ),
            0,
        ),
    ],
)
def test_flops_of_what_the_profiler_saw(call, expected):
    with profile(record_shapes=True) as profiler:
        call()
    assert sum(flops_of_call(event) for event in profiler.events() if event.cpu_parent is None) == expected
