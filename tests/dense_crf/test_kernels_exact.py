"""The exact Gaussian filter's kernels in Triton's interpreter, against fp64 over all pairs."""

import pytest
import torch

from segfast.kernels import record_launches
from segfast.kernels.dense_crf import (
    build_exact,
    exact_filter,
    exact_grad_features,
    exact_pack,
    exact_unpack,
)
from segfast.kernels.dense_crf import lists as lists_module
from segfast.kernels.dense_crf.lists import make_lists, make_units
from segfast.kernels.dense_crf.order import hilbert_keys
from segfast.kernels.dense_crf.sorted_points import gather_points

pytestmark = pytest.mark.interpreter

# Kernel values are rounded to half precision, by half a unit of their last place; the rest is the exponents'
# own rounding.
ROUNDING = 2**-11 + 1e-4


@pytest.fixture(autouse=True)
def unwritten_is_nan(poisoned_empty):
    return poisoned_empty


# Holds every access to the tensors of its launch; slow.
inside = pytest.mark.usefixtures("checked_addresses")


def points(batch, count, dim, spread=1.0, seed=0):
    return spread * torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed))


def values_for(features, channels, seed=1):
    shape = (*features.shape[:2], channels)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def kernel_matrix(features):
    # Differences: cdist's product would lose what far features have in common.
    wide = features.double()
    return (-(wide[:, :, None] - wide[:, None]).square().sum(3) / 2).exp()


def filtered(features, values, tolerance=0.0, **options):
    pairs = build_exact(features, tolerance, **options)
    return exact_unpack(pairs, exact_filter(pairs, exact_pack(pairs, values)), values.shape[2])


def photo(size=40, theta=(14.0, 13.0)):
    """Something like one: smooth colors, an edge, noise."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    colors = torch.stack([100 + 60 * torch.sin(x / 9), 90 + 50 * torch.cos(y / 7), 40 + 120.0 * (x > y)], 2)
    colors += 6 * torch.randn(colors.shape, generator=generator)
    places = torch.stack([x, y], 2) / theta[0]
    return torch.cat([places, colors / theta[1]], 2).reshape(1, -1, 5)


@inside
@pytest.mark.parametrize(
    ("batch", "count", "dim", "channels", "spread"),
    [
        (1, 300, 5, 21, 1.0),
        (2, 130, 2, 5, 2.0),
        (1, 200, 3, 33, 0.3),
        (1, 129, 8, 2, 1.0),
        (1, 1, 5, 1, 1.0),
        (3, 64, 1, 17, 4.0),
        (1, 70, 5, 65, 1.0),
    ],
)
@pytest.mark.parametrize("bounded", [False, True])
def test_every_pair_counts_at_tolerance_zero(batch, count, dim, channels, spread, bounded):
    features = points(batch, count, dim, spread)
    values = values_for(features, channels)
    reference = kernel_matrix(features) @ values.double()
    actual = filtered(features, values, bounded=bounded)
    assert actual.shape == values.shape
    # Above 64 channels values are rounded as well.
    allowed = ROUNDING + (2**-11 if channels > 64 else 0)
    assert ((actual - reference).abs() <= allowed * reference).all()


@pytest.mark.compat
@inside
def test_features_that_outgrow_half_precision_take_the_direct_form():
    features = points(1, 200, 5)
    features[0, ::2, 3] += 900
    values = values_for(features, 4)
    reference = kernel_matrix(features) @ values.double()
    pairs = build_exact(features, 0.0)
    assert pairs.outgrown.item() == 1
    actual = exact_unpack(pairs, exact_filter(pairs, exact_pack(pairs, values)), 4)
    assert ((actual - reference).abs() <= ROUNDING * reference).all()
    assert build_exact(features / 20, 0.0).outgrown.item() == 0


def test_only_one_form_computes():
    pairs = build_exact(points(1, 200, 5), 0.0)
    packed = exact_pack(pairs, values_for(points(1, 200, 5), 4))
    # Which the direct form alone reads.
    broken = pairs._replace(g=torch.full_like(pairs.g, float("nan")))
    assert torch.equal(exact_filter(broken, packed), exact_filter(pairs, packed))


@pytest.mark.parametrize("tolerance", [0.3, 1e-2])
def test_no_point_loses_more_than_the_tolerance(tolerance):
    features = photo(theta=(5.0, 6.0))
    # Far from everything: the points that a bound on single pairs would not protect.
    features[0, ::97, 3] += 7 * torch.rand(
        features[0, ::97, 3].shape, generator=torch.Generator().manual_seed(1)
    )
    kernel = kernel_matrix(features)[0]
    pairs = build_exact(features, tolerance)
    kept = kept_pairs(pairs)[0]
    share = 1 - (kernel * kept).sum(1) / kernel.sum(1)
    assert share.max() <= tolerance
    assert kept.float().mean() < 0.9, "nothing was left out"
    # The filter computes what the lists say.
    ones = torch.ones(1, kernel.shape[0], 1)
    actual = exact_unpack(pairs, exact_filter(pairs, exact_pack(pairs, ones)), 1)[0, :, 0]
    reference = (kernel * kept).sum(1)
    assert ((actual - reference).abs() <= ROUNDING * reference).all()


@pytest.mark.parametrize(
    ("places", "is_sharp"),
    [
        ([0.0] * 128 + [3.0] * 128, True),
        ([0.0] * 128 + [3.5] * 512, True),
        # Wider balls than boxes, on the other side.
        ([0.0] * 128 + ([-40.0] + [-3.0] * 63) * 2, True),
        # Tiles whose points are far from their mean, which is near.
        ([0.0] * 128 + [5.0, -5.0] * 192 + [3.5] * 128, True),
        # One row of many loses more than the others.
        ([0.0] * 127 + [6.0] + [9.0] * 128, False),
    ],
)
def test_the_farthest_tiles_go_where_the_tolerance_just_allows_it(places, is_sharp):
    features = torch.tensor(places)[None, :, None]
    kernel = kernel_matrix(features)[0]
    far = features[0, :, 0] == places[-1]
    share = (kernel[:128, far].sum(1) / kernel[:128].sum(1)).max().item()
    order = torch.arange(len(places), dtype=torch.int32)[None]

    def kept(tolerance):
        """The column tiles of the first row tile."""
        lists, counts = make_lists(gather_points(features, order, len(places)), 1, len(places), tolerance)
        return set(lists[0, : counts[0]].tolist())

    tiles = set(range(len(places) // 64))
    assert kept(0.95 * share) == tiles
    if is_sharp:
        assert kept(1.05 * share) == tiles - set((far.nonzero().flatten() // 64).tolist())


def kept_pairs(pairs):
    """bool [B, N, N] in the points' own order, from the lists."""
    tiles = pairs.lists.shape[1]
    kept = torch.zeros(pairs.batch, tiles * 64, tiles * 64, dtype=torch.bool)
    for row_tile, (entries, count) in enumerate(zip(pairs.lists, pairs.counts.tolist(), strict=True)):
        image, row = divmod(row_tile, tiles // 2)
        for column in entries[:count].tolist():
            kept[image, row * 128 : (row + 1) * 128, column * 64 : (column + 1) * 64] = True
    place = pairs.rows.long() - pairs.rows.long().amin(1, keepdim=True)
    return torch.stack([k[p][:, p] for k, p in zip(kept, place, strict=True)])


def test_a_smaller_tolerance_leaves_out_less():
    features = photo(36, (5.0, 6.0))
    kept = [build_exact(features, tolerance).counts.sum().item() for tolerance in (0.3, 1e-4, 0.0)]
    assert kept == sorted(kept) and kept[0] < kept[-1]


def test_images_of_a_batch_do_not_meet():
    features = torch.cat([points(1, 150, 5), points(1, 150, 5, 3.0, seed=4)])
    values = values_for(features, 3)
    together = filtered(features, values, 1e-2)
    alone = [filtered(features[i : i + 1], values[i : i + 1], 1e-2) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))


