"""Processes of their own, in which kernels are compiled, proven and measured."""

import collections
import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

MARK = "segfast: "  # of the lines that are read from such a process, whatever else it prints
_MOST_PROCESSES = 16
_PROCESS_BYTES = 3 << 30  # of the GPU's memory: a context and a layer's tensors
_MOST_LINES = 400  # of what a process says on its standard error; the last ones are kept
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit)\b")
# Tells at level INFO all that a process said which failed: tracebacks.
log = logging.getLogger("segfast")


class Child(subprocess.Popen):
    """A process of ours. What it says on its standard error is kept, not shown: `why` sums it up."""

    def __init__(self, command: Sequence[str], stdout: int = subprocess.PIPE) -> None:
        pipe = subprocess.PIPE
        super().__init__(command, stdin=pipe, stdout=stdout, stderr=pipe, text=True, errors="replace")
        self._said: collections.deque[str] = collections.deque(maxlen=_MOST_LINES)
        # The thread's own: it reads to the end, and closes.
        stream, self.stderr = self.stderr, None
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()
        self._timed_out = False

    def _read(self, stream) -> None:
        with stream:
            self._said.extend(stream)

    def time_out(self) -> None:
        """End the process, which took too long, as `why` then says."""
        self._timed_out = True
        self.kill()

    def why(self) -> str:
        """In a line, how the process ended; all it said goes to the log."""
        code = self.wait()
        self._reader.join(1.0)
        lines = [line.rstrip() for line in list(self._said) if line.strip()]
        if lines:
            log.info("a process ended with code %s:\n%s", code, "\n".join(lines))
        if self._timed_out:
            return "it took too long"
        if not lines:
            return f"the process ended with code {code}"
        last = next((line for line in reversed(lines) if _EXCEPTION.match(line)), lines[-1])
        return f"the process ended with code {code}: {last[:200]}"


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


def compile_side_by_side(commands: Sequence[Sequence[str]], inputs: Sequence[str], end: float) -> None:
    """Run these, each with its input, until they are done or it is `end` (of `time.perf_counter`).

    One that fails is a warning: what it has not compiled is compiled where it is needed.
    """
    processes: list[Child] = []
    try:
        for command, given in zip(commands, inputs, strict=True):
            process = Child(command, stdout=subprocess.DEVNULL)
            processes.append(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(given)
        for process in processes:
            left = max(0.0, end - time.perf_counter())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(left, threading.TIMEOUT_MAX))
        failed = [process.why() for process in processes if process.poll()]
        if failed:
            warnings.warn(
                f"segfast: of {len(processes)} processes that compile kernels {len(failed)} failed "
                f"({failed[0]}); what they left is compiled where it is needed",
                stacklevel=2,
            )
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
