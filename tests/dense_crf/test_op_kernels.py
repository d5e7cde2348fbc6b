"""The dense CRF on our kernels, in Triton's interpreter, against PyTorch's operations in fp64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import segfast
from segfast.functional import gaussian_filter, mean_field
from segfast.kernels._launch import record_launches
from segfast.ops.dense_crf import backend, device

pytestmark = pytest.mark.interpreter

THETAS = {"theta_alpha": 6.0, "theta_beta": 45.0, "theta_gamma": (2.0, 1.5)}


def scene(labels=3, batch=2, size=(7, 9), dtype=torch.float32, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    unary = (2 * torch.rand(batch, labels, *size)).to(dtype).contiguous(memory_format=memory_format)
    return unary, torch.randint(256, (batch, 3, *size), dtype=torch.uint8)


def both(unary, image, **options):
    """Probabilities of our kernels and of PyTorch's operations, which sum in fp64.

    Not on the lattice: a grid's points lie between simplices, and rounding decides what vertices there are.
    """
    options = {**THETAS, "bilateral_weight": 2.0, "iterations": 2, "tolerance": 0.0, **options}
    with segfast.backend("triton"):
        actual = mean_field(unary, image, **options)
    wide = torch.float32 if options["method"] == "lattice" else torch.float64
    with segfast.backend("aten"):
        return actual, mean_field(unary.to(wide), None if image is None else image.to(wide), **options)


def check(actual, expected, tolerance=2e-4):
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("normalization", ["symmetric", "before", "after", None])
@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_mean_field_is_pytorchs(method, normalization, poisoned_empty):
    weights = (2.0, 0.5) if normalization else (0.3, 0.3)
    options = {"bilateral_weight": weights[0], "spatial_weight": weights[1], "normalization": normalization}
    actual, expected = both(*scene(), method=method, **options)
    check(actual, expected, 2e-4 if method == "exact" else 1e-5)
    assert (actual - mean_field(*scene(), iterations=0)).abs().max() > 0.05


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_compatibilities_and_strides(method, poisoned_empty):
    unary, image = scene(memory_format=torch.channels_last)
    matrix = torch.tensor([[-1.0, 0.2, 0.5], [0.1, -0.5, 0.3], [0.0, 0.4, -2.0]])
    options = {"compatibility": matrix, "bilateral_weight": torch.tensor([1.0, 0.5, 2.0])}
    actual, expected = both(unary, image, method=method, spatial_weight=torch.tensor(0.5), **options)
    check(actual, expected)
    assert actual.stride() == unary.stride()
    check(*both(unary[:, :, ::2, 1:], image[:, :, ::2, 1:], method=method, iterations=1, **options))


def test_weights_on_the_device_are_their_numbers(poisoned_empty):
    unary, image = scene(batch=1, size=(4, 5))
    weights = {"bilateral_weight": torch.tensor(2.0), "spatial_weight": torch.tensor(0.5)}
    actual, expected = both(unary, image, method="exact", iterations=1, **weights)
    check(actual, expected)
    # And not those of the call before.
    check(*both(unary, image, method="exact", iterations=1, spatial_weight=4.0))
    check(*both(unary, image, method="exact", iterations=1, spatial_weight=0.5))


def test_half_precision_unaries(poisoned_empty):
    actual, expected = both(*scene(dtype=torch.float16), method="exact", iterations=1)
    assert actual.dtype == torch.float16
    check(actual, expected, 1e-3)


def test_terms_that_are_left_out(poisoned_empty):
    unary, image = scene()
    for options in ({"bilateral_weight": 0.0}, {"spatial_weight": 0.0}, {"iterations": 0}):
        check(*both(unary, image, method="exact", **{"iterations": 1, **options}))
    check(*both(unary, None, method="exact"))
    check(*both(unary, image, method="exact", bilateral_weight=0.0, spatial_weight=0.0))


def test_more_labels_than_a_row_of_columns(poisoned_empty):
    check(*both(*scene(labels=17, batch=1, size=(4, 5)), method="exact", iterations=1))
    check(*both(*scene(labels=1, batch=1, size=(4, 5)), method="exact", iterations=1))


def test_factors_of_very_different_size_survive_half_precision(monkeypatch):
    # As if ten pixels had a million like them, and ten were few.
    before = torch.tensor([[1e-6] * 10 + [1.0] * 10])
    monkeypatch.setattr(device, "normalizers", lambda sums, normalization: (before, None))
    features = torch.zeros(1, 20, 2)
    features[:, 10:] = 50.0
    term = device._ExactTerm(features, "before", 1.0, 0.0, True, 2)
    unary = scene(labels=2, batch=1, size=(4, 5))[0]
    segfast.kernels.mean_field_update(unary, packed=term.packed)
    message = term.message(None)
    actual = message.values[message.index.long()][0, :, :2] * message.after[0, :, None]
    q = before[0, :, None] * torch.softmax(-unary.double(), 1).flatten(2)[0].T
    expected = torch.cat([part.sum(0, keepdim=True).expand(10, 2) for part in q.split(10)])
    torch.testing.assert_close(actual.double(), expected, atol=0, rtol=1e-3)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_it_is_deterministic_and_images_do_not_mix(method):
    unary, image = scene(size=(3, 5))
    with segfast.backend("triton"):
        whole, again, alone = (
            mean_field(u, i, method=method, iterations=1, **THETAS)
            for u, i in ((unary, image), (unary, image), (unary[1:], image[1:]))
        )
    assert torch.equal(whole, again)
    torch.testing.assert_close(whole[1:], alone, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_one_color_and_nan():
    unary, image = scene(batch=2, size=(5, 6))
    image = image.float()
    image[0], image[1, 0, 2, 3] = 100.0, float("nan")
    features = image.flatten(2).transpose(1, 2).contiguous() / 45
    for method in ("exact", "lattice"):
        options = (features, (5, 6), (2.0, 2.0), 1, 1.0, None, "symmetric", method, 1e-2)
        q = device.mean_field_kernels(unary, *options)
        assert q[0].isfinite().all() and q[1].isnan().any(), method


class Forbidden(TorchDispatchMode):
    """Fails where a tensor's values are looked at by the host: on a GPU that waits for all that was begun."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        assert name not in {"_local_scalar_dense", "nonzero", "_unique2", "masked_select"}, f"{name} waits"
        return func(*args, **(kwargs or {}))


