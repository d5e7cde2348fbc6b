"""Zones and the table of work, counted: no pixel left out, none twice, no tap for padding, none idle."""

import itertools
from collections import Counter

import pytest
import torch

from segfast import kernels
from segfast.kernels.conv2d import forward as forward_module
from segfast.kernels.conv2d._zones import FIELDS, executed_taps, pieces, useful_taps, work_table
from segfast.kernels.conv2d.dilated import branch_of
from tests.conv2d.reference import DENSE, DILATED, names

# (size, kernel, stride, padding, dilation) of an axis.
AXES = [
    (size, kernel, stride, padding, dilation)
    for size, kernel, stride, dilation in itertools.product((1, 2, 5, 8), (1, 2, 3, 5), (1, 2, 3), (1, 2, 7))
    for padding in {0, 1, dilation * (kernel - 1) // 2, dilation * kernel + 2}
    if size + 2 * padding > dilation * (kernel - 1)
]


def out_size(size, kernel, stride, padding, dilation):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def useful(axis):
    """For each result, the taps that meet a pixel: by trying them."""
    size, kernel, stride, padding, dilation = axis
    return [
        [k for k in range(kernel) if 0 <= o * stride - padding + k * dilation < size]
        for o in range(out_size(*axis))
    ]


def test_pieces_hold_every_result_once_and_its_taps_exactly():
    assert len(AXES) > 300
    for axis in AXES:
        size, kernel, stride, padding, dilation = axis
        found = pieces(size, out_size(*axis), kernel, stride, padding, dilation)
        taps = [list(range(p.first, p.first + p.taps)) for p in found for _ in range(p.length)]
        assert taps == useful(axis), axis
        assert [p.start for p in found[1:]] == [p.start + p.length for p in found[:-1]]
        assert found[0].start == 0 and len(found) <= 2 * kernel + 1


def test_pieces_of_a_gradient_whose_padding_is_negative():
    # The gradient of a convolution that pads more than its kernel reaches.
    assert pieces(9, 5, 3, 1, -2, 1) == [(0, 5, 0, 3)]
    assert [p[2:] for p in pieces(4, 5, 2, 1, -1, 1)] == [(0, 2), (0, 1), (0, 0)]


def aspp(batch, side, rate):
    return branch_of((side, side), (side, side), (3, 3), (1, 1), (rate, rate), (rate, rate))


# Of the taps that nine for every pixel would be: what tiles of 128 pixels execute, and what is useful.
TABLE = {
    (8, 33): {6: (0.80, 0.77), 12: (0.60, 0.57), 18: (0.43, 0.41)},
    (8, 65): {12: (0.78, 0.77), 24: (0.58, 0.57), 36: (0.40, 0.40)},
    (1, 33): {6: (0.99, 0.77), 12: (0.85, 0.57), 18: (0.54, 0.41)},
}


@pytest.mark.parametrize(("batch", "side"), TABLE)
def test_the_shares_of_deeplabs_aspps(batch, side):
    for rate, shares in TABLE[batch, side].items():
        branch, all_taps = aspp(batch, side, rate), 9 * batch * side * side
        found = executed_taps(branch, batch, 128) / all_taps, useful_taps(branch, batch) / all_taps
        assert found == pytest.approx(shares, abs=0.01), rate
        # A pixel's row has one tap that always meets, and one to each side for size - rate pixels.
        assert useful_taps(branch, batch) == batch * (side + 2 * (side - rate)) ** 2
        assert executed_taps(branch, batch, 1) == useful_taps(branch, batch)


def items_of(rows):
    """The rows of a table by name."""
    fields = ["branch", "tile", "n", "part", "first", "last", "h", "h_length", "w", "w_length"]
    fields += ["first_h", "first_w", "taps_w"]
    fields += [f"{what}_{side}" for what in ("kernel", "pad", "dilation") for side in "hw"]
    assert len(fields) == FIELDS
    assert all(len(row) == FIELDS for row in rows)
    return [dict(zip(fields, row, strict=True)) for row in rows]


@pytest.mark.parametrize("split", [1, 2, 5])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_the_table_computes_each_tap_of_each_pixel_once(stride, split):
    size, batch, block_m, blocks_k, tiles_n = (5, 6), 3, 4, 2, 2
    geometries = [((3, 3), (4, 4), (4, 4)), ((1, 1), (0, 0), (1, 1)), ((5, 2), (2, 7), (1, 3))]
    branches, sizes = [], []
    for kernel, padding, dilation in geometries:
        axes = list(zip(size, kernel, stride, padding, dilation, strict=True))
        sizes.append([out_size(*axis) for axis in axes])
        branches.append(branch_of(size, sizes[-1], kernel, stride, padding, dilation))
    rows, starts = work_table(branches, batch, blocks_k, tiles_n, block_m, split, 7)
    assert starts[0] == 0 and starts[-1] == len(rows) and starts == sorted(starts) and len(starts) == 8

    # As the kernel reads a row: which (branch, n, pixel, tap, block of channels) it multiplies, what it
    # writes.
    computed, written, executed = Counter(), Counter(), 0
    for item in items_of(rows):
        executed += block_m * (item["last"] - item["first"])
        for m in range(item["tile"] * block_m, (item["tile"] + 1) * block_m):
            if m >= batch * item["h_length"] * item["w_length"]:
                continue
            ow = item["w"] + m % item["w_length"]
            oh = item["h"] + m // item["w_length"] % item["h_length"]
            image = m // item["w_length"] // item["h_length"]
            where = (item["branch"], item["n"], image, oh, ow)
            written[where, item["part"]] += 1
            for step in range(item["first"], item["last"]):
                tap, block = divmod(step, blocks_k)
                tap_h, tap_w = item["first_h"] + tap // item["taps_w"], item["first_w"] + tap % item["taps_w"]
                computed[where, tap_h, tap_w, block] += 1
    expected = Counter()
    for index, (kernel, padding, dilation) in enumerate(geometries):
        axes = list(zip(size, kernel, stride, padding, dilation, strict=True))
        for oh, ow in itertools.product(*(range(n) for n in sizes[index])):
            for n, image in itertools.product(range(tiles_n), range(batch)):
                taps = itertools.product(useful(axes[0])[oh], useful(axes[1])[ow], range(blocks_k))
                for tap_h, tap_w, block in taps:
                    expected[(index, n, image, oh, ow), tap_h, tap_w, block] += 1
    assert computed == expected and set(computed.values()) == {1}
    pixels = sum(batch * h * w for h, w in sizes)
    assert len(written) == pixels * tiles_n * split and set(written.values()) == {1}
    assert executed == sum(executed_taps(b, batch, block_m) for b in branches) * blocks_k * tiles_n
    for item in items_of(rows):
        kernel, padding, dilation = geometries[item["branch"]]
        named = [
            item[f"{what}_{side}"] for what, side in itertools.product(("kernel", "pad", "dilation"), "hw")
        ]
        assert named == [*kernel, *padding, *dilation]


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(
    ("batch", "side", "rates"), [(8, 33, (6, 12, 18)), (8, 65, (12, 24, 36)), (1, 33, (6, 12, 18))]
)
def test_programs_have_as_much_to_do_as_each_other(batch, side, rates, split):
    pointwise = branch_of((side, side), (side, side), (1, 1), (1, 1), (0, 0), (1, 1))
    branches = [pointwise, *(aspp(batch, side, rate) for rate in rates)]
    block_m, blocks_k = 128 if batch > 1 else 64, 2048 // 64
    rows, starts = work_table(branches, batch, blocks_k, 1, block_m, split, 132)
    items = items_of(rows)
    steps = [item["last"] - item["first"] for item in items]
    assert sum(steps) * block_m == sum(executed_taps(b, batch, block_m) for b in branches) * blocks_k
    loads = [sum(steps[a:b]) for a, b in itertools.pairwise(starts)]
    mean = sum(loads) / len(loads)
    # The fullest program cannot have less than the dearest item, nor than the mean.
    assert max(loads) <= max(max(steps), 1.15 * mean)
    # Each has its dearest work first: what comes last fills the gaps.
    for a, b in itertools.pairwise(starts):
        assert steps[a:b] == sorted(steps[a:b], reverse=True)


def test_no_program_is_started_without_work():
    branch = aspp(1, 4, 2)
    rows, starts = work_table([branch], 1, 1, 1, 16, 1, 132)
    assert len(starts) == len(rows) + 1 == 4 + 1
    assert all(b - a == 1 for a, b in itertools.pairwise(starts))


LAST = {"device": "meta", "dtype": torch.float16}


def image(*shape):
    return torch.empty(shape, **LAST).to(memory_format=torch.channels_last)


def launches_of(batch, channels, filters, side, kernel, padding, dilation, *, stride=1, groups=1):
    """Names of the launches of the forward and the gradient of its input, on a GPU like an H200."""
    geometry = ((stride,) * 2, (padding,) * 2, (dilation,) * 2)
    x, w = image(batch, channels, side, side), image(filters, channels // groups, kernel, kernel)
    size = out_size(side, kernel, stride, padding, dilation)
    y = image(batch, filters, size, size)
    with kernels.pretend_architecture("sm_90"), kernels.record_launches() as forward:
        kernels.conv2d_forward((x,), w, None, None, None, None, y, *geometry, groups, None, 0.0)
    with kernels.pretend_architecture("sm_90"), kernels.record_launches() as backward:
        kernels.conv2d_grad_input(y, w, x, *geometry, groups)
    return [names(launch for launch, _ in recorded)[0] for recorded in (forward, backward)]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ((8, 2048, 256, 33, 3, 6, 6), DILATED),
        ((8, 2048, 256, 65, 3, 36, 36), DILATED),
        ((1, 2048, 256, 33, 3, 12, 12), DILATED),
        ((1, 2048, 256, 33, 3, 18, 18), DILATED),
        ((8, 64, 64, 570, 3, 0, 1), DENSE),
        ((8, 256, 256, 65, 3, 2, 2), DENSE),
        ((8, 512, 512, 64, 1, 0, 1), DENSE),
        ((8, 3, 64, 33, 7, 3, 1), DENSE),
    ],
    ids=str,
)
def test_zones_are_taken_where_they_pay(layer, expected):
    forward, backward = launches_of(*layer)
    assert forward == expected
    if layer[1] > 3:
        assert backward == expected


def test_groups_and_few_channels_have_no_zones():
    assert launches_of(8, 64, 64, 33, 3, 18, 18, groups=2) == [DENSE] * 2
    assert launches_of(8, 24, 24, 33, 3, 18, 18) == [DENSE] * 2


def test_zones_pay_compares_what_is_executed(monkeypatch):
    branch, pixels = aspp(8, 33, 18), 8 * 33 * 33
    dense = -(-pixels // 128) * 128 * 9
    share = executed_taps(branch, 8, 128) / dense
    for worthwhile, pays in ((share + 0.01, True), (share - 0.01, False)):
        monkeypatch.setattr(forward_module, "_WORTHWHILE", worthwhile)
        assert forward_module.zones_pay(branch, 8, pixels, 128) == pays
