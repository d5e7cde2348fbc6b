"""`segfast.nn.PackedMaxPool2d` and `PackedMaxUnpool2d`: thin, without state, beside torch's pair."""

import copy
import pickle

import pytest
import torch
from torch import nn

import segfast
from segfast.nn import PackedMaxPool2d, PackedMaxUnpool2d


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_pair_is_torchs(ceil_mode):
    x = torch.randn(2, 6, 7, 8)
    pool = nn.MaxPool2d(2, ceil_mode=ceil_mode, return_indices=True)
    expected, indices = pool(x)
    values, places = PackedMaxPool2d(ceil_mode)(x)
    assert torch.equal(values, expected) and places.shape == (2, 2, *values.shape[2:])
    unpooled = PackedMaxUnpool2d()(values, places, x.shape[2:])
    assert torch.equal(unpooled, nn.MaxUnpool2d(2)(expected, indices, x.shape[2:]))


@pytest.mark.parametrize("layer", [PackedMaxPool2d(True), PackedMaxUnpool2d()], ids=repr)
def test_copies_and_names(layer):
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and repr(twin) == repr(layer)
    assert list(layer.state_dict()) == []
    assert repr(layer) in ("PackedMaxPool2d(ceil_mode=True)", "PackedMaxUnpool2d()")
    with pytest.raises(RuntimeError, match="segfast's own layers and networks cannot be scripted"):
        torch.jit.script(layer)


def test_the_meta_device_gives_shapes():
    x = torch.empty(2, 6, 7, 8, device="meta")
    values, places = PackedMaxPool2d(True)(x)
    assert values.shape == (2, 6, 4, 4) and places.shape == (2, 2, 4, 4) and places.dtype == torch.uint8
    assert PackedMaxUnpool2d()(values, places, (7, 8)).shape == x.shape


def test_optimize_and_restore_leave_torchs_pooling_and_ours():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.unpool = nn.Conv2d(3, 4, 3), PackedMaxPool2d(), PackedMaxUnpool2d()
            self.plain = nn.MaxPool2d(2, return_indices=True)

        def forward(self, x):
            x = self.conv(x)
            values, places = self.pool(x)
            return self.unpool(values, places, x.shape[2:]), self.plain(x)[1]

    net = Net().eval()
    x = torch.randn(1, 3, 9, 8)
    fast = segfast.optimize(net)
    torch.testing.assert_close(fast(x), net(x))
    assert type(fast.plain) is nn.MaxPool2d and type(fast.pool) is PackedMaxPool2d
    assert type(segfast.restore(fast).unpool) is PackedMaxUnpool2d
