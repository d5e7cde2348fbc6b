"""The mean-field update in Triton's interpreter, against softmax and products in fp64."""

import pytest
import torch

from segfast.kernels import Tile, override_tile
from segfast.kernels._launch import record_launches
from segfast.kernels.dense_crf import Message, Packed, mean_field_update, packed_width
from segfast.kernels.dense_crf.pack import is_split
from segfast.ops.dense_crf.backend import MOST_LABELS

pytestmark = pytest.mark.interpreter

SIZE = (3, 7)


def unary_of(labels, batch=2, size=SIZE, dtype=torch.float32, memory_format=torch.contiguous_format):
    torch.manual_seed(labels)
    return (3 * torch.randn(batch, labels, *size)).to(dtype).contiguous(memory_format=memory_format)


def compatibility_of(kind, labels):
    if kind == "number":
        return 1.5
    return torch.randn(labels) if kind == "vector" else torch.randn(labels, labels)


def message_of(kind, compatibility, unary, scaled=True):
    """A message of random values, and what it is in fp64, [B, N, L]."""
    batch, labels, height, width = unary.shape
    pixels = height * width
    after = torch.rand(batch, pixels) + 0.5 if scaled else None
    index = weights = None
    if kind == "raster":
        values = torch.randn(batch, pixels, labels)
        plain = values.double()
    elif kind == "gathered":
        padded = batch * pixels + 5
        values = torch.zeros(padded, packed_width(labels))
        for columns in halves(values, labels):
            columns[:] = torch.randn(padded, labels)
        index = torch.randperm(padded)[: batch * pixels].reshape(batch, pixels).int()
        plain = sum(halves(values.double()[index.long()], labels))
    else:
        vertices = 11
        values = torch.randn(vertices + 1, labels)
        index = torch.randint(vertices, (batch, pixels, 4), dtype=torch.int32)
        weights = torch.rand(batch, pixels, 4)
        plain = (values.double()[index.long()] * weights[..., None]).sum(2)
    if scaled:
        plain = plain * after[..., None]
    return Message(kind, values, index, weights, after, compatibility), plain


def halves(packed, labels):
    """The columns of packed values that hold labels: those of the first halves, and of the second."""
    half = packed.shape[-1] // 2
    return (
        [packed[..., :labels], packed[..., half : half + labels]]
        if is_split(labels)
        else [packed[..., :labels]]
    )


def expected(unary, *terms):
    logits = -unary.double().flatten(2).transpose(1, 2)
    for compatibility, plain in terms:
        if not isinstance(compatibility, torch.Tensor):
            logits = logits + compatibility * plain
        elif compatibility.dim() == 1:
            logits = logits - compatibility.double() * plain
        else:
            logits = logits - plain @ compatibility.double().T
    return logits.softmax(2)


def check(unary, messages, reference):
    """All three results of one launch."""
    batch, labels, height, width = unary.shape
    pixels = height * width
    q, output = torch.empty(batch, pixels, labels), torch.empty_like(unary)
    columns = packed_width(labels)
    index = torch.randperm(batch * pixels + 3)[: batch * pixels].reshape(batch, pixels).int()
    packed = Packed(torch.full((batch * pixels + 3, columns), 7.0).half(), index, torch.rand(batch, pixels))
    mean_field_update(unary, messages, q=q, packed=packed, output=output)
    torch.testing.assert_close(q.double(), reference, atol=2e-6, rtol=1e-5)
    image = reference.transpose(1, 2).reshape(unary.shape)
    tolerance = 2e-6 if unary.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(output.double(), image, atol=tolerance, rtol=1e-5)
    rows = packed.values[index.long()]
    scaled = reference * packed.before.double()[..., None]
    parts = halves(rows, labels)
    torch.testing.assert_close(parts[0].double(), scaled, atol=2e-6, rtol=2**-11)
    if len(parts) == 2:
        torch.testing.assert_close(parts[0].double() + parts[1].double(), scaled, atol=2e-6, rtol=1e-5)
    for part in parts:
        part.zero_()
    assert (rows == 0).all(), "a padding column was written"
    untouched = torch.ones(len(packed.values), dtype=torch.bool).index_fill_(0, index.flatten().long(), 0)
    assert untouched.sum() == 3 and (packed.values[untouched] == 7).all()


