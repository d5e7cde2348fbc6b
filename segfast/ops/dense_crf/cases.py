"""The shapes of dense CRFs: odd sets of points and images to prove kernels on, and images of 512 x 512."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._case import Case, Launch, Proof
from .._operands import load_kernels
from .device_filters import feature_filters, grid_factors
from .exact import SeparableFilter
from .filters import normalizers
from .inference import apply_compatibility
from .lattice import Lattice, LatticeFilter

_SIZE = (512, 512)


class CrfCase(Case):
    """Kernels of the dense CRF on one shape."""

    family = "dense_crf"


class Points(CrfCase):
    """The exact filter, its gradient in the features and the lattice, of two sets of `points`.

    These have `dim` features, which `spread` so far, and `channels` of values.
    """

    op = "feature_filters"

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        """Values and gradients are numbers that `dtype` has."""
        dim, points, channels, spread = (self[name] for name in ("dim", "points", "channels", "spread"))
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
        yield Proof("gaussian_filter", self.name, run, reference, aten, magnitude, points)

        def feature_gradient() -> Tensor:
            return load_kernels().exact_grad_features(load_kernels().build_exact(f, 0.0), g, v)

        reference = _feature_gradient(features.double(), weights, grad.double(), values.double())
        # The pulls between points are half precision's too, as operands of a second product.
        aten = _feature_gradient(f, half, g, v, pulled=lambda pulls: pulls.half().float())
        magnitude = _feature_gradient(features.double(), weights, grad.double(), values.double(), torch.abs)
        depth = points * channels
        yield Proof("gaussian_grad_features", self.name, feature_gradient, reference, aten, magnitude, depth)

        # The lattice's vertices are float32's in every case: an image of them at a time.
        aten = torch.stack([LatticeFilter(Lattice(places))(row) for places, row in zip(f, v, strict=True)])
        wide = [_wide_lattice(places) for places in features]
        reference, magnitude = (
            torch.stack([lattice(row) for lattice, row in zip(wide, rows, strict=True)])
            for rows in (values.double(), values.double().abs())
        )
        run, depth = partial(filtered, "lattice"), points * (dim + 1)
        yield Proof("permutohedral_filter", self.name, run, reference, aten, magnitude, depth)


class Skipping(CrfCase):
    """The share of its normalizer that a point of tight clusters keeps: at most `tolerance` less than all."""

    op = "gaussian_filter"

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        """`aten` is off by half the tolerance, which the rule allows twice."""
        tolerance, points = self["tolerance"], self["points"]
        generator = torch.Generator().manual_seed(0)
        clusters = 12 * torch.rand(40, 5, generator=generator)
        features = clusters[torch.randint(40, (points,), generator=generator)]
        features = (features + 0.5 * torch.randn(points, 5, generator=generator))[None].to(device)
        ones, one = torch.ones_like(features[..., :1]), torch.ones(1, points, 1)

        def share() -> Tensor:
            kept, whole = (feature_filters(features, "exact", None, skipped) for skipped in (tolerance, 0.0))
            return kept(ones) / whole(ones)

        wide = one.double()
        yield Proof("gaussian_filter", self.name, share, wide, one - tolerance / 2, wide, points)


class Grid(CrfCase):
    """The spatial filter of two images of `size`, in `channels`."""

    op = "spatial_gaussian"

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        size, channels, theta = (self[name] for name in ("size", "channels", "theta"))
        values = _normal(2, size[0] * size[1], channels, dtype=dtype)
        factors = grid_factors(size, theta, "symmetric", device)

        def on_kernels() -> Tensor:
            return load_kernels().spatial_gaussian(values.to(device), size, theta, *factors)

        def whole(rows: Tensor) -> Tensor:
            plain = SeparableFilter(size, theta, rows[0])
            before, after = normalizers(plain(torch.ones_like(rows[0, :, :1])).squeeze(1), "symmetric")
            kernel = plain.scaled(before, after)
            return torch.stack([kernel(row) for row in rows])

        wide, aten = values.double(), whole(values.to(device))
        yield Proof(self.op, self.name, on_kernels, whole(wide), aten, whole(wide.abs()), sum(size))


class Update(CrfCase):
    """An update with the messages of either bilateral filter beside a spatial one; each result of it."""

    op = "mean_field_update"

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        kernels, labels = load_kernels(), self["labels"]
        batch, height, width = 2, 19, 23
        pixels = height * width
        kept = batch * pixels
        generator = torch.Generator().manual_seed(labels)
        unary = _normal(batch, labels, height, width, dtype=dtype).to(dtype)
        matrix = torch.randn(labels, labels, generator=generator)
        index = torch.randperm(kept + 7, generator=generator)[:kept].reshape(batch, pixels)
        gathered = torch.zeros(kept + 7, kernels.packed_width(labels))
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

        place, vertices, factor = to(index.int()), to(vertex.int()), to(after[..., 0])
        second = kernels.Message("raster", to(raster), compatibility=to(matrix[0]))
        firsts = {
            "gathered": kernels.Message("gathered", to(gathered), place, None, factor, 1.5),
            "lattice": kernels.Message("lattice", to(table), vertices, to(weights), factor, to(matrix)),
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
                for name, dtype_of in (("q", torch.float32), ("packed", half), ("output", u.dtype)):
                    case, run = f"{kind} {labels} {layout} {name}", partial(update, name)
                    yield Proof(self.op, case, run, reference, aten.to(dtype_of), magnitude, labels)


class Images(CrfCase):
    """Every kernel on `batch` images of 512 x 512 with so many `labels`.

    The unaries alone have a dtype: the other kernels are float32's. Rows of labels that fill no 16 bytes are
    stored a number at a time, neighbors by neighbors: a warp's stores are whole cache lines.
    """

    op = "kernels"

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        yield from self._updates(dtype)
        if dtype == torch.float32:
            yield from self._filters()

    def _filters(self) -> Iterator[Launch]:
        name, labels, batch = self.name, self["labels"], self["batch"]
        kernels = load_kernels()
        pixels = _SIZE[0] * _SIZE[1]
        features, rows = _make(batch, pixels, 5), _make(batch, pixels, labels)
        pairs = _recorded(lambda: kernels.build_exact(features, 1e-2, True))
        unbounded = _recorded(lambda: kernels.build_exact(features, 1e-2))
        packed = _make(pairs.padded, kernels.packed_width(labels), dtype=torch.float16)
        sums = packed.float()
        # 16 columns of 16 rows are a number for each of AMD's threads.
        least = 8 if packed.shape[1] > 16 else 4
        yield f"{name} exact", partial(kernels.exact_filter, pairs, packed), least
        yield f"{name} exact direct", partial(kernels.exact_filter, unbounded, packed), least
        yield f"{name} pack", partial(kernels.exact_pack, pairs, rows, rows[..., 0], rows[:, 0]), 8
        yield f"{name} unpack", partial(kernels.exact_unpack, pairs, sums, labels, rows[..., 0]), 4
        few = rows[..., : min(labels, 128)].contiguous()
        yield f"{name} exact gradient", partial(kernels.exact_grad_features, pairs, few, few), 4
        lattice = _recorded(lambda: kernels.build_permutohedral(features))
        table = _make(lattice.capacity, labels)
        yield f"{name} lattice", partial(kernels.permutohedral_blur, lattice, rows, rows[..., 0]), 4
        yield f"{name} slice", partial(kernels.permutohedral_slice, lattice, table, rows[..., 0]), 4
        factors = _make(_SIZE[1]), _make(_SIZE[0])
        spatial = partial(kernels.spatial_gaussian, rows, _SIZE, (3.0, 3.0), factors, factors)
        yield f"{name} spatial", spatial, 4

    def _updates(self, dtype: torch.dtype) -> Iterator[Launch]:
        name, labels, batch = self.name, self["labels"], self["batch"]
        kernels = load_kernels()
        pixels, width = _SIZE[0] * _SIZE[1], kernels.packed_width(labels)
        unary = _make(batch, labels, *_SIZE, dtype=dtype)
        rows, after = _make(batch, pixels, labels), _make(batch, pixels)
        index, vertex = (_make(*shape, dtype=torch.int32) for shape in ((batch, pixels), (batch, pixels, 6)))
        packed = kernels.Packed(_make(batch * pixels, width, dtype=torch.float16), index, after)

        def messages(kind: str, compatibility: float | Tensor) -> tuple:
            given: tuple[Tensor, Tensor, Tensor | None] = (_make(batch * pixels, width), index, None)
            if kind == "lattice":
                given = (_make(10**5, labels), vertex, _make(*vertex.shape))
            first = kernels.Message(kind, *given, after, compatibility)
            return first, kernels.Message("raster", rows, compatibility=compatibility)

        matrix = _make(labels, labels)
        update = kernels.mean_field_update
        yield f"{name} update start", partial(update, unary, q=rows, packed=packed), _store(labels)
        for kind in ("gathered", "lattice"):
            potts, mixed = messages(kind, 3.0), messages(kind, matrix)
            between = {"q": rows, "packed": packed if kind == "gathered" else None}
            last_store = dtype.itemsize
            yield f"{name} update {kind}", partial(update, unary, potts, **between), _store(labels)
            yield f"{name} update {kind} matrix", partial(update, unary, mixed, **between), _store(labels)
            yield f"{name} update {kind} last", partial(update, unary, potts, output=unary), last_store


class SetUp(CrfCase):
    """The lists of an exact filter, and a lattice, of one image of 512 x 512."""

    op = "build"

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        if dtype != torch.float32:
            return
        kernels = load_kernels()
        features = _make(1, _SIZE[0] * _SIZE[1], 5)
        yield "build exact", partial(kernels.build_exact, features, 1e-2), 2
        yield "build lattice", partial(kernels.build_permutohedral, features), 4


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    """As float32, rounded to dtype."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).float()


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