def launches(method, iterations, unary, features):
    """Names of the kernels of a whole inference on tensors without data, which cannot be read back."""
    options = (features, unary.shape[2:], (2.0, 2.0), iterations, 1.0, 1.0, "symmetric", method, 1e-2, True)
    with record_launches() as recorded:
        output = device.mean_field_kernels(unary, *options)
    assert output.shape == unary.shape
    return [launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch, _ in recorded]


ITERATION = {
    "exact": ["gaussian_filter", "add_partial_sums", "spatial_gaussian", "spatial_gaussian"],
    # Splat, its join, six blurs of the five features; the same of the two places.
    "lattice": [
        f"permutohedral_{name}" for name in ["splat", "join", *["blur"] * 6, "splat", "join", *["blur"] * 3]
    ],
}


@pytest.mark.parametrize("method", ITERATION)
def test_launches_of_an_iteration(method):
    unary, features = torch.empty(2, 21, 32, 48, device="meta"), torch.empty(2, 32 * 48, 5, device="meta")
    counts = [launches(method, iterations, unary, features) for iterations in (1, 2, 3)]
    assert counts[1][: len(counts[0])] == counts[0]
    assert (
        counts[1][len(counts[0]) :]
        == counts[2][len(counts[1]) :]
        == [*ITERATION[method], "mean_field_update"]
    )
    assert counts[0].count("mean_field_update") == 2
    assert launches(method, 0, unary, features) == ["mean_field_update"]


