"""Launches of the dense CRF's kernels for `segfast compile-report`: images of 512 x 512, features of 5."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .._operands import load_kernels

_SIZE = (512, 512)
# labels, images
_CASES = {"2 labels": (2, 1), "21 labels": (21, 1), "21 labels batch 8": (21, 8), "150 labels": (150, 1)}


def specimens(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, a call of a launcher, the width in bytes its stores must have), on meta tensors.

    The unaries alone have a dtype: the other kernels are float32's specimens. Rows of labels that fill no 16
    bytes are stored a number at a time, neighbours by neighbours: a warp's stores are whole cache lines.
    """
    for name, (labels, batch) in _CASES.items():
        yield from _updates(name, labels, batch, dtype)
        if dtype == torch.float32:
            yield from _filters(name, labels, batch)
    if dtype == torch.float32:
        yield from _setup()


def _make(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _store(labels: int) -> int:
    """Bytes of a store into rows of so many fp32 labels."""
    return 4 * min(4, labels & -labels)


def _filters(name: str, labels: int, batch: int) -> Iterator[tuple[str, Callable[[], object], int]]:
    kernels = load_kernels()
    pixels = _SIZE[0] * _SIZE[1]
    features, rows = _make(batch, pixels, 5), _make(batch, pixels, labels)
    pairs = _recorded(lambda: kernels.build_exact(features, 1e-2, True))
    unbounded = _recorded(lambda: kernels.build_exact(features, 1e-2))
    packed = _make(pairs.padded, kernels.packed_width(labels), dtype=torch.float16)
    sums = packed.float()
    least = 8 if packed.shape[1] > 16 else 4  # 16 columns of 16 rows are a number for each of AMD's threads
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


def _updates(
    name: str, labels: int, batch: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object], int]]:
    kernels = load_kernels()
    pixels, width = _SIZE[0] * _SIZE[1], kernels.packed_width(labels)
    unary, rows, after = (
        _make(batch, labels, *_SIZE, dtype=dtype),
        _make(batch, pixels, labels),
        _make(batch, pixels),
    )
    index, vertex = (_make(*shape, dtype=torch.int32) for shape in ((batch, pixels), (batch, pixels, 6)))
    packed = kernels.Packed(_make(batch * pixels, width, dtype=torch.float16), index, after)

    def messages(kind: str, compatibility: float | torch.Tensor) -> tuple:
        first = kernels.Message("gathered", _make(batch * pixels, width), index, None, after, compatibility)
        if kind == "lattice":
            first = kernels.Message(
                "lattice", _make(10**5, labels), vertex, _make(*vertex.shape), after, compatibility
            )
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


def _setup() -> Iterator[tuple[str, Callable[[], object], int]]:
    kernels = load_kernels()
    features = _make(1, _SIZE[0] * _SIZE[1], 5)
    yield "build exact", partial(kernels.build_exact, features, 1e-2), 2
    yield "build lattice", partial(kernels.build_permutohedral, features), 4


def _recorded(build: Callable):
    """The result of `build`, launching nothing."""
    from segfast.kernels import record_launches  # which needs triton

    with record_launches():
        return build()
