"""A weight is prepared for the sizes of images that it meets: another form of it would be right, and slow."""

import pytest
import torch

from segfast.ops import _onednn, _winograd
from segfast.ops._call import CANDIDATES, Call
from segfast.ops._choice import prepared
from tests.ops.test_choice_candidates import CONV2D, TRANSPOSED

SIZES = (8, 32, 16, 128)


def of_size(call: Call, side: int, channels: int, threads: int = 1) -> Call:
    weight = (channels, channels, *call.weight[2:])
    return call._replace(input=(1, channels, side, side), weight=weight, groups=1, threads=threads)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Where oneDNN has the widest blocks there are two layouts for sizes from 8 to 32.
@pytest.mark.parametrize(("channels", "kernel"), [(96, 3), (48, 3), (960, 1)])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1]])
@pytest.mark.parametrize("operation", [CONV2D, TRANSPOSED], ids=lambda call: call.operation)
def test_onednn_has_for_each_size_the_layout_that_it_wants(operation, sizes, channels, kernel, one_thread):
    candidate = CANDIDATES[operation.operation]["onednn"]
    call = of_size(operation._replace(weight=(0, 0, kernel, kernel), padding=(kernel // 2,) * 2), 8, channels)
    if not candidate.serves(call):
        pytest.skip("oneDNN does not answer here")
    weight = torch.randn(call.weight)
    for side in (*sizes, *sizes):
        at = of_size(call, side, channels)
        wanted = _onednn._layout(candidate.prepare(weight, at))
        assert _onednn._layout(prepared(weight, at, "onednn")) == wanted


@pytest.mark.skipif(not _winograd._has_onednn(), reason="oneDNN's packed convolution is not here")
@pytest.mark.parametrize("sizes", [(16, 64), (64, 16)])
def test_winograd_has_one_for_few_tiles_and_one_for_many(sizes):
    few = {}
    call = of_size(CONV2D._replace(weight=(0, 0, 3, 3), padding=(1, 1), dilation=(1, 1)), 16, 256)
    weight = torch.randn(call.weight)
    for side in sizes:
        few[side] = prepared(weight, of_size(call, side, 256), "winograd").few
    assert few == {16: True, 64: False}
    assert prepared(weight, of_size(call, 64, 256, threads=16), "winograd").few


@pytest.fixture
def made(monkeypatch):
    """The sizes that a weight was prepared for, in one layout for small images and another for large ones."""
    seen = []

    def prepare(weight, call):
        seen.append(call.input[2])
        return ["large" if call.input[2] > 100 else "small"]

    candidate = CANDIDATES["conv2d"]["onednn"]._replace(prepare=prepare, layout=lambda it: it[0])
    monkeypatch.setitem(CANDIDATES["conv2d"], "onednn", candidate)
    return seen


def test_sizes_of_one_layout_share_one(made):
    weight = torch.randn(8, 8, 3, 3)
    kept = {side: prepared(weight, of_size(CONV2D, side, 8), "onednn") for side in (8, 16, 128, 256, 8, 256)}
    assert made == [8, 16, 128, 256]  # each once
    assert kept[8] is kept[16] and kept[128] is kept[256]
    assert [kept[8], kept[128]] == [["small"], ["large"]]
    weight.add_(1)
    assert prepared(weight, of_size(CONV2D, 16, 8), "onednn") is not kept[8]


def test_what_is_kept_of_a_weight_does_not_grow_with_the_sizes(made):
    from segfast.ops import _prepared_weights

    weight = torch.randn(8, 8, 3, 3)
    for side in range(8, 8 + 2 * _prepared_weights._MOST_KINDS):
        prepared(weight, of_size(CONV2D, side, 8), "onednn")
    assert len(_prepared_weights._kept[id(weight)].made) <= _prepared_weights._MOST_KINDS