@pytest.mark.parametrize("method", ITERATION)
def test_iterations_read_nothing_back(method):
    unary, image = scene(labels=2, batch=1, size=(4, 5))
    features = image.float().flatten(2).transpose(1, 2).contiguous() / 45
    if method == "exact":
        term = device._ExactTerm(features, "symmetric", 1.0, 1e-2, True, 2)
    else:
        term = device._LatticeTerm(features, "symmetric", 1.0)
    spatial = device._SpatialTerm((4, 5), (2.0, 2.0), "symmetric", 1.0, unary.device)
    with Forbidden():
        device.iterate(unary, [term, spatial], 2)
    with Forbidden(), pytest.raises(AssertionError, match="waits"):
        unary.sum().item()


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_the_allocations_of_an_iteration_do_not_grow(method, monkeypatch):
    unary, features = torch.empty(1, 3, 8, 8, device="meta"), torch.empty(1, 64, 5, device="meta")
    sizes = []
    empty, empty_like = torch.empty, torch.empty_like

    def counted(function):
        def run(*args, **kwargs):
            result = function(*args, **kwargs)
            sizes.append(result.numel())
            return result

        return run

    monkeypatch.setattr(torch, "empty", counted(empty))
    monkeypatch.setattr(torch, "empty_like", counted(empty_like))
    totals = []
    for iterations in (1, 2, 3):
        sizes.clear()
        launches(method, iterations, unary, features)
        totals.append(sum(sizes))
    assert totals[1] - totals[0] == totals[2] - totals[1]


def points(dim, channels=2, batch=2, count=40):
    torch.manual_seed(dim)
    return torch.randn(batch, channels, count), 1.5 * torch.rand(batch, dim, count)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_gaussian_filter_and_its_gradients(method, poisoned_empty):
    values, features = points(3)
    grad = torch.randn_like(values)

    def results(dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (values, features)]
        out = gaussian_filter(*inputs, method=method, normalization="symmetric", tolerance=0.0)
        return out, *torch.autograd.grad(out, inputs, grad.to(dtype))

    with segfast.backend("triton"):
        actual = results(torch.float32)
    with segfast.backend("aten"):
        expected = results(torch.float64 if method == "exact" else torch.float32)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs.double(), atol=1e-3 * theirs.abs().max().item(), rtol=0
        )


def test_many_channels_and_large_values(poisoned_empty):
    values, features = points(2, channels=258, batch=1, count=20)
    values *= torch.logspace(-20, 20, 258)[:, None]
    filters = device.feature_filters(features.transpose(1, 2), "exact", None, 0.0)
    rows = values.transpose(1, 2).contiguous()
    out = filters(rows)
    exact = segfast.ops.dense_crf.feature_filter(features[0].T.double(), "exact", None)
    expected, magnitude = exact(rows[0].double()), exact(rows[0].double().abs())
    assert ((out[0] - expected).abs() <= 5e-4 * magnitude.amax(0)).all()
    assert (filters(torch.zeros(1, 20, 2)) == 0).all()


@pytest.mark.parametrize("normalization", ["symmetric", "before", "after", None])
def test_the_grids_filter_and_its_transpose(normalization, poisoned_empty):
    size, theta = (5, 7), (1.5, 2.5)
    rows = torch.randn(2, 35, 3)
    ours = device.grid_filters(size, theta, "auto", normalization, rows)
    theirs = segfast.ops.dense_crf.grid_filter(size, theta, "exact", normalization, rows.double())
    inputs = rows.clone().requires_grad_(), rows.double().requires_grad_()
    outs = ours(inputs[0]), torch.stack([theirs(image) for image in inputs[1]])
    check(*outs, 1e-5)
    grad = torch.randn_like(rows)
    check(*(torch.autograd.grad(o, i, grad.to(o.dtype))[0] for o, i in zip(outs, inputs, strict=True)), 1e-5)
    assert ours.method == "exact"
    assert device.grid_filters(size, theta, "lattice", normalization, rows).method == "lattice"


def test_values_are_differentiated_twice_and_features_once():
    values, features = (t.transpose(1, 2).contiguous() for t in points(2, count=12))
    for method in ("exact", "lattice"):
        v, f = values.clone().requires_grad_(), features.clone().requires_grad_()
        out = device.feature_filters(features, method, None, 0.0)(v)
        (first,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), v)
        assert second.isfinite().all() and second.abs().max() > 0
        out = device.feature_filters(f, method, None, 0.0)(v)
        (first,) = torch.autograd.grad(out.square().sum(), f, create_graph=True)
        with pytest.raises(NotImplementedError, match="once"):
            first.sum().backward()


