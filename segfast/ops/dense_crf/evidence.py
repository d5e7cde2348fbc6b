"""The cases that prove the dense CRF's kernels right on a GPU."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._case import Proof as Evidence
from .._operands import load_kernels
from .device_filters import feature_filters, grid_factors
from .exact import SeparableFilter
from .filters import normalizers
from .inference import apply_compatibility
from .lattice import Lattice, LatticeFilter

# Features: dimensions, points of each of two images, channels, how far the features spread. The last outgrow
# half precision, in which the exponents of nearer ones are summed.
_POINTS = {
    "2-D": (2, 500, 21, 4.0),
    "3-D": (3, 333, 2, 5.0),
    "5-D": (5, 700, 33, 6.0),
    "8-D": (8, 140, 40, 3.0),
    "5-D far apart": (5, 260, 5, 400.0),
}
# Images: height, width, channels, theta.
_GRIDS = {
    "narrow": ((37, 70), 21, (3.0, 1.5)),
    "wide": ((65, 129), 2, (40.0, 80.0)),
    "one row": ((1, 257), 5, (0.3, 3.0)),
}
_LABELS = (1, 2, 21, 150)


def proofs(device: torch.device, dtype: torch.dtype) -> Iterator[Evidence]:
    """Evidence for `segfast.ops._prove`. Values, gradients and energies are numbers that `dtype` has."""
    for case, sizes in _POINTS.items():
        yield from filter_evidence(device, dtype, case, *sizes)
    yield skipping_evidence(device, 1e-2, 2500)
    for case, (size, channels, theta) in _GRIDS.items():
        yield _grid_evidence(device, dtype, case, size, channels, theta)
    for labels in _LABELS:
        yield from _update_evidence(device, dtype, labels)


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    """As float32, rounded to dtype."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).float()


def filter_evidence(
    device: torch.device, dtype: torch.dtype, case: str, dim: int, points: int, channels: int, spread: float
) -> Iterator[Evidence]:
    """The exact filter, its gradient in the features and the lattice on one case, sizes as in `_POINTS`."""
    generator = torch.Generator().manual_seed(dim)
    features = spread * torch.rand(2, points, dim, generator=generator)
    features[:, points // 2 :] = features[:, : points - points // 2] + 0.3 * torch.randn(
        2, points - points // 2, dim, generator=generator
    )
    values, grad = (_normal(2, points, channels, dtype=dtype) for _ in range(2))
    grad = grad.flip(1)
    f, v, g = (t.to(device) for t in (features, values, grad))

    def filtered(method: str) -> Tensor:
        return feature_filters(f, method, None, 0.0)(v)

    # Defined with half precision's rounding of weights and values: that is what ATen computes too.
    half = _weights(f).half().float()
    scale = v.abs().amax(1, keepdim=True)
    aten = half @ (v / scale).half().float() * scale
    weights = _weights(features.double())
    reference, magnitude = weights @ values.double(), weights @ values.double().abs()
    run = partial(filtered, "exact")
    yield Evidence("gaussian_filter", case, run, reference, aten, magnitude, points)

    def feature_gradient() -> Tensor:
        return load_kernels().exact_grad_features(load_kernels().build_exact(f, 0.0), g, v)

    reference = _feature_gradient(features.double(), weights, grad.double(), values.double())
    # The pulls between points are half precision's too, as operands of a second product.
    aten = _feature_gradient(f, half, g, v, pulled=lambda pulls: pulls.half().float())
    magnitude = _feature_gradient(features.double(), weights, grad.double(), values.double(), torch.abs)
    yield Evidence(
        "gaussian_grad_features", case, feature_gradient, reference, aten, magnitude, points * channels
    )

    # The lattice's vertices are float32's in every case: an image of them at a time.
    aten = torch.stack([LatticeFilter(Lattice(points))(row) for points, row in zip(f, v, strict=True)])
    reference, magnitude = (
        torch.stack([_wide_lattice(points)(row) for points, row in zip(features, rows.double(), strict=True)])
        for rows in (values, values.abs())
    )
    run, depth = partial(filtered, "lattice"), points * (dim + 1)
    yield Evidence("permutohedral_filter", case, run, reference, aten, magnitude, depth)


def skipping_evidence(device: torch.device, tolerance: float, points: int) -> Evidence:
    """The share of its normalizer that a point of tight clusters keeps: at most `tolerance` less than 1.

    `aten` is off by half the tolerance, which the rule allows twice.
    """
    generator = torch.Generator().manual_seed(0)
    clusters = 12 * torch.rand(40, 5, generator=generator)
    features = clusters[torch.randint(40, (points,), generator=generator)]
    features = (features + 0.5 * torch.randn(points, 5, generator=generator))[None].to(device)
    ones, one = torch.ones_like(features[..., :1]), torch.ones(1, points, 1)

    def share() -> Tensor:
        kept, whole = (
            feature_filters(features, "exact", None, skipped)(ones) for skipped in (tolerance, 0.0)
        )
        return kept / whole

    return Evidence(
        "gaussian_filter", "5-D skipping", share, one.double(), one - tolerance / 2, one.double(), points
    )


def _weights(features: Tensor) -> Tensor:
    squares = (features[:, :, None] - features[:, None]).square().sum(3)
    return (squares / -2).exp()


