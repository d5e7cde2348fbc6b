"""Calls on a GPU measured in processes of their own: what becomes of a call that ends its process."""

import io
import json
import logging
import math
import os
import types
from pathlib import Path

import pytest
import torch

import segfast
from segfast.ops import _apart, _choice_files, _gpu, _gpu_tune, _measure_apart
from segfast.ops._choice import ATEN, Choice, choices
from segfast.ops._measure_apart import compile_apart, measure_apart
from tests.forget import forget
from tests.ops.test_gpu import CALL

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda", 0)
# What a process measures and compiles: by the height of the images it is right, or ends the process.
STAND_IN = """
import os, sys, time

if os.environ.get("STAND_IN_DIES"):
    os._exit(3)
if "segfast.ops._measure_apart" in " ".join(sys.orig_argv):
    from segfast.ops import _gpu, _gpu_measure
    from segfast.ops._choice import Choice

    def note(what, call):
        with open(os.environ["STAND_IN_LOG"], "a") as log:
            log.write(f"{what} {call.images[0][2]} {call.gpu}\\n")

    def measure(call, device, most, without):
        note("measure", call)
        print(f"without {without}", file=sys.stderr)
        print("a line of somebody else's")
        print("[INFO] one that looks like JSON")
        from segfast.ops._choice import choices

        with open(os.environ["STAND_IN_LOG"], "a") as log:
            log.write(f"known {len(choices().measured)}\\n")
        height = call.images[0][2]
        if height == 3:
            os._exit(7)
        if height == 4:
            raise ValueError("no such tile")
        if height == 6:
            raise RuntimeError("out of memory\\nof which there is little")
        if height == 5:
            time.sleep(1000)
        tiles = ("conv2d_forward", "ci8-co4-t9-g1-s1d1-bfloat16-p8", (16, 16, 16, 4, most, 1, ""))
        return Choice("triton", {"aten": 2.0, "triton": 1.0}, (tiles,), tuple(without))

    class Launch:
        def __init__(self, call):
            self.call = call

        def warmup(self, *pointers):
            if self.call.images[0][2] == 3:
                raise ValueError("no such tile")
            note("compile", self.call)

    def launches(call, device, most):
        if call.images[0][2] == 7:
            raise ValueError("no such file")
        for pointers in range(2):
            yield Launch(call), (pointers,)

    import torch

    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *device: None
    _gpu.gpu_name = lambda index: "nvidia-h200"
    _gpu_measure.measure, _gpu_measure.launches = measure, launches
"""


def of(height):
    return CALL._replace(images=((1, 8, height, 16),))


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch, pretended_gpu):
    """log(): what processes have measured and compiled."""
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    file = tmp_path / "log"
    file.write_text("")
    monkeypatch.setenv("STAND_IN_LOG", str(file))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(_measure_apart, "unproven", lambda call, device: ())

    def lines(what):
        return [int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(what)]

    return lines


def measured(*heights, end=math.inf, on_choice=lambda call, choice: None):
    found = {}

    def take(call, choice):
        found[call.images[0][2]] = choice
        on_choice(call, choice)

    measure_apart([of(height) for height in heights], DEVICE, 4, end, take)
    return found


def test_choices_come_back_with_their_times_and_tiles(log):
    tiles = ("conv2d_forward", "ci8-co4-t9-g1-s1d1-bfloat16-p8", (16, 16, 16, 4, 4, 1, ""))
    right = Choice("triton", {ATEN: 2.0, "triton": 1.0}, (tiles,))
    assert measured(16, 17) == {16: right, 17: right}
    assert log("measure") == [16, 17]


def test_a_call_in_which_the_process_ends_has_a_reason_and_the_others_go_on(log, capfd, caplog):
    caplog.set_level(logging.INFO, "segfast")
    found = measured(16, 3, 17, 4, 18, 6, 19)
    assert [height for height, choice in found.items() if isinstance(choice, Choice)] == [16, 17, 18, 19]
    assert found[3] == "the process ended with code 7: without ()"
    assert found[4] == "the process ended with code 1: ValueError: no such tile"
    assert found[6] == "RuntimeError: out of memory"
    assert log("measure") == [16, 3, 17, 4, 18, 6, 19]  # none of them twice
    assert capfd.readouterr() == ("", "")  # tracebacks are kept
    assert caplog.text.count("Traceback") == 2 and "of which there is little" in caplog.text