def test_the_same_bits_every_time():
    features = photo(32)
    values = values_for(features, 4)
    assert torch.equal(filtered(features, values, 1e-2), filtered(features, values, 1e-2))


@pytest.fixture
def many_processors(monkeypatch):
    """As many units of work as on a GPU, which the interpreter is spared elsewhere."""
    monkeypatch.setattr(lists_module, "interpreting", lambda: False)


def test_long_lists_are_cut_and_added_up(monkeypatch, many_processors):
    features = photo(32)
    values = values_for(features, 4)
    whole = filtered(features, values)
    monkeypatch.setattr(lists_module, "_SHORTEST", 3)
    pairs = build_exact(features, 0.0)
    assert (pairs.cuts[2] > 2).all() and (pairs.units[3] >= 0).any()
    cut = exact_unpack(pairs, exact_filter(pairs, exact_pack(pairs, values)), 4)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("counts", [[1], [5, 700, 3, 3, 900, 64], [4000] * 30, list(range(1, 300))])
def test_work_units_cover_every_list_once(counts, many_processors):
    given = torch.tensor(counts, dtype=torch.int32)
    units, cuts = make_units(given)
    extra = lists_module.extra_units(given.device)
    seen = {tile: [] for tile in range(len(counts))}
    slots = []
    for tile, begin, end, slot in units.T.tolist():
        if tile >= 0:
            seen[tile].append((begin, end, slot))
            slots += [slot] if slot >= 0 else []
    for tile, parts in seen.items():
        begins, ends = [p[0] for p in parts], [p[1] for p in parts]
        assert begins[0] == 0 and ends[-1] == counts[tile] and begins[1:] == ends[:-1]
        assert (len(parts) == 1) == (parts[0][2] == -1)
    assert slots == list(range(len(slots)))
    assert len(slots) <= lists_module.most_slots(len(counts), max(counts), given.device)
    lengths = [end - begin for tile, begin, end, _ in units.T.tolist() if tile >= 0]
    assert max(lengths) <= max(lists_module._SHORTEST, -(-sum(counts) // extra))
    for tile, first, number in cuts.T.tolist():
        if number > 1:
            assert [p[2] for p in seen[tile]] == list(range(first, first + number))


def test_scales_and_factors_of_packing():
    features = points(2, 140, 3)
    values = values_for(features, 3) * torch.tensor([1e5, 1.0, 1e-6])
    before, after = values_for(features, 2).unbind(2)
    scale = values.abs().amax(1)
    pairs = build_exact(features, 0.0)
    packed = exact_pack(pairs, values, before.contiguous(), scale)
    assert packed.dtype == torch.float16
    assert packed[:, 3:8].eq(0).all() and packed[:, 11:].eq(0).all()
    assert packed[:, 8:11].abs().max() < 2**-10 * packed[:, :3].abs().max()
    assert packed.abs().sum(1).count_nonzero() <= 2 * 140
    both_halves = (packed[:, :3].float() + packed[:, 8:11].float())[pairs.rows.long()]
    torch.testing.assert_close(
        both_halves, before[..., None] * values / scale[:, None], rtol=2**-20, atol=2**-24
    )
    actual = exact_unpack(pairs, exact_filter(pairs, packed), 3, after.contiguous(), scale)
    wide = before[..., None].double() * values.double()
    reference = after[..., None] * (kernel_matrix(features) @ wide)
    magnitude = after[..., None] * (kernel_matrix(features) @ (wide + scale[:, None] * 2**-14))
    assert ((actual - reference).abs() <= ROUNDING * magnitude).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_spoils_its_image_only(bad):
    features = points(2, 140, 5)
    features[1, 3, 2] = bad
    values = values_for(features, 3)
    for tolerance in (0.0, 1e-2):
        actual = filtered(features, values, tolerance)
        assert actual[0].isfinite().all() and actual[1].isnan().all()


def test_points_that_are_all_alike():
    features = torch.full((1, 200, 5), 3.0)
    values = values_for(features, 2)
    reference = values.double().sum(1, keepdim=True).expand_as(values)
    assert ((filtered(features, values, 1e-2) - reference).abs() <= ROUNDING * reference).all()


def test_the_curve_visits_neighbors_one_after_the_other():
    for dim, side in ((2, 16), (3, 8)):
        axes = [torch.arange(float(side))] * dim
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim).reshape(1, -1, dim)
        # A quarter is a cell's edge: each cell of this grid is one of the curve's.
        order = hilbert_keys(cells / 4)[0].argsort()
        steps = cells[0][order].diff(dim=0).abs().sum(1)
        assert (steps == 1).all()


@inside
@pytest.mark.parametrize(
    ("count", "dim", "channels", "spread"),
    [(200, 5, 5, 1.0), (130, 3, 70, 1.5), (130, 8, 3, 0.7), (140, 5, 3, 300.0)],
)
def test_gradient_of_the_features(count, dim, channels, spread):
    features = points(2, count, dim, min(spread, 2.0))
    if spread > 2.0:
        features[:, ::2, 1] += spread * 3
    values, grad = values_for(features, channels), 1e-4 * points(2, count, channels, seed=7)
    wide = features.double().requires_grad_()
    (kernel_matrix(wide).matmul(values.double()) * grad).sum().backward()
    pairs = build_exact(features, 0.0)
    assert pairs.outgrown.item() == (spread > 2.0)
    actual = exact_grad_features(pairs, grad, values)
    # What half precision costs is the same everywhere. On top of it, each place is the difference of two sums
    # of large terms that cancel: of features in two halves, each term rounded by 2**-22 of itself, and summed
    # in fp32 in the matrix product's own order, n terms by at most n * 2**-24 of their magnitudes' sum.
    allowed = 5e-4 * wide.grad.abs().max() + (2**-22 + count * 2**-24) * canceling(features, values, grad)
    assert ((actual - wide.grad).abs() <= allowed).all()


def canceling(features, values, grad):
    """The sum of the magnitudes of the terms of both sums that a feature's gradient is the difference of."""
    values, grad, centered = (
        values.double(),
        grad.double(),
        (features - features.mean(1, keepdim=True)).double(),
    )
    weights = kernel_matrix(features) * (grad @ values.mT + values @ grad.mT).abs()
    return weights @ centered.abs() + weights.sum(2, keepdim=True) * centered.abs()


def test_the_lists_integers_hold_their_tiles():
    for tiles, dtype in ((2**15 - 2, torch.int16), (2**15 + 2, torch.int32)):
        with record_launches():
            pairs = build_exact(torch.empty(1, 64 * tiles, 2, device="meta"), 1e-2, True)
        assert pairs.lists.dtype == dtype


def test_launches_of_a_filter():
    features = torch.empty(2, 1000, 5, device="meta")
    for bounded, forms in ((True, 1), (False, 2)):
        with record_launches():
            pairs = build_exact(features, 1e-2, bounded)
            packed = exact_pack(pairs, torch.empty(2, 1000, 21, device="meta"))
        with record_launches() as launches:
            exact_filter(pairs, packed)
        names = [launch.kernel.__name__ for launch, _ in launches]
        assert names == ["_gaussian_filter_kernel"] * forms + ["_add_partial_sums_kernel"]
