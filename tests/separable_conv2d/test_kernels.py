"""The depthwise and separable kernels in Triton's interpreter, against fp64."""

import pytest
import torch

import segfast
from segfast.functional import depthwise_conv2d, separable_conv2d
from segfast.kernels import _launch, _tiles, record_launches
from tests.fused_conv import REFERENCE_ACTIVATIONS, check_layer, draw
from tests.separable_conv2d.reference import (
    VECTORS,
    check_depthwise,
    check_separable,
    define_separable,
    depthwise_operands,
    in_form,
    plain_depthwise,
    separable_operands,
    tiles,
)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("poisoned_empty", "checked_launches", "small_tiles"),
]


# (N, C, H, W), filters a channel, and what differs from a 3x3 kernel with conv2d's defaults. No tile full.
GEOMETRIES = {
    "k1": ((2, 5, 3, 2), 1, {"kernel": 1}),
    "k1 s2 p1": ((1, 3, 3, 4), 1, {"kernel": 1, "stride": 2, "padding": 1}),
    "k2": ((1, 4, 4, 3), 1, {"kernel": 2}),
    "k2 s2 p1": ((1, 4, 5, 4), 1, {"kernel": 2, "stride": 2, "padding": 1}),
    "k3": ((2, 5, 4, 5), 1, {}),
    "k3 p1": ((2, 5, 4, 3), 1, {"padding": 1}),
    "k3 p5: larger than the kernel": ((1, 3, 2, 3), 1, {"padding": 5}),
    "k3 p(0,4)": ((1, 3, 4, 2), 1, {"padding": (0, 4)}),
    "k3 s2 p1 odd": ((2, 5, 5, 7), 1, {"stride": 2, "padding": 1}),
    "k3 s2 p1 even": ((1, 5, 6, 4), 1, {"stride": 2, "padding": 1}),
    "k3 s2 p4: larger than the kernel": ((1, 3, 3, 4), 1, {"stride": 2, "padding": 4}),
    "k3 s(1,2)": ((1, 4, 4, 5), 1, {"stride": (1, 2), "padding": 1}),
    "k3 s(2,1)": ((1, 4, 5, 4), 1, {"stride": (2, 1), "padding": (1, 0)}),
    "k3 s3": ((1, 4, 7, 8), 1, {"stride": 3, "padding": 1}),
    "k3 d2": ((1, 5, 5, 6), 1, {"padding": 2, "dilation": 2}),
    "k3 d3": ((1, 3, 7, 7), 1, {"dilation": 3}),
    "k3 d(4,1): more residues than rows": ((1, 3, 3, 4), 1, {"padding": (4, 1), "dilation": (4, 1)}),
    "k3 s2 d2": ((1, 4, 7, 6), 1, {"stride": 2, "padding": 2, "dilation": 2}),
    "k3 s2 d3: coprime": ((1, 3, 7, 8), 1, {"stride": 2, "padding": 2, "dilation": 3}),
    "k3 s(2,1) d(1,2)": ((1, 4, 5, 6), 1, {"stride": (2, 1), "padding": 1, "dilation": (1, 2)}),
    "k3 s(1,2) d(2,1)": ((1, 4, 6, 5), 1, {"stride": (1, 2), "padding": 1, "dilation": (2, 1)}),
    "k3 s(2,1) d(2,1)": ((1, 4, 6, 4), 1, {"stride": (2, 1), "padding": (2, 1), "dilation": (2, 1)}),
    "k4": ((1, 3, 5, 4), 1, {"kernel": 4, "padding": 1}),
    "k4 s2 p1": ((1, 3, 6, 5), 1, {"kernel": 4, "stride": 2, "padding": 1}),
    "k(3,5)": ((1, 4, 4, 5), 1, {"kernel": (3, 5), "padding": (1, 2)}),
    "k(4,3) s(2,1)": ((1, 3, 6, 4), 1, {"kernel": (4, 3), "stride": (2, 1), "padding": (1, 0)}),
    "k(7,1) s(1,2)": ((1, 3, 5, 3), 1, {"kernel": (7, 1), "stride": (1, 2), "padding": (3, 0)}),
    "k5 p2": ((1, 5, 4, 5), 1, {"kernel": 5, "padding": 2}),
    "k5 s2 p2": ((1, 4, 5, 6), 1, {"kernel": 5, "stride": 2, "padding": 2}),
    "k5 d2": ((1, 2, 5, 6), 1, {"kernel": 5, "padding": 4, "dilation": 2}),
    "k7 p3": ((1, 3, 4, 5), 1, {"kernel": 7, "padding": 3}),
    "k7 s2 p3": ((1, 3, 5, 4), 1, {"kernel": 7, "stride": 2, "padding": 3}),
    "k9: tap by tap": ((1, 2, 3, 2), 1, {"kernel": 9, "padding": 4}),
    "k(2,8): tap by tap": ((1, 2, 3, 5), 1, {"kernel": (2, 8), "padding": (1, 3)}),
    "two filters a channel": ((2, 4, 4, 3), 2, {"padding": 1}),
    "three filters, s2 d2": ((1, 3, 5, 6), 3, {"stride": 2, "padding": 1, "dilation": 2}),
    "three filters of one channel": ((2, 1, 4, 3), 3, {"padding": 1}),
    "one channel": ((2, 1, 4, 3), 1, {"padding": 1}),
    "one channel s2": ((1, 1, 5, 4), 1, {"stride": 2, "padding": 1}),
    "33 channels": ((1, 33, 3, 2), 1, {"padding": 1}),
    "33 channels, two filters": ((1, 33, 2, 2), 2, {"padding": 1}),
    "image smaller than the kernel, s2": ((1, 3, 2, 1), 1, {"kernel": 7, "stride": 2, "padding": 3}),
    "images of a pixel": ((3, 4, 1, 1), 1, {"padding": 1}),
    "an output of a pixel": ((2, 4, 3, 3), 1, {}),
}


