"""Processes of their own, in which kernels are compiled, proven and measured."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

MARK = "segfast: "  # of the lines that are read from such a process, whatever else it prints
_MOST_PROCESSES = 16
_PROCESS_BYTES = 3 << 30  # of the GPU's memory: a context and a layer's tensors


def process_of(module: str) -> tuple[str, ...]:
    """The command that runs a module's `main`: this package is found even where it is not installed."""
    folder = str(Path(__file__).parents[2])
    code = (
        f"import sys; sys.path.append({folder!r}); from {module} import main; sys.exit(main(*sys.argv[1:]))"
    )
    return (sys.executable, "-c", code)


def how_many(device: torch.device) -> int:
    """Processes side by side: as many as there are cores and memory of the GPU, at least one."""
    free = torch.cuda.mem_get_info(device)[0] // _PROCESS_BYTES
    return max(1, min(os.cpu_count() or 1, _MOST_PROCESSES, free))


def run_side_by_side(commands: Sequence[Sequence[str]], inputs: Sequence[str], end: float) -> None:
    """Run these, each with its input, until they are done or it is `end` (of `time.perf_counter`)."""
    nowhere = subprocess.DEVNULL
    processes: list[subprocess.Popen] = []
    try:
        for command, given in zip(commands, inputs, strict=True):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, text=True
            )
            processes.append(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(given)
        for process in processes:
            left = max(0.0, end - time.perf_counter())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(left, threading.TIMEOUT_MAX))
    finally:
        stop(*processes)


def stop(*processes: subprocess.Popen) -> None:
    """End them, whatever they do."""
    for process in processes:
        process.kill()
    for process in processes:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        process.wait()
