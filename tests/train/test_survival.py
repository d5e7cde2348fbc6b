"""A training that is interrupted, killed or out of disk space goes on as if nothing had been."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from segfast import cli
from segfast.train import Trainer

from .conftest import SMALL, files_up_to
from .processes import calls_before_steps, segfast

pytestmark = pytest.mark.usefixtures("undrawn")

RESULTS = ("out/unet.metrics.csv", "out/unet.safetensors")
KILLS = 20


def results(folder, names=RESULTS):
    return [(Path(folder) / name).read_bytes() for name in names]


def interrupted_at(monkeypatch, step, number):
    """Send this signal in the middle of that step."""
    original = Trainer.train_step

    def stepped(trainer, *batch):
        if trainer.step + 1 == step:
            signal.raise_signal(number)
        return original(trainer, *batch)

    monkeypatch.setattr(Trainer, "train_step", stepped)


KINDS = {
    "interrupt": (signal.SIGINT, []),
    "sgd, accumulated, averaged, bfloat16": (
        signal.SIGTERM,
        [
            *("--optimizer", "sgd", "--accumulate", "2", "--ema", "0.9", "--precision", "bfloat16"),
            *("--loss", "both", "--class-weights", "balanced"),
        ],
    ),
    "float16": (signal.SIGTERM, ["--precision", "float16", "--optimizer", "sgd", "--lr", "0.01"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_goes_on_to_the_same_curve(work, monkeypatch, capsys, kind):
    number, options = KINDS[kind]
    command = [*SMALL, *options, "--steps", "7", "--evaluate-every", "3"]
    assert cli.main(command) == 0
    expected = results(work)
    shutil.rmtree("out")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    generator = torch.get_rng_state()
    with monkeypatch.context() as patch:
        interrupted_at(patch, 4, number)
        assert cli.main([*command, "--resume"]) == 128 + number
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert lines[-1] == "segfast: stopped after step 4 of 7; with --resume it goes on"
    assert not Path("out/unet.safetensors").exists()
    assert cli.main([*command, "--resume", "--checkpoint-every", "2"]) == 0
    assert results(work) == expected
    # Once more: there is nothing left to do, but what was written is written again.
    Path("out/unet.safetensors").unlink()
    assert cli.main([*command, "--resume"]) == 0
    assert results(work) == expected
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.equal(torch.get_rng_state(), generator)


def test_dropout_draws_the_same_after_an_interruption(work, monkeypatch):
    command = ["train", "fcn32s", "--data", "data", "--size", "32", "--batch", "2", "--steps", "3"]
    command += ["--option", "width=2", "--option", "padded=False", "--option", "dropout=0.5"]
    assert cli.main(command) == 0
    names = [name.replace("unet", "fcn32s") for name in RESULTS]
    expected = results(work, names)
    shutil.rmtree("out")
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2, signal.SIGTERM)
        cli.main(command)
    torch.rand(3)  # the process is another
    assert cli.main([*command, "--resume"]) == 0
    assert results(work, names) == expected
    losses = [row.split(b",")[3] for row in expected[0].splitlines()[1:]]
    assert len(set(losses)) == 3


def test_a_second_interrupt_is_at_once(work, monkeypatch):
    original = Trainer.train_step

    def impatient(trainer, *batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return original(trainer, *batch)

    monkeypatch.setattr(Trainer, "train_step", impatient)
    assert cli.main([*SMALL, "--steps", "3"]) == 130
    assert not Path("out/unet.checkpoint").exists()


def test_killed_twenty_times(work):
    """At the n-th call of any function, n drawn at random, in processes that do not know it."""
    command = [*SMALL, "--steps", "30", "--checkpoint-every", "2", "--evaluate-every", "15", "--resume"]
    [whole] = segfast(command, work, kill_at=10**9)
    assert whole.code == 0, whole.output
    expected, rows = results(work), (work / "out/unet.metrics.csv").read_text().splitlines()
    counts = calls_before_steps(whole.output)
    a_step = counts[-1] // 29
    draw = random.Random(0)
    kills, done, steps_at_death = 0, 0, set()
    shutil.rmtree(work / "out")
    while kills < KILLS:
        moment = draw.randint(1, 6 * a_step) if kills % 5 else -draw.randint(1, 10 * a_step)
        [life] = segfast(command, work, kill_at=moment)
        if life.code == 0:
            assert results(work) == expected
            shutil.rmtree(work / "out")
            done = 0
            continue
        assert life.code == -signal.SIGKILL, life.output
        kills += 1
        if (work / "out/unet.checkpoint").exists():
            step = torch.load(work / "out/unet.checkpoint", weights_only=True)["state"]["step"]
            recorded = (work / "out/unet.metrics.csv").read_text().splitlines()
            assert step >= done and step % 2 == 0 and recorded[: step + 1] == rows[: step + 1]
            done = step
            steps_at_death.add(step)
    assert len(steps_at_death) > 3
    [end] = segfast(command, work)
    assert end.code == 0 and results(work) == expected, end.output
    assert [path.name for path in (work / "out").glob(".*")] == []


def test_a_full_disk(work, capsys, monkeypatch):
    """The checkpoint before stays as it was."""
    command = [*SMALL, "--steps", "4", "--checkpoint-every", "1"]
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2, signal.SIGTERM)
        assert cli.main(command) == 128 + signal.SIGTERM
    before = Path("out/unet.checkpoint").read_bytes()
    capsys.readouterr()
    with files_up_to(len(before) // 2):
        code = cli.main([*command, "--resume"])
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert code == 2 and [line for line in lines if line.startswith("segfast")] == lines[-1:]
    assert lines[-1].startswith("segfast: out/unet.checkpoint: cannot be written (")
    assert Path("out/unet.checkpoint").read_bytes() == before
    assert sorted(path.name for path in Path("out").iterdir()) == ["unet.checkpoint", "unet.metrics.csv"]
    assert cli.main([*command, "--resume"]) == 0