def operands(name, **options):
    shape, multiplier, geometry = GEOMETRIES[name]
    geometry = dict(geometry)
    return depthwise_operands(shape, multiplier, geometry.pop("kernel", 3), **options), geometry


@pytest.mark.parametrize("name", GEOMETRIES)
def test_values_and_gradients_are_torchs(name):
    tensors, geometry = operands(name, channels_last=len(name) % 3 > 0)
    check_depthwise(tensors, **geometry)


@pytest.mark.parametrize("name", ["k3 p1", "k3 s2 p1 odd", "k5 p2", "k3 s2 d2"])
def test_the_tiles_of_the_heuristic(name, monkeypatch):
    tensors, geometry = operands(name)
    with monkeypatch.context() as patch:
        patch.setattr(_tiles, "_overrides", {})
        _launch.forget_launches()
        check_depthwise(tensors, **geometry)


HALF = ["k3 p1", "k3 s2 p1 odd", "k3 d2", "k5 s2 p2", "three filters, s2 d2"]


@pytest.mark.compat
@pytest.mark.parametrize("name", HALF)
def test_half_precision_accumulates_in_fp32(name):
    tensors, geometry = operands(name, vectors=VECTORS, dtype=torch.float16)
    check_depthwise(tensors, activation="silu", **geometry)


@pytest.mark.parametrize("activation", [a for a in REFERENCE_ACTIVATIONS if a])
def test_every_activation_with_a_full_epilogue(activation):
    check_depthwise(depthwise_operands((1, 3, 3, 2), vectors=VECTORS), activation=activation, padding=1)


@pytest.mark.parametrize("vectors", [(), ("scale",), ("shift",), ("bias", "shift"), ("scale", "shift")])
def test_any_selection_of_vectors(vectors):
    tensors, geometry = operands("k3 p1", vectors=vectors)
    check_depthwise(tensors, activation="gelu", **geometry)


def test_the_worked_example():
    # Ones all round: each pixel counts its neighbors, itself included; twice that in the second channel.
    image, weight = torch.ones(1, 2, 3, 3), torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 3, 3)
    with segfast.backend("triton"):
        y = depthwise_conv2d(image, weight, padding=1)
        row = separable_conv2d(image, weight, torch.tensor([[1.0, 10.0]])[..., None, None], padding=1)
    counts = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
    assert torch.equal(y[0], torch.stack([counts, 2 * counts]))
    assert torch.equal(row[0, 0], 21 * counts)


