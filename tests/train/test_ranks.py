"""Two processes, as torchrun starts them, train what one does, and go on with what one began; and so back."""

import csv
import shutil
import signal

import pytest
import torch

from segfast.commands.train import _pass_on_meta
from segfast.models import create, list_models
from segfast.train import load_checkpoint
from segfast.train._parallel import sync_batch_norm, units

from .conftest import SMALL, write_pair
from .processes import segfast

# SGD, as AdamW makes much of a gradient's last digits where it is almost 0.
COMMAND = [*SMALL, "--batch", "4", "--steps", "4", "--optimizer", "sgd", "--evaluate-every", "2", "--resume"]
KINDS = {
    "ddp": [],
    "ddp, parts": ["--accumulate", "2", "--norm", "none", "--loss", "both", "--ema", "0.5"],
    "fsdp": ["--fsdp", "--ema", "0.5"],
}


def rows(folder):
    with (folder / "out/unet.metrics.csv").open() as file:
        return [{name: float(value or "nan") for name, value in row.items()} for row in csv.DictReader(file)]


def weights(folder):
    return load_checkpoint(folder / "out/unet.safetensors").state_dict()


def assert_the_same(folder, expected):
    for row, reference in zip(rows(folder), expected[0], strict=True):
        for name in ("step", "epoch", "learning_rate", "loss"):
            assert row[name] == pytest.approx(reference[name], rel=1e-4), name
    torch.testing.assert_close(weights(folder), expected[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_what_one_gives(work, kind):
    """At once, and in turn: two begin and one goes on, or the other way round."""
    options = KINDS[kind]
    # Ignored pixels, so that the ranks' shares of a batch count differently.
    labels = torch.zeros(32, 32)
    labels[:, 12:20], labels[6:] = 1, 255
    write_pair(work / "data", "cell5", labels)
    alone = [*COMMAND, *(option for option in options if option != "--fsdp")]
    [one] = segfast(alone, work)
    assert one.code == 0, one.output
    expected = rows(work), weights(work)
    shutil.rmtree(work / "out")

    both = segfast([*COMMAND, *options], work, ranks=2)
    assert [rank.code for rank in both] == [0, 0], both
    assert_the_same(work, expected)
    assert ["wrote" in rank.output for rank in both] == [True, False]
    assert both[1].output == ""
    shutil.rmtree(work / "out")

    for first, second in ((1, 2), (2, 1)) if kind != "ddp" else ((2, 1),):
        command = {1: alone, 2: [*COMMAND, *options]}
        # The signal reaches one of the ranks only: all stop after the same step.
        stopped = segfast(command[first], work, ranks=first, signal_at=2)
        assert [rank.code for rank in stopped] == [128 + signal.SIGTERM] * first, stopped
        assert len(rows(work)) == 2 and "stopped after step 2 of 4" in stopped[0].output
        finished = segfast(command[second], work, ranks=second)
        assert [rank.code for rank in finished] == [0] * second, finished
        assert_the_same(work, expected)
        shutil.rmtree(work / "out")


def test_an_error_of_one_rank_is_told_once_and_ends_all(work):
    for path, text in (("data/images/cell3.png", "images"), ("data/masks/cell2.png", "masks")):
        content = (work / path).read_bytes()
        # The header is good: an image is found to be bad only when its pixels are read.
        (work / path).write_bytes(content[: len(content) // 2])
        both = segfast([*COMMAND, "--size", "16"], work, ranks=2)
        assert [rank.code for rank in both] == [2, 2], both
        lines = [line for rank in both for line in rank.output.replace("\r", "\n").splitlines()]
        [line] = [line for line in lines if line.startswith("segfast")]
        assert path in line and "not a readable image" in line, text
        (work / path).write_bytes(content)
    both = segfast([*COMMAND, "--batch", "3"], work, ranks=2)
    assert [rank.code for rank in both] == [2, 2] and both[1].output == ""
    assert "--batch 3: expected a multiple of 2, 2 processes times --accumulate 1" in both[0].output


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_batch_norm_over_ranks_is_torchs_over_one(alone):
    torch.manual_seed(0)
    values = 3 + torch.randn(4, 3, 5, 7, dtype=torch.float64)
    ours, torchs = torch.nn.BatchNorm2d(3).double(), torch.nn.BatchNorm2d(3).double()
    sync_batch_norm(ours, torch.device("cpu"))
    found = []
    for norm in (ours, torchs):
        x = values.clone().requires_grad_()
        y = norm(x)
        (y * values.roll(1, 0)).sum().backward()
        found.append([y, x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    torch.testing.assert_close(*found)
    # Under autocast: halves go in and come out, between them sums are of single precision.
    halves = ours.float()(values.bfloat16())
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves, torchs.float()(values.bfloat16()))
    torch.testing.assert_close(list(ours.buffers()), list(torchs.buffers()))


@pytest.mark.parametrize("name", list_models())
def test_what_is_sharded_together_owns_its_weights_alone(name):
    """Submodules that a pass calls, none within another, with most of the parameters."""
    with torch.device("meta"):
        model = create(name, in_channels=1, num_classes=2)
    called = _pass_on_meta(model, 2, 64)
    found = units(model, called)
    assert found and set(found) <= called
    assert not any(a != b and f"{a}.".startswith(f"{b}.") for a in found for b in found)
    inside = sum(p.numel() for unit in found for p in model.get_submodule(unit).parameters())
    assert inside > 0.7 * sum(p.numel() for p in model.parameters())
