"""Packed pooling on a CPU: torch's results to the last bit, what is kept, errors by name."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.functional import packed_max_pool2d, packed_max_unpool2d
from tests.exporting import assert_exports_with_dynamic_sizes
from tests.fused_conv import BACKENDS
from tests.packed_pool2d.reference import SHAPES_AND_MODES, check, image

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "ceil_mode"), SHAPES_AND_MODES, ids=str)
def test_values_places_and_gradients_are_torchs(shape, ceil_mode, dtype, channels_last):
    check(image(shape, dtype, channels_last), ceil_mode)


def kept_by(run):
    """The tensors that a backward keeps, each once."""
    kept = {}

    def keep(t):
        kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = run()
    return result, list(kept.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_keeps_a_thirty_second_of_torchs_indices(backend):
    x = torch.randn(2, 8, 6, 4, requires_grad=True)
    _, theirs = kept_by(lambda: F.max_pool2d(x, 2, return_indices=True))
    indices = sum(t.nbytes for t in theirs if t.dtype == torch.int64)
    with segfast.backend(backend):
        (values, places), ours = kept_by(lambda: packed_max_pool2d(x))
        _, unpooling = kept_by(lambda: packed_max_unpool2d(values, places))
    assert 32 * places.nbytes == indices == 8 * values.numel()
    assert [t.data_ptr() for t in ours + unpooling] == 2 * [places.data_ptr()]


def test_the_default_size_is_twice_the_inputs():
    values, places = packed_max_pool2d(torch.randn(1, 3, 4, 6))
    twice = packed_max_unpool2d(values, places)
    assert twice.shape == (1, 3, 4, 6) and torch.equal(twice, packed_max_unpool2d(values, places, [4, 6]))
    # As torch takes it, batch and channels first.
    assert torch.equal(twice, packed_max_unpool2d(values, places, torch.Size((1, 3, 4, 6))))
    for size in ((5, 7), (4, 7)):
        assert packed_max_unpool2d(values, places, size).shape[2:] == size


class Block(torch.nn.Module):
    def forward(self, x):
        values, places = packed_max_pool2d(x, ceil_mode=True)
        return packed_max_unpool2d(2 * values, places, x.shape[2:])


@pytest.mark.compat
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_exports_with_dynamic_sizes(backend):
    if backend == "triton":
        names = ("packed_max_pool2d", "packed_max_unpool2d")
        assert_exports_with_dynamic_sizes(Block(), backend, *names)
        return
    # torch's own pooling asks whether its last window begins inside: that is a size of its own.
    x, dim = torch.randn(2, 4, 5, 7), torch.export.Dim.DYNAMIC
    with segfast.backend(backend):
        program = torch.export.export(Block(), (x,), dynamic_shapes=({2: dim, 3: dim},))
    assert not any("segfast" in str(node.target) for node in program.graph.nodes)
    for size in ((5, 7), (6, 9)):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(program.module()(x), Block()(x))


def test_autocast_changes_nothing():
    x = torch.randn(1, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        values, places = packed_max_pool2d(x)
        unpooled = packed_max_unpool2d(values, places)
    assert values.dtype == unpooled.dtype == torch.float32
    half, _ = packed_max_pool2d(x.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, v, p: packed_max_pool2d(x[0]), RuntimeError,
         r"packed_max_pool2d: input must be floating point \[N, C, H, W\] .*, got float32 \[5, 5, 4\]"),
        (lambda x, v, p: packed_max_pool2d(x.long()), RuntimeError, r"got int64 \[2, 5, 5, 4\]"),
        (lambda x, v, p: packed_max_pool2d(x[:, :, :1]), RuntimeError, r">= 2, got float32 \[2, 5, 1, 4\]"),
        (lambda x, v, p: packed_max_pool2d(x[:, :, :0], True), RuntimeError, r"H, W >= 1, got"),
        (lambda x, v, p: packed_max_unpool2d(v[0], p), RuntimeError, "packed_max_unpool2d: input must be"),
        (lambda x, v, p: packed_max_unpool2d(v, p.long()), RuntimeError,
         r"indices must be uint8 \[2, 2, 2, 2\].*got int64 \[2, 2, 2, 2\]"),
        (lambda x, v, p: packed_max_unpool2d(v, p[:, :1]), RuntimeError, r"got uint8 \[2, 1, 2, 2\]"),
        (lambda x, v, p: packed_max_unpool2d(v, p.to("meta")), RuntimeError, "got cpu and meta"),
        (lambda x, v, p: packed_max_unpool2d(v, p, (6, 4)), ValueError,
         r"output_size must be within 1 of \[4, 4\], twice the input's, got \[6, 4\]"),
        (lambda x, v, p: packed_max_unpool2d(v, p, (4,)), ValueError, r"got \[4\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message, backend):
    x = torch.randn(2, 5, 5, 4)
    values, places = packed_max_pool2d(x)
    launching = segfast.kernels.record_launches()
    with segfast.backend(backend), launching as launches, pytest.raises(error, match=message):
        call(x, values, places)
    assert launches == []