@pytest.mark.parametrize("tile", [(2, 4, 4, 3), (16, 32, 16, 256)], ids=str)
@pytest.mark.parametrize(
    ("shape", "multiplier", "geometry"),
    [
        ((2, 5, 3, 5), 1, {"padding": 1}),
        ((1, 5, 5, 9), 1, {"stride": 2, "padding": 1}),
        ((1, 5, 5, 5), 1, {"padding": 2, "dilation": 2}),
        ((1, 5, 3, 5), 1, {"kernel": 5, "padding": 2}),
        ((1, 5, 5, 9), 1, {"stride": 2, "padding": 2, "dilation": 2}),
        ((1, 3, 3, 5), 2, {"stride": (1, 2), "padding": 1}),
    ],
    ids=["k3", "k3 s2", "k3 d2", "k5", "k3 s2 d2", "two filters"],
)
def test_every_tile_size_gives_the_same(shape, multiplier, geometry, tile):
    geometry = dict(geometry)
    tensors = depthwise_operands(shape, multiplier, geometry.pop("kernel", 3))
    with tiles(*tile):
        check_depthwise(tensors, **geometry)


def test_small_tiles_are_many_programs():
    # The test above is about something: rows, columns and channels are cut, and the weight's sums too.
    tensors, geometry = operands("k3 p1")
    with tiles(1, 4, 2, 3), record_launches() as launches, segfast.backend("triton"):
        leaves = [t.requires_grad_() for t in tensors.values()]
        depthwise_conv2d(*leaves, **geometry).sum().backward()
    grids = {launch.kernel.__name__: launch.grid for launch, _ in launches}
    assert grids["_depthwise_conv2d_rows_kernel"] == (2 * 4 * 2 * 2, 1, 1)
    assert grids["_depthwise_conv2d_grad_weight_rows_kernel"] == (2, 3, 1)
    assert "_depthwise_conv2d_grad_weight_reduce_kernel" in grids


# Two images each, so that one's sums cannot pass for the other's.
STATISTICS = {
    "k3 p1": ((2, 5, 3, 4), 1, {"padding": 1}),
    "k3 s2": ((2, 3, 6, 5), 1, {"stride": 2, "padding": 1}),
    "k3 d2": ((2, 2, 4, 3), 1, {"padding": 2, "dilation": 2}),
    "k5": ((2, 2, 3, 4), 1, {"kernel": 5, "padding": 2}),
    "k3 s2 d2": ((2, 3, 7, 6), 1, {"stride": 2, "padding": 2, "dilation": 2}),
    "two filters": ((2, 2, 3, 3), 2, {"padding": 1}),
}


def statistics(part):
    def ours(**arguments):
        return depthwise_conv2d(**arguments, return_statistics=True)[part]

    def definition(input, weight, bias=None, *, activation=None, **geometry):
        y = REFERENCE_ACTIVATIONS[activation](plain_depthwise(input, weight, bias, **geometry))
        y = y if y.dtype == torch.float64 else y.float()
        return y.sum((2, 3)) if part == 1 else y.square().sum((2, 3))

    return ours, definition


@pytest.mark.parametrize(
    ("name", "part"), [*[(name, 2) for name in STATISTICS], ("k3 p1", 1), ("k3 s2 d2", 1)], ids=str
)
def test_statistics_and_their_gradients(name, part):
    shape, multiplier, geometry = STATISTICS[name]
    geometry = dict(geometry)
    tensors = depthwise_operands(shape, multiplier, geometry.pop("kernel", 3))
    ours, definition = statistics(part)
    pixels = tensors["input"][0, 0].numel()
    depth = dict.fromkeys(("output", "input", "weight", "bias"), 9 * pixels)
    with tiles(2, 4, 4, 3), segfast.backend("triton"):
        result = check_layer(ours, definition, tensors, depth, activations={"activation": "silu"}, **geometry)
    assert result["output"].dtype == torch.float32


@pytest.mark.parametrize("name", ["k3 p1", "k3 s2 d2"])
def test_statistics_of_half_precision_are_fp32(name):
    tensors, geometry = operands(name, dtype=torch.float16)
    for part in (1, 2):
        ours, definition = statistics(part)
        with segfast.backend("triton"):
            check_layer(ours, definition, tensors, {}, activations={"activation": "relu"}, **geometry)


