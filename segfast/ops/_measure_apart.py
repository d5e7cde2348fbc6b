"""Calls on a GPU compiled and measured in processes of their own: a kernel that faults harms nobody else."""

import contextlib
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence

import torch

from ._apart import MARK, how_many, process_of, run_side_by_side, stop
from ._choice import ATEN, Choice
from ._choice_files import call_row, choice_row, parsed_call, parsed_choice, plain
from ._gpu import gpu_name, keep
from ._gpu_call import GpuCall
from ._gpu_measure import launches, measure

COMMAND = process_of(__name__)


def compile_apart(calls: Sequence[GpuCall], device: torch.device, most: int, end: float) -> None:
    """Compile what will be tried for `calls`, several at a time, until `end` (of `time.perf_counter`).

    Triton's cache on disk hands the kernels on; one that is missing is compiled where it is measured.
    """
    count = min(len(calls), how_many(device))
    commands = [[*COMMAND, "compile", str(device), str(most)]] * count
    inputs = ["".join([_settings(), *map(_line, calls[i::count])]) for i in range(count)]
    run_side_by_side(commands, inputs, end)


class Worker:
    """A process that measures one call after the other. It ends with `close`, or with this process."""

    def __init__(self, device: torch.device, most: int) -> None:
        command = [*COMMAND, "measure", str(device), str(most)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.began = False  # it has answered
        self._ask(_settings())

    def measure(self, call: GpuCall, seconds: float) -> tuple[Choice, bool] | None:
        """The choice, and whether it is to last; None if the process ends, as it does after `seconds`."""
        timer = threading.Timer(min(max(0.0, seconds), threading.TIMEOUT_MAX), self._process.kill)
        timer.start()
        try:
            self._ask(_line(call))
            for line in self._process.stdout or ():
                if line.startswith(MARK):
                    self.began = True
                    answer = json.loads(line.removeprefix(MARK))
                    if answer:
                        return parsed_choice(answer["choice"]), bool(answer["lasting"])
            return None
        finally:
            timer.cancel()

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def close(self) -> None:
        """End the process."""
        stop(self._process)


def measure_apart(
    calls: Sequence[GpuCall],
    device: torch.device,
    most: int,
    end: float,
    on_choice: Callable[[GpuCall, Choice, bool], None],
) -> None:
    """Measure `calls` in this order until `end`; `on_choice` is told of each, and whether it is to last.

    A call in which the process ends is ATen's for now, and another process goes on behind it.
    """
    worker: Worker | None = None
    try:
        for call in calls:
            if time.perf_counter() >= end:
                break
            worker = worker or Worker(device, most)
            answer = worker.measure(call, end - time.perf_counter())
            if answer is not None:
                on_choice(call, *answer)
                continue
            worker.close()
            if time.perf_counter() >= end:
                break
            if not worker.began:
                warnings.warn("segfast: the process that measures does not start", stacklevel=2)
                break
            on_choice(call, Choice(ATEN, {}), False)
            worker = None
    finally:
        if worker is not None:
            worker.close()


def _settings() -> str:
    """The first line that a process is given: how cuDNN is used here."""
    cudnn = torch.backends.cudnn
    return json.dumps({"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}) + "\n"


def _line(call: GpuCall) -> str:
    return json.dumps(call_row(call), default=plain) + "\n"


def main(what: str, name: str, most: str) -> int:
    """Compile or measure the calls on standard input, a line each; answer with a line for each."""
    device = torch.device(name)
    for knob, value in json.loads(sys.stdin.readline()).items():
        setattr(torch.backends.cudnn, knob, value)
    _answer({})
    gpu = gpu_name(-1 if device.index is None else device.index)
    for line in iter(sys.stdin.readline, ""):
        call = parsed_call(json.loads(line), gpu)
        assert isinstance(call, GpuCall)
        if what == "compile":
            torch.set_num_threads(1)  # as many processes as cores do the same
            _compile(call, device, int(most))
        else:
            choice, lasting = _measured(call, device, int(most))
            keep(call, choice)  # for what consists of it
            _answer({"choice": choice_row(choice), "lasting": lasting})
    return 0


def _measured(call: GpuCall, device: torch.device, most: int) -> tuple[Choice, bool]:
    """What `measure` says; ATen for now where memory is short. Where the device is lost the process ends."""
    try:
        return measure(call, device, most), True
    except RuntimeError as error:
        print(f"segfast: {call}: {error}", file=sys.stderr)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return Choice(ATEN, {}), False


def _answer(content: object) -> None:
    print(f"{MARK}{json.dumps(content)}", flush=True)


def _compile(call: GpuCall, device: torch.device, most: int) -> None:
    """Compile what `measure` will try; a kernel that cannot be is left to it to find out."""
    with contextlib.suppress(RuntimeError):
        for plan, pointers in launches(call, device, most):
            with contextlib.suppress(Exception):
                plan.warmup(*pointers)
