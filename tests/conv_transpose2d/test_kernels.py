"""The transposed-convolution kernels in Triton's interpreter, against fp64."""

import math
import textwrap

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv_transpose2d
from segfast.kernels import Tile, override_tile
from tests import far_apart
from tests.fused_conv import check_fused, draw

pytestmark = pytest.mark.interpreter

# (N, C_in, H, W), C_out, and what differs from conv_transpose2d's defaults. Odd sizes, no tile full.
GEOMETRIES = {
    "1x1": ((1, 1, 1, 1), 1, {"kernel": 1}),
    "1x1 s2 gaps": ((2, 3, 3, 2), 2, {"kernel": 1, "stride": 2, "output_padding": 1}),
    "k2s2": ((2, 5, 3, 4), 7, {"kernel": 2, "stride": 2}),
    "k2s2 21 classes": ((1, 21, 5, 3), 21, {"kernel": 2, "stride": 2}),
    "k2s2 over a tile": ((1, 33, 9, 9), 40, {"kernel": 2, "stride": 2}),
    "k2s2 whole tiles": ((2, 32, 4, 8), 64, {"kernel": 2, "stride": 2}),
    "k2s2 p1": ((1, 4, 5, 4), 3, {"kernel": 2, "stride": 2, "padding": 1}),
    "k2s2 output_padding": ((2, 4, 3, 3), 6, {"kernel": 2, "stride": 2, "output_padding": (1, 0)}),
    "k4s4": ((1, 6, 2, 3), 5, {"kernel": 4, "stride": 4}),
    "k8s8": ((1, 3, 2, 1), 2, {"kernel": 8, "stride": 8}),
    "k8s8 p3": ((1, 3, 2, 3), 2, {"kernel": 8, "stride": 8, "padding": 3}),
    "k4s2p1": ((2, 8, 4, 5), 12, {"kernel": 4, "stride": 2, "padding": 1}),
    "k4s2p1 whole tiles": ((1, 16, 4, 4), 64, {"kernel": 4, "stride": 2, "padding": 1}),
    "k4s2p3 output_padding": ((1, 5, 4, 3), 3, {"kernel": 4, "stride": 2, "padding": 3, "output_padding": 1}),
    "k8s4p2": ((1, 7, 3, 2), 5, {"kernel": 8, "stride": 4, "padding": 2}),
    "k16s8p4 21 classes": ((1, 21, 2, 2), 21, {"kernel": 16, "stride": 8, "padding": 4}),
    "k6s(2,3)": ((1, 3, 4, 3), 4, {"kernel": 6, "stride": (2, 3), "padding": (1, 2)}),
    "k3s1p1": ((2, 4, 5, 4), 6, {"kernel": 3, "padding": 1}),
    "k3s2p1 output_padding": ((2, 6, 4, 3), 5, {"kernel": 3, "stride": 2, "padding": 1, "output_padding": 1}),
    "k5s3": ((1, 4, 3, 4), 3, {"kernel": 5, "stride": 3, "padding": 2, "output_padding": (0, 2)}),
    "k(3,2)s(1,2)": ((1, 3, 4, 3), 4, {"kernel": (3, 2), "stride": (1, 2), "padding": (1, 0)}),
    "kernel smaller than stride": ((1, 3, 3, 3), 2, {"kernel": 2, "stride": 3, "output_padding": 2}),
    "kernel smaller than stride, p1": ((1, 3, 4, 3), 2, {"kernel": (1, 2), "stride": 4, "padding": (0, 1)}),
    "d2 s1": ((1, 3, 4, 5), 4, {"kernel": 3, "dilation": 2, "padding": 2}),
    "d2 s2: gcd 2, phases without taps": ((1, 5, 3, 4), 3, {"kernel": 3, "stride": 2, "dilation": 2}),
    "d2 s2 k2 output_padding": (
        (1, 5, 3, 4),
        3,
        {"kernel": 2, "stride": 2, "dilation": 2, "output_padding": 1},
    ),
    "d4 s6: gcd 2": (
        (1, 2, 3, 2),
        3,
        {"kernel": 4, "stride": 6, "dilation": 4, "padding": 5, "output_padding": 5},
    ),
    "d3 s2: coprime": ((1, 3, 4, 3), 2, {"kernel": 3, "stride": 2, "dilation": 3, "padding": 3}),
    "d(1,3) s(3,2)": (
        (1, 3, 3, 3),
        4,
        {"kernel": (3, 2), "stride": (3, 2), "dilation": (1, 3), "padding": 1},
    ),
    "d3 with output_padding above the stride": (
        (1, 2, 3, 3),
        2,
        {"kernel": 2, "dilation": 3, "output_padding": 2},
    ),
    "groups": ((2, 6, 3, 3), 4, {"kernel": 2, "stride": 2, "groups": 2}),
    "groups k3": ((1, 9, 3, 4), 6, {"kernel": 3, "stride": 2, "padding": 1, "groups": 3}),
    "depthwise k4s2p1": ((1, 5, 3, 4), 5, {"kernel": 4, "stride": 2, "padding": 1, "groups": 5}),
    "groups d2": ((1, 4, 3, 3), 8, {"kernel": 3, "stride": 2, "dilation": 2, "groups": 4}),
    "kernel larger than the image": ((1, 3, 1, 2), 2, {"kernel": 7, "stride": 2, "padding": 3}),
    "padding cuts all but a pixel": ((1, 3, 3, 3), 2, {"kernel": 3, "stride": 1, "padding": 2}),
    "output of one pixel": ((1, 3, 2, 2), 2, {"kernel": 2, "stride": 1, "padding": 1}),
}