@pytest.mark.parametrize("name", ["k3 s2 p1 odd", "k3 d2", "k5 p2", "three filters, s2 d2"])
def test_the_result_is_the_same_with_and_without_statistics(name):
    # Also the machine code behind them: `checked_launches` holds each to its own.
    tensors, geometry = operands(name)
    with segfast.backend("triton"):
        for _ in range(2):
            plain = depthwise_conv2d(**tensors, **geometry, activation="relu")
            y, total, squares = depthwise_conv2d(
                **tensors, **geometry, activation="relu", return_statistics=True
            )
            assert torch.equal(y, plain) and y.stride() == plain.stride()
            torch.testing.assert_close(total, y.sum((2, 3)), atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(squares, y.square().sum((2, 3)), atol=1e-4, rtol=1e-5)


def test_gradients_of_the_result_and_its_statistics_add_up():
    tensors, geometry = operands("k3 s2 p1 odd", vectors=VECTORS)
    results = []
    for wide in (True, False):
        leaves = {n: (t.double() if wide else t.clone()).requires_grad_() for n, t in tensors.items()}
        with segfast.backend("aten" if wide else "triton"):
            y, total, squares = depthwise_conv2d(
                **leaves, **geometry, activation="relu6", return_statistics=True
            )
            loss = (y * draw(*y.shape, seed=5)).sum() + (total.sin() + squares.cos()).sum()
            loss.backward()
        results.append([leaf.grad for leaf in leaves.values()])
    for name, reference, actual in zip(tensors, *results, strict=True):
        torch.testing.assert_close(
            actual.double(), reference, atol=2e-5 * (1 + reference.abs().max().item()), rtol=1e-5, msg=name
        )


# (N, C, H, W), outputs, filters a channel, geometry, the result's height and width.
SEPARABLES = {
    "k3 p1": ((2, 5, 4, 3), 7, 1, {"padding": 1}, (4, 3)),
    "several tiles": ((1, 35, 5, 4), 21, 1, {"padding": 1}, (5, 4)),
    "s2": ((2, 6, 5, 4), 18, 1, {"stride": 2, "padding": 1}, (3, 2)),
    "d2": ((1, 4, 5, 6), 3, 1, {"padding": 2, "dilation": 2}, (5, 6)),
    "s(1,2) d(2,1), p larger than the kernel": (
        (1, 3, 5, 4), 4, 1, {"stride": (1, 2), "padding": (1, 4), "dilation": (2, 1)}, (3, 5)),
    "two filters": ((1, 9, 3, 4), 5, 2, {"padding": 1}, (3, 4)),
    "three filters, s2": ((2, 2, 4, 5), 4, 3, {"stride": 2}, (1, 2)),
    "k5": ((1, 3, 4, 3), 2, 1, {"kernel": 5, "padding": 2}, (4, 3)),
    "k(2,4)": ((1, 3, 3, 4), 2, 1, {"kernel": (2, 4), "padding": 1}, (4, 3)),
    "k1": ((2, 3, 2, 3), 4, 1, {"kernel": 1}, (2, 3)),
    "one channel": ((2, 1, 3, 3), 3, 1, {"padding": 1}, (3, 3)),
    "one output": ((2, 4, 3, 3), 1, 1, {"padding": 1}, (3, 3)),
    "images of a pixel": ((3, 4, 1, 1), 5, 1, {"padding": 1}, (1, 1)),
    "image smaller than the kernel": ((1, 3, 2, 1), 4, 1, {"kernel": 5, "padding": 2}, (2, 1)),
}  # fmt: skip


# Those whose backward is another: the values of all are held by the test below.
@pytest.mark.parametrize("form", ["fused", "two kernels"])
@pytest.mark.parametrize("name", ["k3 p1", "several tiles", "s2", "two filters", "one channel"])
def test_separable_values_and_gradients(form, name):
    shape, outputs, multiplier, geometry, size = SEPARABLES[name]
    geometry = dict(geometry)
    tensors = separable_operands(
        shape, outputs, multiplier, geometry.pop("kernel", 3), residual_shape=(shape[0], outputs, *size),
        channels_last=len(name) % 3 > 0,
    )  # fmt: skip
    with in_form(form):
        check_separable(tensors, "silu", "relu6", **geometry)


@pytest.mark.parametrize("name", SEPARABLES)
def test_the_values_of_both_forms(name):
    shape, outputs, multiplier, geometry, size = SEPARABLES[name]
    options = {"activation": "gelu", "depthwise_activation": "silu", **geometry}
    tensors = separable_operands(
        shape, outputs, multiplier, options.pop("kernel", 3), residual_shape=(shape[0], outputs, *size)
    )
    expected = define_separable(**{n: t.double() for n, t in tensors.items()}, **options)
    for form in ("fused", "two kernels"):
        with in_form(form), segfast.backend("triton"):
            y = separable_conv2d(**tensors, **options)
        torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["fused", "two kernels"])
