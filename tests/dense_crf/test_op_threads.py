"""The dense CRF on several threads of a CPU: few pieces, the same results, all numbers of threads kept."""

import threading

import pytest
import torch

from segfast.functional import gaussian_filter, mean_field
from segfast.ops import _threads as threads
from segfast.ops.dense_crf import inference, simplices
from segfast.ops.dense_crf.chunks import chunks_of
from segfast.ops.dense_crf.lattice import Lattice, LatticeFilter

from .test_op import energies

LONG = 300  # seconds after which something hangs


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def problem(labels=3, height=97, width=101, batch=1):
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(batch, 3, height, width, generator=generator)
    return energies(labels, height, width, batch=batch), image


def in_threads(*functions):
    """The result of each, or its error, in a thread of its own, all at once."""
    results = [None] * len(functions)

    def run(i, function):
        results[i] = function()

    running = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return results


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_operations_wait_for_no_thread(two_threads, monkeypatch, method):
    """PyTorch divides an operation between threads, and waits for all, where it may use more than one."""
    allowed = []

    def spy(module, name):
        function = getattr(module, name)

        def watched(*arguments, **options):
            allowed.append(torch.get_num_threads())
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    spy(torch, "embedding_bag" if method == "lattice" else "matmul")
    spy(inference, "_softmax")
    spy(simplices, "_simplices")
    unary, image = problem(height=40, width=41)
    mean_field(unary, image, iterations=2, method=method)
    gaussian_filter(unary, image, method=method)
    assert len(allowed) > 20 and set(allowed) == {1}


def test_all_wait_for_each_other_only_between_the_passes_over_a_lattice(two_threads, monkeypatch):
    points = []

    def spy(tasks, *options):
        points.append(tasks := list(tasks))
        return threads.each(tasks, *options)

    monkeypatch.setattr(inference, "each", spy)
    unary, image = problem()
    mean_field(unary, image, iterations=4, method="lattice")
    # Of five features a splat, six blurs and the update, beside which the spatial term runs; one at first.
    assert len(points) == 1 + 4 * 8


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_results_do_not_depend_on_the_number_of_threads(method):
    unary, image = problem(height=59, width=71) if method == "exact" else problem()
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(mean_field(unary, image, iterations=3, method=method))
        assert torch.get_num_threads() == count
    torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0 if method == "lattice" else 1e-6)


def test_images_at_once_are_computed_in_fewer_pieces_each(two_threads):
    """A thread may wait for the others between two calls; within an image it shares the work with none."""

    def pieces(i=0):
        return torch.tensor([len(chunks_of(rows)) for rows in (5000, 40000, 100000)])

    like = torch.empty(0)
    alone = threads.on_threads(like, pieces)
    assert (alone % 2 == 0).all(), "two threads do not share them evenly"
    for one in threads.on_threads(like, lambda: threads.each_image(pieces, 2)):
        assert (one < alone).all()