@pytest.mark.parametrize("labels", [1, 2, 5, 21, 33])
@pytest.mark.parametrize("kind", ["raster", "gathered", "lattice"])
def test_one_message_of_every_kind(kind, labels, poisoned_empty):
    unary = unary_of(labels)
    for form in ("number", "vector", "matrix"):
        compatibility = compatibility_of(form, labels)
        message, plain = message_of(kind, compatibility, unary, scaled=form != "vector")
        check(unary, (message,), expected(unary, (compatibility, plain)))


@pytest.mark.compat
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("gathered", "number"), ("raster", "number")),
        (("lattice", "vector"), ("raster", "matrix")),
        (("gathered", "matrix"), ("lattice", "number")),
        (("lattice", "matrix"), ("lattice", "matrix")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_messages(first, second, dtype, memory_format, poisoned_empty):
    unary = unary_of(5, dtype=dtype, memory_format=memory_format)
    compatibilities = [compatibility_of(form, 5) for _, form in (first, second)]
    messages, plains = zip(
        *(message_of(kind, c, unary) for (kind, _), c in zip((first, second), compatibilities, strict=True)),
        strict=True,
    )
    check(unary, messages, expected(unary, *zip(compatibilities, plains, strict=True)))


@pytest.mark.parametrize("size", [(1, 1), (1, 33), (33, 1), (9, 15)])
def test_sizes_and_strides(size, poisoned_empty):
    whole = unary_of(3, size=(size[0] + 2, 2 * size[1]))
    unary = whole[:, :, 1:-1, ::2]
    message, plain = message_of("raster", 2.0, unary)
    with override_tile("mean_field_update", Tile(8, 4, 1, 4, 1)):
        check(unary, (message,), expected(unary, (2.0, plain)))


def test_without_messages_it_is_the_softmax(poisoned_empty):
    unary = unary_of(MOST_LABELS, batch=1, size=(2, 2))
    check(unary, (), expected(unary))


def test_only_what_is_asked_for_is_written():
    unary = unary_of(4)
    q = torch.empty(2, 21, 4)
    with record_launches() as launches:
        mean_field_update(unary, q=q)
    assert len(launches) == 1
    mean_field_update(unary, q=q)
    torch.testing.assert_close(q.double(), expected(unary), atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinities_and_nan_are_softmaxs():
    inf, nan = float("inf"), float("nan")
    energies = [[0.0, inf, 1.0], [inf, inf, inf], [-inf, 0.0, 1.0], [nan, 0.0, 1.0], [1e4, -1e4, 0.0]]
    unary = torch.tensor(energies).T.reshape(1, 3, 1, 5).contiguous()
    output = torch.empty_like(unary)
    packed = Packed(torch.empty(5, 16).half(), torch.arange(5, dtype=torch.int32)[None])
    mean_field_update(unary, output=output, packed=packed)
    torch.testing.assert_close(output, torch.softmax(-unary, 1), equal_nan=True, atol=1e-7, rtol=1e-6)
    assert (packed.values[:, 3:8] == 0).all() and (packed.values[:, 11:] == 0).all()


def test_one_label_costs_nothing():
    unary = unary_of(1)
    message, _ = message_of("raster", -3.0, unary)
    output = torch.empty_like(unary)
    mean_field_update(unary, (message,), output=output)
    assert (output == 1).all()


def test_every_tile_gives_the_same(poisoned_empty):
    unary = unary_of(20)
    matrix = compatibility_of("matrix", 20)
    first, plain = message_of("lattice", matrix, unary)
    second, other = message_of("gathered", 0.5, unary)
    for tile in (Tile(16, 32, 16, 4, 1), Tile(32, 32, 32, 4, 1), Tile(64, 32, 16, 8, 1)):
        with override_tile("mean_field_update", tile):
            check(unary, (first, second), expected(unary, (matrix, plain), (0.5, other)))
