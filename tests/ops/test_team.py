"""Pieces of work on the threads that torch computes with: each once, errors, modes, numbers of threads."""

import ctypes
import threading
from collections import deque

import pytest
import torch

from segfast.ops import _team
from segfast.ops._team import each_on_team, team_size


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.fixture(params=["openmp", "none"])
def openmp(request, monkeypatch):
    if request.param == "none":
        monkeypatch.setattr(_team, "_openmp", lambda: None)
    elif _team._openmp() is None:
        pytest.skip("this torch has no OpenMP that can be found")


def test_each_task_runs_once_on_a_thread_of_the_team(openmp):
    done = []
    each_on_team([lambda thread, task=task: done.append((task, thread)) for task in range(100)])
    assert sorted(task for task, _ in done) == list(range(100))
    assert {thread for _, thread in done} <= set(range(team_size()))


@pytest.fixture
def three_come():
    """OpenMP gives a loop all threads it asks for, where OMP_DYNAMIC says that it need not."""
    if _team._openmp() is None:
        pytest.skip("this torch has no OpenMP that can be found")
    library = ctypes.CDLL(None)
    if library.omp_get_thread_limit() < 3 or library.omp_get_max_active_levels() < 1:
        pytest.skip("OMP_THREAD_LIMIT or OMP_MAX_ACTIVE_LEVELS allows fewer than three threads")
    before = library.omp_get_dynamic()
    library.omp_set_dynamic(0)
    yield
    library.omp_set_dynamic(before)


def test_tasks_run_at_the_same_time(three_come):
    assert team_size() == 3
    together = threading.Barrier(3)
    seen = []

    def task(thread):
        together.wait(600)  # breaks unless three threads come
        seen.append((thread, threading.get_ident()))

    each_on_team([task] * 3)
    assert sorted(thread for thread, _ in seen) == [0, 1, 2]
    assert len({ident for _, ident in seen}) == 3


def test_no_task(openmp):
    each_on_team([])


def test_the_first_error_comes_out_and_the_rest_is_left(openmp, monkeypatch):
    done, cleared = [], threading.Event()

    class Tasks(deque):
        def clear(self):
            super().clear()
            cleared.set()

    monkeypatch.setattr(_team, "deque", Tasks)

    def task(number):
        def run(thread):
            if number == 5:
                raise ValueError("the fifth")
            # Those that another thread has begun end no sooner than the rest is dropped, if it ever is.
            if number > 5 and not cleared.wait(600):
                cleared.set()
            done.append(number)

        return run

    with pytest.raises(ValueError, match="the fifth"):
        each_on_team([task(number) for number in range(1000)])
    assert set(done) <= {*range(5), 6, 7}
    each_on_team([lambda thread: done.append("after")])
    assert done[-1] == "after"


def test_a_task_may_have_tasks(openmp):
    done = []
    inner = [lambda thread, i=i: done.append(i) for i in range(4)]
    each_on_team([lambda thread: each_on_team(inner)] * 5)
    assert sorted(done) == sorted([*range(4)] * 5)


@pytest.mark.parametrize("inference", [False, True])
def test_modes_of_the_caller(openmp, inference):
    seen = []
    with torch.inference_mode(inference), torch.enable_grad():
        each_on_team(
            [lambda thread: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))] * 20
        )
        assert torch.is_grad_enabled()
    assert set(seen) == {(inference, False)}


def test_two_callers_at_once(openmp):
    results = {}

    def run(caller):
        x = torch.full((64, 64), float(caller))
        rows = torch.empty(64, 64)
        for _ in range(20):
            each_on_team(
                [lambda thread, i=i: torch.mm(x[i : i + 1], x, out=rows[i : i + 1]) for i in range(64)]
            )
        results[caller] = bool((rows == 64.0 * caller * caller).all())

    callers = [threading.Thread(target=run, args=(caller,)) for caller in (1, 2)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert results == {1: True, 2: True}


def test_where_a_tracer_looks_on_its_own_thread_does_all():
    from torch._subclasses.fake_tensor import FakeTensorMode

    idents = set()
    with FakeTensorMode():
        assert team_size() == 1
        each_on_team([lambda thread: idents.add(threading.get_ident())] * 10)
    assert idents == {threading.get_ident()}
