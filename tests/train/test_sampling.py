"""Patches by number, and the batches that ranks and workers make of them."""

import pytest
import torch

from segfast._errors import UserError
from segfast.data import Sample
from segfast.train import PatchSampler
from segfast.train._augment import AUGMENTATIONS
from segfast.train._batches import batches
from segfast.train._parallel import Ranks


def samples(count=5, channels=1):
    """Each of one value, by which it is known again."""
    return [Sample(torch.full((channels, 12, 12), k / 10), torch.full((12, 12), k)) for k in range(count)]


def seen(sampler, numbers):
    return [int(sampler.patch(number).target[0, 0]) for number in numbers]


def test_an_epoch_has_every_sample_once_and_the_next_another_order():
    sampler = PatchSampler(samples(), 8, augment=False)
    epochs = [seen(sampler, range(start, start + 5)) for start in (0, 5, 10)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 3 and epochs[0] != epochs[1]
    other = PatchSampler(samples(), 8, seed=1, augment=False)
    assert seen(sampler, range(15)) != seen(other, range(15))
    # A patch does not depend on those drawn before.
    torch.rand(1)
    assert torch.equal(sampler.patch(3).image, PatchSampler(samples(), 8, augment=False).patch(3).image)


def test_each_augmentation_does_what_it_is_named_after():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    sample = Sample(image, torch.arange(1024).reshape(32, 32))
    plain = PatchSampler([sample], 32, augment=False).patch(0)
    torch.testing.assert_close(plain.image, image, rtol=1e-3, atol=1e-3)

    def patches(name):
        return [PatchSampler([sample], 32, augment=[name]).patch(number) for number in range(8)]

    for name, dims in (("flip", [2]), ("flip-vertical", [1])):
        found = [
            [torch.allclose(patch.image, other, atol=1e-3) for other in (image, image.flip(dims))]
            for patch in patches(name)
        ]
        assert sorted({tuple(pair) for pair in found}) == [(False, True), (True, False)]
    assert all(torch.equal(patch.target, plain.target) for patch in patches("color"))
    assert all((patch.image - plain.image).abs().mean() > 0.01 for patch in patches("color"))
    for name in ("rotate", "scale", "elastic"):
        assert sum(not torch.equal(patch.target, plain.target) for patch in patches(name)) >= 6, name
    # Scaled, a patch's middle row is still one row of the image; rotated, it is not.
    rows = {name: [len((p.target[16] // 32).unique()) for p in patches(name)] for name in ("scale", "rotate")}
    assert max(rows["scale"]) == 1 and min(rows["rotate"]) > 1
    assert set(AUGMENTATIONS) == {"flip", "flip-vertical", "color", "rotate", "scale", "elastic"}
    with pytest.raises(ValueError, match=r"augment must be among flip, .*, got 'mirror'"):
        PatchSampler([sample], augment=["mirror"])


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_ranks_share_the_same_patches(world, workers):
    sampler = PatchSampler(samples(), 8, batch_size=4)
    sampler.drawn = 8
    expected = [sampler(), sampler()]
    parts = [
        list(batches(sampler, Ranks(rank, world), range(2, 4), workers=workers)) for rank in range(world)
    ]
    for step, (images, targets) in enumerate(expected):
        assert torch.equal(torch.cat([part[step].tensors[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[step].tensors[1] for part in parts]), targets)


class Bad(list):
    """Samples of which some cannot be read."""

    def __init__(self, bad, count=5):
        super().__init__(samples(count))
        self.bad = bad

    def __getitem__(self, index):
        if index in self.bad:
            raise UserError(f"sample {index} is bad")
        return super().__getitem__(index)


def test_a_bad_sample_is_an_error_or_is_skipped_by_name():
    sampler = PatchSampler(Bad({2}), 8, batch_size=5)
    [batch] = batches(sampler, Ranks(), range(1))
    assert str(batch.error) == "sample 2 is bad" and batch.tensors is None
    [batch] = batches(sampler, Ranks(), range(1), skip_bad=True)
    assert batch.error is None and batch.skipped == ["sample 2 is bad"]
    values = batch.tensors[1][:, 0, 0].tolist()
    assert 2 not in values and sorted({*values}) == [0, 1, 3, 4]
    [batch] = batches(PatchSampler(Bad({0, 1, 2}, 3), 8), Ranks(), range(1), skip_bad=True)
    assert str(batch.error).startswith("no image is left that can be read; the last: sample ")
