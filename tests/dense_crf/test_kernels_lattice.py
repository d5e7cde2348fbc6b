"""The permutohedral lattice's kernels in Triton's interpreter, against the lattice of the CPU."""

import pytest
import torch

from segfast.kernels import Tile, override_tile, separate_launches
from segfast.kernels._launch import record_launches
from segfast.kernels.dense_crf import (
    build_permutohedral,
    lattice_build,
    permutohedral_blur,
    permutohedral_slice,
)
from segfast.ops.dense_crf.lattice import Lattice, LatticeFilter

pytestmark = pytest.mark.interpreter


def features(points, dim, scale=1.0, seed=0):
    return torch.randn(points, dim, generator=torch.Generator().manual_seed(seed)) * scale


def inputs(points, channels, images=1):
    generator = torch.Generator().manual_seed(points + channels)
    values = torch.rand(images, points, channels, generator=generator)
    before, after = torch.rand(2, images, points, generator=generator) + 0.5
    return values, before, after


def filtered(lattice, values, before=None, after=None, reverse=False):
    return permutohedral_slice(lattice, permutohedral_blur(lattice, values, before, reverse), after)


def alpha(dim):
    return 1 / (1 + 2.0**-dim)


def check(actual, expected):
    """Sums of positive numbers in another order."""
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-7)


def check_vertices(lattice, expected):
    """One image's: rows, weights and neighbors are the very numbers, and every contribution is listed."""
    vertices, dim = expected.vertices, expected.dim
    assert lattice.count.tolist() == [vertices] and lattice.capacity >= vertices
    assert torch.equal(lattice.vertex.flatten().long(), expected.slice.rows.long())
    assert torch.equal(lattice.weights[0], expected.weights * alpha(dim))
    for ours, bags in zip(lattice.neighbors, expected.blurs, strict=True):
        rows = bags.rows.view(-1, 3)[:vertices, 1:].long()
        assert torch.equal(ours[:vertices].long(), rows.masked_fill(rows == vertices, -1))
    assert torch.equal(lattice.row, lattice.vertex.flatten()[expected.order])
    assert torch.equal(lattice.point.long(), expected.splat.rows.long())
    assert torch.equal(lattice.share, expected.weights.flatten()[expected.order])
    first = torch.searchsorted(lattice.row, torch.arange(vertices, dtype=torch.int32))
    assert torch.equal(lattice.first[:vertices].long(), first)


@pytest.mark.parametrize(
    ("dim", "points", "scale"),
    [(1, 300, 3.0), (2, 300, 2.0), (3, 130, 0.3), (4, 60, 30.0), (5, 300, 0.7), (6, 40, 1.0), (7, 40, 0.1),
     (8, 90, 0.5)],
)  # fmt: skip
def test_vertices_weights_and_neighbors_are_the_cpus(dim, points, scale, poisoned_empty):
    x = features(points, dim, scale)
    check_vertices(build_permutohedral(x[None]), Lattice(x))


def test_ties_are_the_cpus(poisoned_empty):
    # A grid of halves and quarters: equal remainders, and coordinates half-way between two vertices.
    x = torch.cartesian_prod(torch.arange(-4, 5) / 4, torch.arange(-3, 4) / 2, torch.arange(3.0))
    scales = torch.tensor(lattice_build._scales(3))
    for grid in (x, x * 4 / scales):
        check_vertices(build_permutohedral(grid[None]), Lattice(grid))


@pytest.mark.compat
@pytest.mark.parametrize(
    ("dim", "points", "channels"),
    [(1, 200, 1), (2, 300, 21), (3, 70, 2), (5, 200, 5), (5, 30, 33), (8, 40, 3)],
)
def test_filter_and_its_transpose_are_the_cpus(dim, points, channels, checked_addresses, poisoned_empty):
    x = features(points, dim, 0.8)
    values, before, after = inputs(points, channels)
    lattice, expected = build_permutohedral(x[None]), Lattice(x)
    check(filtered(lattice, values)[0], LatticeFilter(expected)(values[0]))
    scaled = LatticeFilter(expected, before[0], after[0])
    check(filtered(lattice, values, before, after)[0], scaled(values[0]))
    check(filtered(lattice, values, after, before, reverse=True)[0], scaled.transposed(values[0]))


@pytest.mark.parametrize(
    "tile",
    [Tile(32, 4, 1, 4, 1), Tile(64, 128, 1, 4, 1), Tile(16, 16, 1, 4, 1)],
    ids=lambda c: f"{c.block_m}x{c.block_n}",
)
def test_every_tile_gives_the_same(tile, checked_addresses, poisoned_empty):
    x = features(50, 2, 0.7)
    values, before, after = inputs(50, 21)
    lattice = build_permutohedral(x[None])
    with override_tile("permutohedral_filter", tile):
        actual = filtered(lattice, values, before, after)
    check(actual[0], LatticeFilter(Lattice(x), before[0], after[0])(values[0]))


