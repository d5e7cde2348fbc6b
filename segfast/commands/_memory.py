"""The most memory that a call holds at once: on a GPU by torch's allocator, on a CPU by torch's profiler."""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

MEMORY_KINDS = {
    "cuda": "torch.cuda.max_memory_allocated, above what was held before the call",
    "cpu": "torch's own allocations, above what was held before the call; libraries' scratch is not seen",
}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most memory held at once during `run`, above what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    return max(bytes_held(run)[0])


def bytes_held(run: Callable[[], Any]) -> tuple[list[int], Any]:
    """On a CPU: what is held at each moment of `run`, the end too, above what was before; and its result."""
    from torch.profiler import ProfilerActivity, profile

    with profiler_silenced(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    return list(itertools.accumulate(changes, initial=0)), result


@contextlib.contextmanager
def profiler_silenced() -> Iterator[None]:
    """libkineto writes its progress to file descriptor 2."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
