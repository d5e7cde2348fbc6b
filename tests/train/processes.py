"""Commands in processes of their own, forked from one that has imported torch once and used no threads."""

import multiprocessing
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FROM_SERVER = multiprocessing.get_context("forkserver")
FROM_SERVER.set_forkserver_preload(
    [
        *("segfast.commands.train", "torch._dynamo", "tqdm", "PIL.Image", "safetensors.torch"),
        *("torch.distributed.fsdp", "torch.distributed.tensor"),
    ]
)


class Ended(NamedTuple):
    """A process that has ended: its exit code, or minus the signal that killed it, and what it printed."""

    code: int
    output: str


def segfast(
    arguments: Sequence[str], folder: Path, *, ranks: int = 1, kill_at: int = 0, signal_at: int = 0
) -> list[Ended]:
    """Run `segfast` with these arguments in `folder`, as torchrun does if there are several ranks.

    Args:
        arguments: of the command.
        folder: where it runs.
        ranks: processes.
        kill_at: the number of the call, of any function, before which it gets SIGKILL; 0 for none. Counted
            from the start if negative, else from the first training step.
        signal_at: the number of the training step in which the last rank gets SIGTERM; 0 for none.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(ranks):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = folder / f"rank{rank}.log"
        last = signal_at if rank == ranks - 1 else 0
        process = FROM_SERVER.Process(target=_run, args=(arguments, folder, environment, log, kill_at, last))
        process.start()
        started.append((process, log))
    for process, _ in started:
        process.join()
    return [Ended(process.exitcode, log.read_text()) for process, log in started]


def calls_before_steps(log: str) -> list[int]:
    """The calls that a process counted before each training step, from what it printed."""
    return [int(count) for count in re.findall(r"calls before a step: (\d+)", log)]


def _run(arguments, folder, environment, log, kill_at, signal_at):
    import torch

    from segfast.cli import main
    from segfast.commands import train
    from segfast.train import Trainer

    from .conftest import UNDRAWN

    vars(train).update(UNDRAWN)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    # Threads that wait for Python get it only when the one that has it waits, too: the worst of orders.
    sys.setswitchinterval(100)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    original = Trainer.train_step
    count = 0

    def watched(trainer, *batch):
        if kill_at:
            print("calls before a step:", count, flush=True)
            sys.setprofile(counting)
        if trainer.step + 1 == signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *batch)

    Trainer.train_step = watched

    def counting(frame, event, argument):
        nonlocal count
        if event in ("call", "c_call"):
            count += 1
            if count == abs(kill_at):
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at < 0:
        sys.setprofile(counting)
    sys.exit(main(arguments))