def operands(
    shape, channels_out, kernel=1, groups=1, dtype=torch.float32, bias=True, channels_last=False, **_
):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    tensors = {
        "input": draw(*shape, dtype=dtype, channels_last=channels_last),
        "weight": draw(shape[1], channels_out // groups, *kernel, dtype=dtype, channels_last=channels_last),
    }
    return tensors | ({"bias": draw(channels_out, dtype=dtype)} if bias else {})


def check(shape, channels_out, kernel=1, dtype=torch.float32, channels_last=False, **geometry):
    tensors = operands(
        shape, channels_out, kernel, geometry.get("groups", 1), dtype=dtype, channels_last=channels_last
    )
    with segfast.backend("triton"):
        return check_fused(conv_transpose2d, F.conv_transpose2d, tensors, **geometry)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_values_and_gradients_are_torchs(name, poisoned_empty):
    shape, channels_out, geometry = GEOMETRIES[name]
    check(shape, channels_out, channels_last=len(name) % 2 == 0, **geometry)


@pytest.mark.compat
@pytest.mark.parametrize("channels", [(16, 24), (12, 20), (21, 21), (64, 8)], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel": 2, "stride": 2},
        {"kernel": 4, "stride": 2, "padding": 1},
        {"kernel": 8, "stride": 4, "padding": 2},
        {"kernel": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel": 8, "stride": 8},
    ],
    ids=lambda g: f"k{g['kernel']}s{g['stride']}",
)
def test_alignment_is_promised_and_kept(channels, geometry, poisoned_empty, checked_hints):
    # Half precision, as the widest accesses have the most to promise: 16 bytes are 8 channels.
    check((2, channels[0], 2, 3), channels[1], dtype=torch.float16, channels_last=True, **geometry)
    common = math.gcd(*channels, 16)
    assert checked_hints and max(checked_hints) >= common


@pytest.mark.compat
@pytest.mark.parametrize(
    "name",
    [
        "k2s2",
        "k2s2 21 classes",
        "k4s2p1",
        "k3s2p1 output_padding",
        "d2 s2: gcd 2, phases without taps",
        "groups k3",
    ],
)
def test_half_precision_accumulates_in_fp32(name, poisoned_empty):
    shape, channels_out, geometry = GEOMETRIES[name]
    check(shape, channels_out, dtype=torch.float16, **geometry)


def test_the_worked_example():
    # Four input pixels, a 1x1 kernel of weight 1 and bias 1 at stride 2: the pixels between are bias alone.
    input, one = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.ones(1, 1, 1, 1)
    expected = torch.tensor([[2.0, 1, 3, 1], [1, 1, 1, 1], [4, 1, 5, 1], [1, 1, 1, 1]])
    with segfast.backend("triton"):
        result = conv_transpose2d(input, one, one[0, 0, 0], stride=2, output_padding=1)
    assert torch.equal(result[0, 0], expected)


TILES = [
    Tile(16, 16, 16, 4, 2),
    Tile(32, 16, 32, 4, 3),
    Tile(16, 64, 16, 4, 2),
    Tile(128, 128, 64, 8, 3),
]


@pytest.mark.parametrize("tile", TILES, ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}")
@pytest.mark.parametrize(
    "name", ["k2s2 over a tile", "k4s2p1 whole tiles", "k3s2p1 output_padding", "groups k3", "k8s4p2"]
)
def test_every_tile_size_gives_the_same(name, tile, poisoned_empty):
    shape, channels_out, geometry = GEOMETRIES[name]
    with (
        override_tile("conv_transpose2d_forward", tile),
        override_tile("conv_transpose2d_grad_input", tile),
        override_tile("conv_transpose2d_grad_weight", tile),
    ):
        check(shape, channels_out, **geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("split", [2, 3, 16])
def test_split_depth_of_grad_weight(split, dtype, poisoned_empty):
    # 2 * 9 * 7 pixels are 8 steps of 16: 3 parts are uneven, and with 16 half of them have nothing to do.
    with override_tile("conv_transpose2d_grad_weight", Tile(16, 16, 16, 4, 2, split_k=split)):
        check((2, 5, 9, 7), 3, kernel=2, stride=2, dtype=dtype)
        check((2, 6, 9, 7), 4, kernel=3, stride=2, padding=1, groups=2, dtype=dtype)


def test_reruns_are_bitwise_equal():
    shape, channels_out, geometry = GEOMETRIES["k4s2p1"]
    with override_tile("conv_transpose2d_grad_weight", Tile(16, 16, 16, 4, 2, split_k=3)):
        first, second = (check(shape, channels_out, **geometry) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_phase_without_taps_still_writes_the_epilogue(poisoned_empty):
    # Dilation and stride 2: three of four output phases see no tap of the kernel.
    tensors = operands((1, 4, 3, 3), 3, kernel=3)
    fused = {"scale": draw(3), "shift": draw(3, seed=1), "residual": draw(1, 3, 9, 9)}
    with segfast.backend("triton"):
        y = check_fused(
            conv_transpose2d, F.conv_transpose2d, tensors | fused, activation="silu", stride=2, dilation=2
        )["output"]
    z = fused["scale"][:, None, None] * tensors["bias"][:, None, None] + fused["shift"][:, None, None]
    z = z + fused["residual"][0]
    assert torch.allclose(y[0, :, 1::2, :], F.silu(z)[:, 1::2, :], atol=1e-6)


_FAR_APART = textwrap.dedent("""
    import sys
    import torch
    import torch.nn.functional as F
    from segfast import kernels
    from tests.far_apart import same

    kernel, axis = int(sys.argv[1]), int(sys.argv[2])
    options = ((2, 2), (0, 0), (1, 1), 1)

    torch.manual_seed(0)
    last = {"memory_format": torch.channels_last}
    x = torch.randn(2, 4, 2, 3).half().contiguous(**last)
    w = torch.randn(4, 8, kernel, kernel).half().contiguous(**last)
    y = F.conv_transpose2d(x.double(), w.double(), stride=2).half()
    g, skip = (torch.randn(y.shape).half().contiguous(**last) for _ in "ab")

    def forward(x, residual, skip, out):
        kernels.conv_transpose2d_forward(
            x, w, None, None, None, residual, skip, out, *options[:3], 1, (0, 0), None, 0.0
        )

    def grad_input(g, out):
        kernels.conv_transpose2d_grad_input(g, w, out, *options)

    def grad_weight(x, g, out):
        kernels.conv_transpose2d_grad_weight(x, g, out, *options)

    assert torch.allclose(same(axis, forward, (x, torch.zeros_like(g), None), y)[0], y, atol=1e-2)
    same(axis, forward, (x, None, skip), torch.cat([skip, y], 1))
    same(axis, grad_input, (g,), x)
    same(axis, grad_weight, (x, g), w, spread=False)
    print("same")
""")


@pytest.mark.parametrize("axis", [0, 2], ids=["images", "rows"])
@pytest.mark.parametrize("kernel", [2, 3])
def test_offsets_past_two_to_the_31(kernel, axis):
    far_apart.run_script(_FAR_APART, kernel, axis)
