"""In a forked process torch computes on one thread.

The threads of OpenMP that torch has used before are not in the new process, which would wait for them for
ever. As a `DataLoader`'s workers do, it computes on one thread instead; `torch.set_num_threads` raises the
number again where the parent has not computed.
"""

import multiprocessing
import os

import torch


def compute_on_one_thread_where_forked() -> None:
    """Use one thread in processes forked from this one, and in this one if `multiprocessing` has forked it.

    Another process that was forked before segfast was imported is not to be told from one that was not.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_compute_on_one_thread)
    if _forked_by_multiprocessing():
        _compute_on_one_thread()


def _compute_on_one_thread() -> None:
    torch.set_num_threads(1)


def _forked_by_multiprocessing() -> bool:
    if multiprocessing.parent_process() is None:
        return False
    # A context's processes name its method, those of no context have the default one.
    own = getattr(multiprocessing.current_process(), "_start_method", None)
    return (own or multiprocessing.get_start_method(allow_none=True)) == "fork"
