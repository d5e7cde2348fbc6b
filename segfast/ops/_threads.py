"""Work on a CPU in few large pieces, on threads of our own that PyTorch computes on one by one.

PyTorch divides each operation between its threads and waits for the slowest, hundreds of times a call. Beside
other processes some thread is always not running, and every wait takes as long as a turn of the scheduler's.
Here a thread computes whole operations on a piece of the rows. Who is free takes the next piece, so that one
that is not running holds up a piece and not all of them, and there are few points at which all must be done.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

from ._operator import is_traced

Result = TypeVar("Result")
Task = Callable[[], object]


class _Here(threading.local):
    """State of a thread of ours: the pool it belongs to, and how many threads that has."""

    pool: ThreadPoolExecutor | None = None
    threads = 1


_here = _Here()
_starting = threading.Lock()


def on_threads(like: Tensor, compute: Callable[[], Result]) -> Result:
    """`compute()` of tensors like this one, in which `each` divides work between threads, as many as torch's.

    What it computes, autograd and tracers need not see. The caller's number of threads stays as it was. On
    other devices than a CPU, on one thread, or where a tracer looks on, the caller computes alone.
    """
    if not like.is_cpu or _here.pool is not None or is_traced():
        return compute()
    with _starting:
        threads = torch.get_num_threads()
        pool = _workers(threads) if threads > 1 else None
    if pool is None:
        return compute()
    return pool.submit(_in_pool(pool, threads, compute)).result()


def threads_here() -> int:
    """How many threads `each` has for the tasks of the one that asks."""
    return _here.threads


def each(tasks: Iterable[Task], at_once: int | None = None) -> None:
    """Runs the tasks, which do not depend on each other, and returns when all have ended.

    Inside of `on_threads` by all threads that are free, though at most `at_once`; else one by one.
    """
    left = deque(tasks)
    threads = min(_here.threads, len(left), at_once or _here.threads)

    def take() -> None:
        try:
            while left:
                try:
                    task = left.popleft()
                except IndexError:  # another thread was faster
                    return
                task()
        except BaseException:
            left.clear()
            raise

    if threads < 2:
        return take()
    pool = _here.pool
    assert pool is not None
    # Tasks that divide their own work share the threads evenly.
    all_threads = _here.threads
    helper = _in_pool(pool, all_threads // threads, take)
    helpers = [pool.submit(helper) for _ in range(threads - 1)]
    try:
        _here.threads = all_threads // threads
        take()
    finally:
        _here.threads = all_threads
        # One that has not begun has nothing left to take.
        begun = [other for other in helpers if not other.cancel()]
        wait(begun)
    for other in begun:
        other.result()


def each_image(compute: Callable[[int], Tensor], images: int) -> list[Tensor]:
    """`[compute(0), ..., compute(images - 1)]`, inside of `on_threads` several of them at once."""
    results: list[Tensor | None] = [None] * images

    def one(i: int) -> None:
        results[i] = compute(i)

    each([functools.partial(one, i) for i in range(images)], _MOST_IMAGES_AT_ONCE)
    return [result for result in results if result is not None]


# Each image needs memory of its own while it is computed.
_MOST_IMAGES_AT_ONCE = 8


def _in_pool(pool: ThreadPoolExecutor, threads: int, compute: Callable[[], Result]) -> Callable[[], Result]:
    inference = torch.is_inference_mode_enabled()

    def run() -> Result:
        _here.pool, _here.threads = pool, threads
        with torch.inference_mode(inference), torch.no_grad():
            return compute()

    return run


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """So many threads, in each of which torch computes on that one thread.

    `torch.set_num_threads` is about the thread that calls it, and about those that have not computed or asked
    for their number yet: for them another thread takes it back. All start here, so that this is over when the
    first call returns.
    """
    pool = ThreadPoolExecutor(threads, "segfast")
    everyone = threading.Barrier(threads)

    def begin() -> int:
        before = torch.get_num_threads()
        everyone.wait()
        torch.set_num_threads(1)
        return before

    try:
        begun = [pool.submit(begin) for _ in range(threads)]
    except BaseException:
        everyone.abort()  # no more threads are to be had
        raise
    before = max(one.result() for one in begun)
    other = threading.Thread(target=torch.set_num_threads, args=(before,))
    other.start()
    other.join()
    return pool


def _forget_threads() -> None:
    """In a forked process the threads are gone."""
    global _starting, _here
    _starting, _here = threading.Lock(), _Here()
    _workers.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