def _feature_gradient(
    features: Tensor,
    weights: Tensor,
    grad: Tensor,
    values: Tensor,
    size: Callable[[Tensor], Tensor] = lambda t: t,
    pulled: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensor:
    """-sum_j pulled(s_ij k_ij) (f_i - f_j); with `size` of absolute values their sum."""
    products = size(grad) @ size(values).transpose(1, 2)
    pulls = pulled((products + products.transpose(1, 2)) * weights)
    differences = size(features[:, :, None] - features[:, None])
    return -torch.einsum("bij,bijd->bid", pulls, differences)


def _wide_lattice(features: Tensor) -> LatticeFilter:
    """The filter of float32's lattice, summing in float64."""
    lattice = Lattice(features)
    lattice.weights = lattice.weights.double()
    lattice.blur_weights = lattice.blur_weights.double()
    return LatticeFilter(lattice)


def _grid_evidence(
    device: torch.device,
    dtype: torch.dtype,
    case: str,
    size: tuple[int, int],
    channels: int,
    theta: tuple[float, float],
) -> Evidence:
    values = _normal(2, size[0] * size[1], channels, dtype=dtype)
    factors = grid_factors(size, theta, "symmetric", device)

    def on_kernels() -> Tensor:
        return load_kernels().spatial_gaussian(values.to(device), size, theta, *factors)

    def whole(rows: Tensor) -> Tensor:
        plain = SeparableFilter(size, theta, rows[0])
        before, after = normalizers(plain(torch.ones_like(rows[0, :, :1])).squeeze(1), "symmetric")
        kernel = plain.scaled(before, after)
        return torch.stack([kernel(row) for row in rows])

    wide = values.double()
    depth = size[0] + size[1]
    return Evidence(
        "spatial_gaussian", case, on_kernels, whole(wide), whole(values.to(device)), whole(wide.abs()), depth
    )


def _update_evidence(device: torch.device, dtype: torch.dtype, labels: int) -> Iterator[Evidence]:
    """An update with the messages of either bilateral filter beside a spatial one; each result of it."""
    kernels = load_kernels()
    batch, height, width = 2, 19, 23
    pixels = height * width
    generator = torch.Generator().manual_seed(labels)
    unary = _normal(batch, labels, height, width, dtype=dtype).to(dtype)
    matrix = torch.randn(labels, labels, generator=generator)
    index = torch.randperm(batch * pixels + 7, generator=generator)[: batch * pixels].reshape(batch, pixels)
    gathered = torch.zeros(batch * pixels + 7, kernels.packed_width(labels))
    for columns in _halves(gathered, labels):
        columns.copy_(torch.randn(len(gathered), labels, generator=generator))
    raster = torch.randn(batch, pixels, labels, generator=generator)
    vertex = torch.randint(50, (batch, pixels, 6), generator=generator)
    table = torch.randn(50, labels, generator=generator)
    weights, after = (torch.rand(batch, pixels, n, generator=generator) for n in (6, 1))

    def messages(convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        w, t, a, r = (convert(tensor) for tensor in (weights, table, after, raster))
        rows = sum(_halves(convert(gathered)[index.to(r.device)], labels)) * a
        return rows, (t[vertex.to(r.device)] * w[..., None]).sum(2) * a, r

    def expected(u: Tensor, convert: Callable[[Tensor], Tensor], kind: str) -> tuple[Tensor, Tensor]:
        """Probabilities, and the size of the logits' terms, [B, N, L]."""
        rows, sliced, plain = messages(convert)
        logits = -convert(u).flatten(2).transpose(1, 2)
        first, energies = (rows, 1.5) if kind == "gathered" else (sliced, convert(matrix))
        terms = apply_compatibility(energies, first), apply_compatibility(convert(matrix[0]), plain)
        largest = logits.abs() + terms[0].abs() + terms[1].abs()
        if kind == "lattice":
            largest = largest + first.abs() @ convert(matrix).abs().T
        return (logits - terms[0] - terms[1]).softmax(2), largest

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    place = index.int().to(device)
    second = kernels.Message("raster", to(raster), compatibility=to(matrix[0]))
    firsts = {
        "gathered": kernels.Message("gathered", to(gathered), place, None, to(after[..., 0]), 1.5),
        "lattice": kernels.Message(
            "lattice", to(table), vertex.int().to(device), to(weights), to(after[..., 0]), to(matrix)
        ),
    }
    for kind, first in firsts.items():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            u = to(unary).contiguous(memory_format=memory_format)

            def update(what: str, u: Tensor = u, first: Any = first) -> Tensor:
                output, q = torch.empty_like(u), torch.empty_like(to(raster))
                packed = kernels.Packed(torch.zeros_like(to(gathered), dtype=torch.float16), place)
                kernels.mean_field_update(u, (first, second), q=q, packed=packed, output=output)
                rows = packed.values[place.long()].float()
                # In one half of fp16, or their sum.
                parts = _halves(rows, labels)
                whole = parts[0] + parts[1] if len(parts) > 1 else parts[0].half()
                return {"q": q, "packed": whole, "output": output.flatten(2).transpose(1, 2)}[what]

            reference, largest = expected(unary, Tensor.double, kind)
            aten, _ = expected(u, lambda t: t.to(device).float(), kind)
            magnitude = 2 * largest.amax(2)
            half = torch.float32 if kernels.is_split(labels) else torch.float16
            layout = "NHWC" if memory_format == torch.channels_last else "NCHW"
            for name, kept in (("q", torch.float32), ("packed", half), ("output", u.dtype)):
                case = f"{kind} {labels} {layout} {name}"
                run = partial(update, name)
                yield Evidence("mean_field_update", case, run, reference, aten.to(kept), magnitude, labels)


def _halves(packed: Tensor, labels: int) -> list[Tensor]:
    """The columns of packed values that hold labels: those of the first halves, and of the second."""
    half = packed.shape[-1] // 2
    split = load_kernels().is_split(labels)
    return [packed[..., :labels], packed[..., half : half + labels]] if split else [packed[..., :labels]]