@pytest.mark.parametrize("name", ["s2", "two filters"])
def test_separable_in_half_precision(name, form):
    shape, outputs, multiplier, geometry, size = SEPARABLES[name]
    tensors = separable_operands(
        shape, outputs, multiplier, dtype=torch.float16, residual_shape=(shape[0], outputs, *size)
    )
    with in_form(form):
        check_separable(tensors, "relu", "hardswish", **geometry)


@pytest.mark.parametrize("activation", REFERENCE_ACTIVATIONS)
def test_separable_with_every_activation(activation):
    tensors = separable_operands((1, 3, 3, 2), 3, residual_shape=(1, 3, 3, 2))
    # Two forms, and the halves of each activation's backward: kept results and computed ones.
    with in_form("fused" if activation in ("relu", "silu", "sigmoid", "hardswish") else "two kernels"):
        check_separable(tensors, activation, activation, padding=1)


@pytest.mark.parametrize("form", ["fused", "two kernels"])
@pytest.mark.parametrize(
    "vectors",
    [(), ("bias",), ("depthwise_bias",), ("depthwise_scale", "shift"), ("depthwise_shift", "scale")],
    ids="+".join,
)
def test_separable_with_any_selection_of_vectors(vectors, form):
    tensors = separable_operands((1, 4, 3, 2), 3, vectors=vectors)
    with in_form(form):
        check_separable(tensors, "leaky_relu", None, padding=1)


@pytest.mark.parametrize("tile", [(16, 32, 32), (32, 16, 64), (64, 64, 16)], ids=str)
def test_separable_tiles_give_the_same(tile):
    tensors = separable_operands((2, 35, 3, 4), 37, residual_shape=(2, 37, 3, 4))
    expected = define_separable(**tensors, padding=1, activation="relu", depthwise_activation="relu6")
    for form in ("fused", "two kernels"):
        with in_form(form, *tile), segfast.backend("triton"):
            y = separable_conv2d(**tensors, padding=1, activation="relu", depthwise_activation="relu6")
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)


def test_each_form_is_what_it_says():
    tensors = separable_operands((1, 4, 3, 3), 3)
    for form, kernels in (
        ("fused", ["_separable_conv2d_fused_kernel"]),
        ("two kernels", ["_depthwise_conv2d_rows_kernel", "_conv2d_dense_kernel"]),
    ):
        with in_form(form), record_launches() as launches, segfast.backend("triton"), torch.no_grad():
            separable_conv2d(**tensors)
        assert [launch.kernel.__name__ for launch, _ in launches] == kernels


def test_two_runs_are_equal_to_the_last_bit():
    depthwise = depthwise_operands((1, 3, 5, 5), vectors=VECTORS)
    separable = separable_operands((1, 3, 3, 3), 4)
    with tiles(2, 4, 4, 5):
        for check, tensors in ((check_depthwise, depthwise), (check_separable, separable)):
            first, second = (check(tensors, "silu", padding=1) for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_weights_gradient_needs_no_atomics_to_be_split():
    # Each part is summed by itself; adding parts in another number moves roundings only.
    tensors = depthwise_operands((2, 3, 4, 3))
    results = []
    for parts in (1, 2, 7):
        with tiles(2, 4, 4, parts):
            results.append(check_depthwise(tensors)["weight"])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


def test_special_values_pass_as_torch_lets_them():
    specials = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 1e30, -1e30]
    x = torch.tensor(specials)[None, None, None]
    one = torch.ones(1, 1, 1, 1)
    for activation, reference in REFERENCE_ACTIVATIONS.items():
        options = {"activation": activation, "negative_slope": 0.2}
        with segfast.backend("triton"):
            y = depthwise_conv2d(x, one, **options)
        expected = reference(x.double()).float()
        torch.testing.assert_close(y, expected, equal_nan=True, atol=1e-6, rtol=3e-7, msg=activation)


def test_a_nan_stays_where_it_is():
    # Masked pixels are zeros, not what lies in memory; a NaN reaches the pixels around it, and no others.
    x = draw(2, 3, 5, 5, channels_last=True)
    x[1, 2, 0, 4] = float("nan")
    with segfast.backend("triton"):
        y, total, _ = depthwise_conv2d(x, draw(3, 1, 3, 3), padding=1, return_statistics=True)
    hit = torch.zeros(2, 3, 5, 5, dtype=torch.bool)
    hit[1, 2, :2, 3:] = True
    assert torch.equal(y.isnan(), hit)
    assert torch.equal(total.isnan(), hit.any(-1).any(-1))
