"""Work on a CPU on the threads that torch computes with: the team of OpenMP behind its operators.

After each of torch's operators its threads wait for the next one on their cores, for milliseconds, before
they sleep. Threads of anyone else share the cores with them until then. So work that is cut into pieces, each
to stay in one core's own cache, is done by these threads too: inside of a loop of OpenMP's torch does not
divide an operator again, so that each thread computes whole operators.
"""

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ._operator import is_traced

Task = Callable[[int], object]

_Loop = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _OpenMP(NamedTuple):
    """GOMP_parallel(loop, data, threads, flags), which compiled code calls, and omp_get_thread_num()."""

    parallel: Any
    number: Any


def team_size() -> int:
    """How many threads `each_on_team` may use; one where a tracer looks on, which sees its own alone."""
    return 1 if is_traced() or _openmp() is None else torch.get_num_threads()


def each_on_team(tasks: Iterable[Task]) -> None:
    """Run `task(i)` for each task, on thread i of the team, and return when all have ended.

    A thread that is done takes the next one. Without gradients. Raises the first error of a task.
    """
    left = deque(tasks)
    failed: list[BaseException] = []
    inference = torch.is_inference_mode_enabled()
    threads = min(team_size(), len(left))

    def take(number: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while left:
                try:
                    task = left.popleft()
                except IndexError:  # another thread was faster
                    return
                task(number)

    if threads < 2:
        return take(0)
    openmp = _openmp()
    assert openmp is not None

    def loop(_: Any) -> None:
        try:
            take(openmp.number())
        except BaseException as error:  # nothing may pass through OpenMP's own code
            left.clear()
            failed.append(error)

    openmp.parallel(_Loop(loop), None, threads, 0)
    if failed:
        raise failed[0]


@functools.cache
def _openmp() -> _OpenMP | None:
    """The OpenMP that torch uses; None where it has another way to divide work, or another platform's.

    Torch's library finds these names where the process looks for them, as this does.
    """
    if not torch.backends.openmp.is_available():
        return None
    try:
        library = ctypes.CDLL(None)
        parallel, number = library.GOMP_parallel, library.omp_get_thread_num
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [_Loop, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    number.restype = ctypes.c_int
    return _OpenMP(parallel, number)