def test_one_that_ends_before_its_first_call_is_not_tried_again(log, monkeypatch):
    monkeypatch.setenv("STAND_IN_DIES", "1")
    with pytest.warns(UserWarning, match="nothing is measured: the process ended with code 3"):
        assert measured(16, 17) == {}
    assert log("measure") == []


def test_at_the_end_of_the_budget_it_is_killed(log, monkeypatch):
    now, timers = [0.0], []

    class Timer:
        """One that fires where the test says so."""

        def __init__(self, seconds, function):
            timers.append((seconds, function))

        def start(self):
            pass

        cancel = start

    monkeypatch.setattr(_measure_apart, "threading", types.SimpleNamespace(Timer=Timer, TIMEOUT_MAX=1e6))
    monkeypatch.setattr(_measure_apart, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def over(call, choice):
        now[0] = 10.0
        timers[-1][1]()

    found = measured(16, 5, 17, end=9.0, on_choice=over)
    assert set(found) == {16}  # what was begun then is nobody's
    assert [seconds for seconds, _ in timers] == [9.0]
    assert measured(16, end=9.0) == {} and len(timers) == 1  # nothing is begun any more


@pytest.mark.filterwarnings("error")  # pytest's, of an exception in a thread
def test_no_end_is_none():
    assert set(measured(16, end=math.inf)) == {16}


def test_what_will_be_tried_is_compiled_by_several(log, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    compile_apart([of(height) for height in (16, 3, 17, 18)], DEVICE, 4, math.inf)
    assert sorted(log("compile")) == [16, 16, 17, 17, 18, 18]  # one that cannot be is left out
    assert log("measure") == []


def test_nothing_is_compiled_of_what_is_not_proven(log, monkeypatch):
    monkeypatch.setattr(_measure_apart, "unproven", lambda call, device: ("triton",) * (call == of(17)))
    compile_apart([of(16), of(17)], DEVICE, 4, math.inf)
    compile_apart([of(17)], DEVICE, 4, math.inf)
    assert log("compile") == [16, 16]


def test_a_process_that_compiles_and_fails_is_a_line(log, monkeypatch, capfd, caplog):
    caplog.set_level(logging.INFO, "segfast")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    said = r"of 2 processes that compile kernels 1 failed \(.*code 1: ValueError: no such file\)"
    with pytest.warns(UserWarning, match=said) as warned:
        compile_apart([of(16), of(7), of(17)], DEVICE, 4, math.inf)
    assert len(warned) == 1
    assert log("compile") == [16, 16, 17, 17]
    assert capfd.readouterr() == ("", "") and "Traceback" in caplog.text


@pytest.mark.parametrize(
    ("cores", "free", "processes"), [(64, 1 << 40, 5), (64, 7 << 30, 2), (64, 0, 1), (3, 1 << 40, 3)]
)
def test_as_many_compile_as_cores_and_memory_allow(cores, free, processes, monkeypatch):
    started = []

    class Process:
        """One that takes its calls and ends."""

        stdout, returncode = None, 0

        def __init__(self, *args, **kwargs):
            self.stdin = io.StringIO()
            self.stdin.close = lambda: None
            started.append(self)

        def wait(self, seconds=None):
            return 0

        kill = poll = wait

    monkeypatch.setattr(_apart, "Child", Process)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    calls = [of(height) for height in range(16, 21)]
    compile_apart(calls, DEVICE, 4, math.inf)
    assert len(started) == processes
    lines = [json.loads(line) for each in started for line in each.stdin.getvalue().splitlines()[1:]]
    assert sorted(line["call"]["images"][0][2] for line in lines) == [16, 17, 18, 19, 20]


@pytest.mark.parametrize("apart", [False, True])
class TestKeeping:
    @pytest.fixture(autouse=True)
    def here(self, monkeypatch, apart):
        monkeypatch.setattr(_gpu_tune, "APART", apart)
        monkeypatch.setattr(_gpu_tune, "measure", lambda *args: Choice("triton", {"triton": 1.0, ATEN: 2.0}))
        return monkeypatch

    def test_what_is_measured_is_remembered(self, apart):
        told = []
        calls = [of(16), of(18)._replace(operation="up_concat"), of(17)]
        found = _gpu_tune.measure_and_keep(calls, DEVICE, on_call=told.append)
        # The largest first, and what consists of others last.
        assert list(found) == told == [of(17), of(16), calls[1]]
        assert {choice.name for choice in found.values()} == {"triton"}
        assert choices().measured == found
        forget()
        assert _choice_files.read_gpu("nvidia-h200") == found
        assert _gpu.can_choose(0) and choices().measured == found

    def test_without_a_budget_nothing_is(self, apart):
        assert _gpu_tune.measure_and_keep([of(16)], DEVICE, budget_s=-1) == {}
        assert not choices().measured


def test_what_came_of_an_accident_is_not_written(monkeypatch):
    monkeypatch.setattr(_gpu_tune, "APART", True)
    monkeypatch.setattr(_gpu_tune, "prove_missing", lambda calls, device: None)
    said = "conv2d of 1x8x3x16 by 4x8x3x3, bfloat16 was not measured and stays ATen's for now: the process "
    with pytest.warns(UserWarning, match=said):
        found = _gpu_tune.measure_and_keep([of(16), of(3)], DEVICE)
    assert found[of(3)] == Choice(ATEN, {}) == choices().measured[of(3)]
    with segfast.autotune(), pytest.warns(UserWarning, match=said):
        assert _gpu_tune.measure_now(of(3), DEVICE) == Choice(ATEN, {})
    assert set(_choice_files.read_gpu("nvidia-h200")) == {of(16)}


def test_a_process_knows_what_it_has_chosen(log):
    """For operations that consist of others."""
    measured(16, 17)
    assert log("known") == [0, 1]


def test_a_process_is_told_what_is_not_proven(monkeypatch):
    """It has not read what is proven while it runs, nor what could not be written."""
    proven = {16: (), 17: ("triton",), 18: ()}
    monkeypatch.setattr(_measure_apart, "unproven", lambda call, device: proven[call.images[0][2]])
    assert {height: choice.unproven for height, choice in measured(16, 17, 18).items()} == proven


def test_where_no_process_can_be_started_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(_gpu_tune, "APART", True)
    monkeypatch.setattr(_measure_apart, "COMMAND", ("/nowhere/python",))
    with pytest.warns(UserWarning, match="no process can be started"):
        assert _gpu_tune.measure_and_keep([of(16)], DEVICE) == {}


def test_autotune_asks_one_process_again_and_again_and_ends_it(log, monkeypatch):
    monkeypatch.setattr(_gpu_tune, "APART", True)
    monkeypatch.setattr(_gpu_tune, "prove_missing", lambda calls, device: None)
    with segfast.autotune():
        assert _gpu_tune.measure_now(of(16), DEVICE).name == "triton"
        (worker,) = _gpu_tune._workers.values()
        assert _gpu_tune.measure_now(of(17), DEVICE).name == "triton"
        assert list(_gpu_tune._workers.values()) == [worker]
        with pytest.warns(UserWarning, match="not measured"):
            assert _gpu_tune.measure_now(of(3), DEVICE) == Choice(ATEN, {})  # where it ends
        assert not _gpu_tune._workers
        assert _gpu_tune.measure_now(of(18), DEVICE).name == "triton"
    assert not _gpu_tune._workers
    assert log("measure") == [16, 17, 3, 18]


def test_an_interrupted_answer_is_not_the_next_calls(log, monkeypatch):
    monkeypatch.setattr(_gpu_tune, "APART", True)
    monkeypatch.setattr(_gpu_tune, "prove_missing", lambda calls, device: None)
    ask = _measure_apart.Worker._ask

    def interrupted(worker, line):
        ask(worker, line)
        if "call" in line:
            raise KeyboardInterrupt

    with segfast.autotune():
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(_measure_apart.Worker, "_ask", interrupted)
            _gpu_tune.measure_now(of(6), DEVICE)
        assert not _gpu_tune._workers
        assert _gpu_tune.measure_now(of(16), DEVICE).name == "triton"
