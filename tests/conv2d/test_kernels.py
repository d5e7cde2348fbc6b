"""The convolution kernels in Triton's interpreter, against fp64: each form of the dense and the zoned one."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import conv2d
from tests.conv2d.reference import (
    DENSE,
    DILATED,
    VECTORS,
    check_conv2d,
    launched,
    names,
    operands,
    pair,
    tiles,
)
from tests.fused_conv import REFERENCE_ACTIVATIONS, draw

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_empty", "checked_launches")]

# (N, C_in, H, W), C_out, and what differs from conv2d's defaults. Odd sizes; tiles of 16 of everything.
DENSE_GEOMETRIES = {
    "1x1": ((1, 1, 1, 1), 1, {"kernel": 1}),
    "1x1 of whole depths": ((2, 32, 3, 3), 5, {"kernel": 1}),
    "1x1 s2": ((2, 7, 5, 4), 3, {"kernel": 1, "stride": 2}),
    "1x3": ((1, 5, 4, 6), 3, {"kernel": (1, 3), "padding": (0, 1)}),
    "3x1 s(2, 1)": ((1, 16, 6, 3), 3, {"kernel": (3, 1), "stride": (2, 1), "padding": (1, 0)}),
    "2x2 inside": ((1, 6, 4, 5), 4, {"kernel": 2}),
    "2x2 s2 of one run, inside": ((1, 16, 4, 5), 17, {"kernel": 2, "stride": 2}),
    "2x2 p1": ((1, 3, 4, 3), 2, {"kernel": 2, "padding": 1}),
    "3x3, few channels": ((2, 5, 5, 4), 3, {"padding": 1}),
    "3x3, one run": ((1, 16, 4, 4), 5, {"padding": 1}),
    "3x3, no run": ((1, 18, 4, 5), 5, {"padding": 1, "dilation": (1, 2)}),
    "3x3, 21 classes": ((1, 21, 2, 3), 21, {"padding": 1}),
    "5x5 d2 s3": ((1, 4, 11, 9), 3, {"kernel": 5, "stride": 3, "padding": 3, "dilation": 2}),
    "7x7 s2 of RGB": ((1, 3, 7, 9), 5, {"kernel": 7, "stride": 2, "padding": 3}),
    "s(3, 2) d(1, 2)": ((1, 6, 7, 9), 4, {"stride": (3, 2), "padding": (1, 2), "dilation": (1, 2)}),
    "s2 leaves rows out": ((1, 4, 8, 7), 3, {"kernel": 2, "stride": 3}),
    "d2": ((1, 6, 6, 7), 4, {"padding": 2, "dilation": 2}),
    "kernel larger than the image": ((1, 3, 2, 1), 2, {"kernel": 5, "padding": 3}),
    "padding beyond the kernel": ((1, 3, 2, 3), 2, {"padding": 4}),
    "output of one pixel": ((2, 5, 3, 3), 2, {}),
    "groups": ((2, 6, 3, 4), 4, {"groups": 2, "padding": 1}),
    "groups of 16": ((1, 32, 4, 3), 34, {"groups": 2, "padding": 1}),
    "groups s2 d2": ((1, 9, 6, 5), 6, {"groups": 3, "stride": 2, "padding": 2, "dilation": 2}),
}

# The rate below half the image, above half, above all of it; taps on one side only; strides.
DILATED_GEOMETRIES = {
    "r2 of 5, below half": ((2, 17, 5, 5), 5, {"padding": 2, "dilation": 2}),
    "r3 of 5, above half": ((1, 16, 5, 5), 18, {"padding": 3, "dilation": 3}),
    "r9 of 5, only the middle": ((1, 20, 5, 4), 5, {"padding": 9, "dilation": 9}),
    "r(2, 9)": ((1, 16, 3, 6), 5, {"padding": (2, 9), "dilation": (2, 9)}),
    "5x5 r2": ((1, 16, 4, 5), 3, {"kernel": 5, "padding": 4, "dilation": 2}),
    "1x3 r4": ((2, 16, 2, 9), 5, {"kernel": (1, 3), "padding": (0, 4), "dilation": (1, 4)}),
    "2x2 r3": ((2, 16, 5, 4), 5, {"kernel": 2, "padding": 2, "dilation": 3}),
    "one pixel": ((2, 33, 1, 1), 5, {"padding": 6, "dilation": 6}),
    "two pixels of three images": ((3, 16, 2, 1), 5, {"padding": 1}),
    "no padding": ((1, 16, 4, 3), 5, {}),
    "s2 r3": ((1, 16, 7, 8), 5, {"stride": 2, "padding": 3, "dilation": 3}),
    "s(1, 3) r4": ((2, 16, 3, 9), 5, {"stride": (1, 3), "padding": 4, "dilation": 4}),
    "padding beyond the kernel": ((1, 16, 2, 3), 5, {"padding": 5}),
    "a 1x1 kernel with padding": ((1, 16, 3, 4), 5, {"kernel": 1, "padding": 3}),
    "padding of one side": ((1, 16, 4, 6), 5, {"padding": (0, 5), "dilation": (1, 3)}),
}
GEOMETRIES = DENSE_GEOMETRIES | {f"zones, {name}": case for name, case in DILATED_GEOMETRIES.items()}


def check(case, *, split=1, tile=(16, 16, 16), dtype=torch.float32, vectors=("bias",), activation=None):
    """Values and gradients; returns the launches."""
    shape, filters, options = case
    geometry = {name: value for name, value in options.items() if name != "kernel"}
    tensors = operands(
        shape,
        filters,
        options.get("kernel", 3),
        groups=options.get("groups", 1),
        vectors=[v for v in vectors if v != "residual"],
        dtype=dtype,
        channels_last=split % 2 == 1,
    )
    if "residual" in vectors:
        with torch.no_grad():
            size = F.conv2d(tensors["input"].float(), tensors["weight"].float(), **geometry).shape
        tensors["residual"] = draw(*size, dtype=dtype, seed=3, channels_last=True)
    with tiles(*tile, split), launched() as launches:
        check_conv2d(tensors, activation, **geometry)
    return launches


def test_the_geometries_take_every_form():
    forms = set()
    with tiles(), segfast.backend("triton"), segfast.kernels.record_launches() as recorded:
        for shape, filters, options in DENSE_GEOMETRIES.values():
            geometry = {name: value for name, value in options.items() if name != "kernel"}
            tensors = operands(shape, filters, options.get("kernel", 3), groups=options.get("groups", 1))
            conv2d(**tensors, **geometry)
    for launch, _ in recorded:
        if launch.kernel.__name__ == DENSE:
            c = launch.constants
            one_run = c["FOLD"] or c["CI"] % c["BLOCK_K"] == 0
            forms.add((c["FOLD"], one_run, c["INSIDE"]))
    assert forms == {(f, o, i) for f in (True, False) for o in (True, False) for i in (True, False)} - {
        (True, False, True),
        (True, False, False),
    }


@pytest.mark.parametrize("name", DENSE_GEOMETRIES)
def test_dense_values_and_gradients_are_torchs(name):
    check(DENSE_GEOMETRIES[name])


@pytest.fixture
def always_zones(monkeypatch):
    """Zones also where they save nothing, as on images small enough for the interpreter."""
    monkeypatch.setattr("segfast.kernels.conv2d.forward._WORTHWHILE", float("inf"))


@pytest.mark.compat
@pytest.mark.parametrize("name", DILATED_GEOMETRIES)
def test_zoned_values_and_gradients_are_torchs(name, always_zones):
    options = DILATED_GEOMETRIES[name][2]
    launches = check(DILATED_GEOMETRIES[name])
    assert names(launches)[0] == DILATED
    constants = launches[0].constants
    assert (constants["STRIDE_H"], constants["STRIDE_W"]) == pair(options.get("stride", 1))


@pytest.mark.parametrize(
    ("case", "split"),
    [
        (((2, 16, 3, 4), 16, {"padding": 2, "dilation": 2}), 3),
        (((1, 5, 4, 3), 17, {"kernel": 2, "padding": 2, "dilation": 2}), 1),
        (((1, 5, 3, 2), 20, {"padding": 3}), 1),  # the gradient's padding is negative
    ],
    ids=["3x3", "2x2", "more padding than reach"],
)
def test_grad_input_by_zones(case, split, always_zones):
    # Its depth are the filters: enough to fill a step.
    launches = [launch for launch in check(case, split=split) if launch.kernel.__name__ in (DILATED, DENSE)]
    assert (names(launches)[-1], launches[-1].constants["FLIP"]) == (DILATED, True)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", REFERENCE_ACTIVATIONS)
@pytest.mark.parametrize("name", ["s2 leaves rows out", "zones, two pixels of three images"])
def test_the_whole_epilogue(name, activation, always_zones):
    check(GEOMETRIES[name], vectors=(*VECTORS, "residual"), activation=activation)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("groups s2 d2", 2),
        ("3x3, few channels", 5),
        ("zones, r3 of 5, above half", 2),
        ("zones, r9 of 5, only the middle", 5),
    ],
)
def test_split_depth(name, split, always_zones):
    # 5 parts are more than there are steps.
    launches = check(GEOMETRIES[name], split=split, vectors=(*VECTORS, "residual"), activation="silu")
    assert "_conv2d_finish_kernel" in names(launches)
    assert all(
        launch.constants["ACTIVATION"] is None
        for launch in launches
        if launch.kernel.__name__ in (DENSE, DILATED)
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("3x3, one run", 3),
        ("7x7 s2 of RGB", 1),
        ("groups", 1),
        ("zones, r3 of 5, above half", 1),
        ("zones, s2 r3", 3),
    ],
)
def test_half_precision_accumulates_in_fp32(name, split, always_zones):
    check(GEOMETRIES[name], split=split, dtype=torch.float16, vectors=("bias", "scale"), activation="relu")


@pytest.mark.parametrize("tile", [(32, 16, 32), (128, 128, 64)], ids=str)
@pytest.mark.parametrize("name", ["3x3, 21 classes", "groups of 16", "zones, r3 of 5, above half"])
def test_every_tile_size_gives_the_same(name, tile, always_zones):
    check(GEOMETRIES[name], tile=tile)


def test_the_tiles_of_the_heuristic():
    for name in ("3x3, few channels", "zones, r3 of 5, above half"):
        shape, filters, options = GEOMETRIES[name]
        check_conv2d(operands(shape, filters), **options)


@pytest.mark.parametrize("split", [1, 2])
def test_a_zone_without_taps_still_writes_the_epilogue(split):
    # Padding beyond the kernel's reach: a border of pixels sees nothing of the image. As in FCN, whose first
    # layer pads by 100.
    tensors = operands((1, 16, 2, 1), 3, vectors=VECTORS)
    tensors["residual"] = draw(1, 3, 8, 7)
    with tiles(split=split), launched() as launches:
        y = check_conv2d(tensors, "silu", padding=4)["output"]
    assert names(launches)[0] == DILATED
    z = (tensors["scale"] * tensors["bias"] + tensors["shift"])[:, None, None] + tensors["residual"]
    border = torch.ones(8, 7, dtype=torch.bool)
    border[2:6, 2:5] = False
    torch.testing.assert_close(y[:, :, border], F.silu(z)[:, :, border], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("name", ["3x3, few channels", "zones, two pixels of three images"])
@pytest.mark.parametrize("expanded", ["pixels", "images", "all"])
def test_the_residual_may_be_expanded(name, expanded, split, always_zones):
    shape, filters, options = GEOMETRIES[name]
    tensors = operands(shape, filters)
    small = {
        "pixels": (shape[0], filters, 1, 1),
        "images": (1, filters, *shape[2:]),
        "all": (1, filters, 1, 1),
    }
    residual = draw(*small[expanded]).requires_grad_()
    with tiles(split=split), segfast.backend("triton"):
        wide = residual.expand(shape[0], filters, *shape[2:])
        y = conv2d(**tensors, **options, residual=wide, activation="relu")
    expected = F.relu(F.conv2d(**tensors, **options) + residual)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    g = draw(*y.shape)
    (ours,), (theirs,) = (torch.autograd.grad(t, residual, g) for t in (y, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_reruns_are_bitwise_equal(always_zones):
    for name in ("3x3, few channels", "zones, one pixel"):
        shape, filters, options = GEOMETRIES[name]
        results = []
        for _ in range(2):
            leaves = [t.requires_grad_() for t in operands(shape, filters).values()]
            with tiles(split=3), segfast.backend("triton"):
                y = conv2d(*leaves, **options)
                results.append([y, *torch.autograd.grad(y.sum(), leaves)])
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_an_infinity_in_the_image_reaches_only_its_taps(always_zones):
    # A masked tap must not multiply what lies there: 0 * inf is NaN.
    for name in ("3x3, one run", "7x7 s2 of RGB", "zones, r3 of 5, above half"):
        shape, filters, options = GEOMETRIES[name]
        geometry = {n: v for n, v in options.items() if n != "kernel"}
        tensors = operands(shape, filters, options.get("kernel", 3))
        tensors["input"][0, 1, 0, 0] = float("inf")
        with tiles(), segfast.backend("triton"):
            y = conv2d(**tensors, **geometry)
        expected = F.conv2d(**tensors, **geometry)
        assert torch.equal(y.isfinite(), expected.isfinite()) and not expected.isfinite().all()


def test_the_worked_example():
    # One channel, three taps in a row, two pixels apart: the middle, and what lies two to either side.
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0, 5.0]]]])
    w = torch.tensor([[[[1.0, 10.0, 100.0]]]])
    with segfast.backend("triton"):
        y = conv2d(x, w, padding=(0, 2), dilation=(1, 2))
    assert torch.equal(y, torch.tensor([[[[310.0, 420.0, 531.0, 42.0, 53.0]]]]))
