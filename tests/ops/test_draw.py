"""The tensors that calls on a GPU are measured on."""

import torch

from segfast.ops._gpu_call import Draw, GpuCall

CALL = GpuCall("conv2d", "any", torch.float32, "", True, ((1, 3, 8, 8),), (), (), False)


def test_large_tensors_are_random_in_every_direction():
    draw = Draw(CALL, torch.device("cpu"))
    large, other = draw(2, 3, 512, 1024, scale=2.0), draw(2, 3, 512, 1024)
    assert large.shape == (2, 3, 512, 1024) and large.is_contiguous(memory_format=torch.channels_last)
    assert abs(large.std().item() - 2) < 0.01 and abs(large.mean().item()) < 0.01
    assert not torch.equal(large, 2 * other)
    # No image, channel, row or column is another one.
    for dim in range(4):
        parts = large.unbind(dim)
        assert not any(torch.equal(parts[0], part) for part in parts[1:])
    assert torch.equal(large, Draw(CALL, torch.device("cpu"))(2, 3, 512, 1024, scale=2.0))


def test_small_tensors_have_no_value_twice():
    drawn = Draw(CALL, torch.device("cpu"))(1, 3, 32, 32)
    assert drawn.unique().numel() > 0.99 * drawn.numel()