def test_backend_says_why_not():
    unary, image = scene(labels=257, batch=1, size=(1, 2))
    with segfast.backend("triton"):
        with pytest.raises(NotImplementedError, match="257 labels, the kernels take up to 256"):
            mean_field(unary, image)
        with pytest.raises(NotImplementedError, match="float64"):
            mean_field(unary[:, :2].double(), image)
        values, features = points(9)
        with pytest.raises(NotImplementedError, match="features of 9 dimensions"):
            gaussian_filter(values, features)
        explanations = segfast.explain(mean_field, unary[:, :2], image, iterations=1, method="exact")
    assert [str(d) for d in explanations] == ["mean_field: triton (asked for by name)"]
    assert not device.can_use_kernels("mean_field", unary[:, :2], 2, 5)


def test_auto_asks_for_proofs_alone(monkeypatch):
    from segfast.ops import _proofs
    from segfast.ops._choice import collect

    proven = {(name, torch.float32) for name in backend.OPERATIONS}
    monkeypatch.setattr(_proofs, "proven", lambda operation, dtype, device: (operation, dtype) in proven)
    tensor = torch.empty(1, 2, 3, 4)
    with collect() as collected:
        assert backend._unproven(tensor.dtype, tensor.device) is None
        assert "bfloat16 is not proven" in backend._unproven(torch.bfloat16, tensor.device)
        proven.remove(("permutohedral_filter", torch.float32))
        assert backend._unproven(tensor.dtype, tensor.device).startswith("permutohedral_filter in float32")
    # What `optimize` then proves.
    assert collected.unproven == {("dense_crf", torch.float32), ("dense_crf", torch.bfloat16)}


def test_the_modeled_pairs():
    choose = backend.choose_kernels_method
    assert [choose(m, 10**9) for m in ("exact", "lattice")] == ["exact", "lattice"]
    with pytest.raises(ValueError, match="method must be one of"):
        choose("fast", 10)
    # Of unknown features every pair may count.
    assert choose("auto", 141_000) == "exact" and choose("auto", 142_000) == "lattice"
    measured = {
        (49, 3, 321): 0.104,
        (80, 13, 321): 0.353,
        (67, 3, 512): 0.055,
        (80, 13, 512): 0.192,
        (80, 13, 1024): 0.062,
    }
    for (alpha, beta, side), share in measured.items():
        thetas = ((alpha, alpha), (beta, beta, beta))
        modeled = backend.kept_share(side**2, *thetas)
        assert 0.7 < modeled / share < 1.4
        assert choose("auto", side**2, thetas) == ("lattice" if side == 1024 else "exact")
        unit = ((alpha, alpha), (beta / 255, beta / 255, beta / 255))
        assert math.isclose(backend.kept_share(side**2, *unit), modeled) or beta > 254
    assert choose("auto", 512**2, ((160.0, 160.0), (20.0,) * 3)) == "lattice"
    assert 0 < backend.kept_share(1, (1.0, 1.0), (1e6,)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_proofs_hold_in_the_interpreter(dtype, poisoned_empty):
    from segfast.ops._prove import judge
    from segfast.ops.dense_crf.cases import Grid, Points, Skipping, Update

    small = [
        Points("small", "", {"dim": 3, "points": 70, "channels": 3, "spread": 4.0}),
        Skipping("skipping", "", {"tolerance": 1e-2, "points": 300}),
        Grid("grid", "", {"size": (5, 9), "channels": 2, "theta": (2.0, 1.0)}),
        Update("", "", {"labels": 2}),
    ]
    items = [item for case in small for item in case.proofs(torch.device("cpu"), dtype)]
    assert {item.operation for item in items} == set(backend.OPERATIONS)
    for item in items:
        assert item.actual().shape == item.reference.shape == item.aten.shape
        error, allowed = judge(item)
        assert error <= allowed, f"{item.operation} {item.case}: {error} > {allowed}"
        # Nothing that is wrong by a hundredth of the largest would pass.
        assert allowed < 2e-2 * item.reference.abs().max(), item.case