@pytest.mark.parametrize("points", [1, 350])
def test_all_points_in_one_place(points, checked_addresses, poisoned_empty):
    # Each vertex receives from every point, and has contributions in many chunks.
    x = torch.full((points, 2), 0.3)
    values, before, _ = inputs(points, 3)
    lattice = build_permutohedral(x[None])
    assert lattice.count.tolist() == [3]
    check(filtered(lattice, values, before)[0], LatticeFilter(Lattice(x), before[0])(values[0]))


def test_points_far_apart_keep_to_themselves(poisoned_empty):
    x = 100 * torch.arange(50.0)[:, None] * torch.tensor([1.0, -2.0])
    values, _, _ = inputs(50, 2)
    lattice = build_permutohedral(x[None])
    assert lattice.count.tolist() == [150]
    check(filtered(lattice, values)[0], LatticeFilter(Lattice(x))(values[0]))


@pytest.fixture
def batch():
    return torch.stack([features(70, 3, 0.5, seed=1), features(70, 3, 2.0, seed=2) + 7])


def test_a_batch_is_its_images(batch, checked_launches, poisoned_empty):
    values, before, after = inputs(70, 5, images=2)
    together = build_permutohedral(batch)
    result = filtered(together, values, before, after)
    at = 0
    for i in range(2):
        alone = build_permutohedral(batch[i : i + 1])
        assert torch.equal(together.vertex[i] - at, alone.vertex[0])
        at += int(alone.count)
        assert torch.equal(
            result[i], filtered(alone, values[i : i + 1], before[i : i + 1], after[i : i + 1])[0]
        )
    assert together.count.tolist() == [at]


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e8])
def test_an_image_that_cannot_be_filtered_is_nan_and_the_other_is_not(
    value, batch, checked_addresses, poisoned_empty
):
    values, _, _ = inputs(70, 5, images=2)
    batch[1, 33, 1] = value
    result = filtered(build_permutohedral(batch), values)
    assert result[1].isnan().all()
    assert torch.equal(result[0], filtered(build_permutohedral(batch[:1]), values[:1])[0])


def test_more_cells_than_a_key_tells_apart_give_nan(checked_addresses, poisoned_empty):
    x = features(20, 8, 1e4)
    with pytest.raises(ValueError, match="lattice cells"):
        Lattice(x)
    lattice = build_permutohedral(x[None])
    values, _, _ = inputs(20, 2)
    assert filtered(lattice, values).isnan().all()
    assert (lattice.vertex >= 0).all() and (lattice.vertex < lattice.capacity).all()


def test_nothing_to_filter_is_an_empty_lattice_of_nan(poisoned_empty):
    x = torch.full((1, 5, 2), float("nan"))
    lattice = build_permutohedral(x)
    assert lattice.weights.isnan().all() and lattice.count.tolist() == [3]


def test_the_same_bits_every_time(batch, poisoned_empty):
    values, before, _ = inputs(70, 5, images=2)
    first = filtered(build_permutohedral(batch), values, before)
    assert torch.equal(first, filtered(build_permutohedral(batch), values, before))


def test_the_bound_on_vertices_serves_as_well(batch, monkeypatch, poisoned_empty):
    # As under CUDA-graph capture, where the number of vertices cannot be read back.
    values, before, after = inputs(70, 5, images=2)
    expected = filtered(build_permutohedral(batch), values, before, after)
    monkeypatch.setattr(lattice_build, "_room", lambda count, bound: bound)
    lattice = build_permutohedral(batch)
    assert lattice.capacity == batch.shape[0] * 70 * 4
    assert torch.equal(filtered(lattice, values, before, after), expected)


def test_out_is_written_and_few_programs_do_all_rows(monkeypatch, batch):
    from segfast.kernels.dense_crf import lattice_filter as filter_

    class One(int):
        """However many there are on each processor, one program."""

        def __rmul__(self, other):
            return 1

    monkeypatch.setattr(filter_, "processors", lambda device: One())
    values, _, _ = inputs(70, 5, images=2)
    lattice = build_permutohedral(batch)
    out = torch.full_like(values, float("nan"))
    with separate_launches():  # none of those that were made for more
        assert permutohedral_slice(lattice, permutohedral_blur(lattice, values), out=out) is out
    for i in range(2):
        check(out[i], LatticeFilter(Lattice(batch[i]))(values[i]))


@pytest.mark.parametrize("shape", [(1, 0, 2), (1, 4, 9), (2, 2**29, 2)])
def test_what_the_kernels_do_not_serve(shape):
    with pytest.raises(ValueError, match=r"features must be \[B, N, D\]"):
        build_permutohedral(torch.empty(shape, device="meta"))


def test_launches_are_recorded_of_tensors_without_data():
    with record_launches() as recorded:
        lattice = build_permutohedral(torch.empty(2, 300, 5, device="meta"))
        table = permutohedral_blur(lattice, torch.empty(2, 300, 21, device="meta"))
        permutohedral_slice(lattice, table)
    names = [launch.kernel.__name__.removeprefix("_permutohedral_") for launch, _ in recorded]
    built = ["bounds_kernel", "keys_kernel", "rows_kernel", "neighbors_kernel"]
    assert names == [*built, "splat_kernel", "join_kernel", *["blur_kernel"] * 6, "slice_kernel"]
