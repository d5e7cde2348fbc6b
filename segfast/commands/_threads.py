"""How many threads torch computes with."""

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside the block, or in the function that this decorates.

    Small layers gain little from a second thread, and lose much to it on a busy machine.
    """
    threads, process = torch.get_num_threads(), os.getpid()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        # A process forked inside has not got those threads.
        if os.getpid() == process:
            torch.set_num_threads(threads)