@pytest.mark.parametrize("built, used", [(1, 2), (2, 1)])
def test_a_lattice_is_used_on_other_threads_than_it_was_built_on(built, used):
    unary, image = problem()
    rows, points = unary[0].flatten(1).T.contiguous(), image[0].flatten(1).T / 40
    before, results = torch.get_num_threads(), []
    try:
        for first, second in ((built, used), (1, 1)):
            torch.set_num_threads(first)
            term = inference.Term(LatticeFilter(Lattice(points.contiguous())), 0.01)
            torch.set_num_threads(second)
            results.append(inference.infer(rows, [term], 3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_one_that_is_held_up_holds_up_no_other_task(two_threads):
    """The first task ends when all others have: nobody has them set aside for it."""
    done, others = [], threading.Semaphore(0)

    def first():
        for _ in range(9):
            assert others.acquire(timeout=LONG)
        done.append(0)

    def other(i):
        done.append(i)
        others.release()

    tasks = [first, *[lambda i=i: other(i) for i in range(1, 10)]]
    threads.on_threads(torch.empty(0), lambda: threads.each(tasks))
    assert sorted(done) == [*range(10)] and done[-1] == 0


def test_no_more_at_once_than_asked_for(two_threads):
    torch.set_num_threads(4)
    lock, now, most = threading.Lock(), [], []

    def task():
        with lock:
            now.append(1)
            most.append(len(now))
        torch.randn(1000, 100).exp()
        with lock:
            now.pop()

    threads.on_threads(torch.empty(0), lambda: threads.each([task] * 40, 2))
    torch.set_num_threads(2)
    assert len(most) == 40 and max(most) <= 2


@pytest.mark.parametrize("culprit", range(6))
def test_what_fails_on_a_thread_is_raised_and_the_threads_are_given_back(two_threads, culprit):
    def compute(i):
        if i == culprit:
            raise ValueError(f"image {i}")
        return torch.ones(1)

    with pytest.raises(ValueError, match=f"image {culprit}"):
        threads.on_threads(torch.empty(0), lambda: threads.each_image(compute, 6))
    assert (
        len(threads.on_threads(torch.empty(0), lambda: threads.each_image(lambda i: torch.ones(1), 6))) == 6
    )


def test_numbers_of_threads_stay_as_they_were_for_callers_at_once():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    unary, image = problem(height=30, width=40)
    barrier, lock = threading.Barrier(3), threading.Lock()

    def caller(count):
        def call():
            with lock:
                torch.set_num_threads(count)
                # A thread's number is the one set last, by whichever, until it has asked for it.
                torch.get_num_threads()
            barrier.wait(LONG)
            seen = []
            for _ in range(3):
                mean_field(unary, image, iterations=2, method="lattice")
                seen.append(torch.get_num_threads())
            barrier.wait(LONG)
            return seen

        return call

    # A number of threads that nobody had before: they start now.
    assert in_threads(*map(caller, (6, 7, 8))) == [[6] * 3, [7] * 3, [8] * 3]
    assert torch.get_num_threads() == 3
    torch.set_num_threads(9)
    mean_field(unary, image, iterations=1, method="lattice")
    # Threads that come later have the caller's number, and not that of our threads.
    assert in_threads(*[torch.get_num_threads] * 20) == [9] * 20 and torch.get_num_threads() == 9
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["lattice", "exact"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_images_on_threads_are_images_one_by_one(two_threads, monkeypatch, method, mode):
    unary, image = energies(5, 13, 11, batch=3), 255 * torch.rand(3, 3, 13, 11)
    seen = set()
    infer = inference.infer

    def spy(*arguments):
        seen.add(threading.current_thread().name)
        return infer(*arguments)

    monkeypatch.setattr("segfast.ops.dense_crf.compute.infer", spy)
    with mode():
        together = mean_field(unary, image, iterations=2, method=method)
        assert threading.main_thread().name not in seen
        alone = [mean_field(u, i, iterations=2, method=method) for u, i in zip(unary, image, strict=True)]
    assert together.is_inference() == (mode is torch.inference_mode)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_gradients_on_threads_are_those_on_one():
    unary, image = problem(height=40, width=50)
    before, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        for method in ("lattice", "exact"):
            inputs = [unary.clone().requires_grad_(), image.clone().requires_grad_()]
            q = mean_field(*inputs, iterations=2, method=method)
            found.append(torch.autograd.grad(q[:, 0].square().sum(), inputs))
    torch.set_num_threads(before)
    for one, two in zip(found[:2], found[2:], strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_calls_at_once_share_no_table(two_threads):
    features, values = torch.rand(400, 3), torch.rand(8, 400, 6)
    kernel = LatticeFilter(Lattice(features))
    expected = [kernel(v) for v in values]
    assert len(kernel._kept) == 1

    def run(i):
        for _ in range(20):
            result = kernel(values[i])
        return result

    found = in_threads(*[lambda i=i: run(i) for i in range(len(values))])
    assert all(map(torch.equal, found, expected))


def test_tasks_that_divide_their_own_work_share_the_threads(two_threads):
    shares = []

    def run():
        threads.each([lambda: shares.append(threads._here.threads)] * 4)
        shares.append(threads._here.threads)

    threads.on_threads(torch.empty(0), run)
    assert shares == [1, 1, 1, 1, 2]