def _halves(packed: Tensor, labels: int) -> list[Tensor]:
    """The columns of packed values that hold labels: those of the first halves, and of the second."""
    half = packed.shape[-1] // 2
    split = load_kernels().is_split(labels)
    return [packed[..., :labels], packed[..., half : half + labels]] if split else [packed[..., :labels]]


def _make(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _store(labels: int) -> int:
    """Bytes of a store into rows of so many fp32 labels."""
    return 4 * min(4, labels & -labels)


def _recorded(build: Callable):
    """The result of `build`, which launches nothing here."""
    from segfast.kernels import record_launches  # which needs triton

    with record_launches():
        return build()


def _proven(kind: type[CrfCase], name: str, **params: Any) -> CrfCase:
    return kind(name, "", params, uses=("prove",))


def _points(name: str, dim: int, points: int, channels: int, spread: float) -> CrfCase:
    return _proven(Points, name, dim=dim, points=points, channels=channels, spread=spread)


def _images(name: str, labels: int, batch: int = 1) -> Images:
    return Images(name, "", {"labels": labels, "batch": batch}, uses=("compile",))


CASES = [
    _points("2-D", 2, 500, 21, 4.0),
    _points("3-D", 3, 333, 2, 5.0),
    _points("5-D", 5, 700, 33, 6.0),
    _points("8-D", 8, 140, 40, 3.0),
    # They outgrow half precision, in which the exponents of nearer ones are summed.
    _points("5-D far apart", 5, 260, 5, 400.0),
    _proven(Skipping, "5-D skipping", tolerance=1e-2, points=2500),
    _proven(Grid, "narrow", size=(37, 70), channels=21, theta=(3.0, 1.5)),
    _proven(Grid, "wide", size=(65, 129), channels=2, theta=(40.0, 80.0)),
    _proven(Grid, "one row", size=(1, 257), channels=5, theta=(0.3, 3.0)),
    *(_proven(Update, "", labels=labels) for labels in (1, 2, 21, 150)),
    _images("2 labels", 2),
    _images("21 labels", 21),
    _images("21 labels batch 8", 21, 8),
    _images("150 labels", 150),
    SetUp("build", "", {}, uses=("compile",)),
]
