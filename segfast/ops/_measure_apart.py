"""Calls on a GPU compiled and measured in processes of their own: a kernel that faults harms nobody else."""

import contextlib
import json
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence

import torch

from .._errors import describe
from ._apart import MARK, Child, compile_side_by_side, how_many, log, process_of, stop
from ._choice import Choice
from ._choice_files import call_row, choice_row, parsed_call, parsed_choice, plain
from ._gpu import gpu_name, keep
from ._gpu_call import GpuCall
from ._gpu_measure import launches, measure, unproven

COMMAND = process_of(__name__)
_END_S = 10.0  # after its last line


def compile_apart(calls: Sequence[GpuCall], device: torch.device, most: int, end: float) -> None:
    """Compile what will be tried for `calls`, several at a time, until `end` (of `time.perf_counter`).

    Nothing of what is not proven, which will not be tried.
    Triton's cache on disk hands the kernels on; one that is missing is compiled where it is measured.
    """
    calls = [call for call in calls if not unproven(call, device)]
    if not calls:
        return
    count = min(len(calls), how_many(device))
    commands = [[*COMMAND, "compile", str(device), str(most)]] * count
    inputs = ["".join([_settings(), *[_line(call) for call in calls[i::count]]]) for i in range(count)]
    compile_side_by_side(commands, inputs, end)


class Worker:
    """A process that measures one call after the other. It ends with `close`, or with this process."""

    def __init__(self, device: torch.device, most: int) -> None:
        self._device = device
        self._process = Child([*COMMAND, "measure", str(device), str(most)])
        self.began = False  # it has answered
        self._ask(_settings())

    def measure(self, call: GpuCall, seconds: float) -> Choice | str | None:
        """The choice, or why there is none; None if the process ends, as it does after `seconds`."""
        timer = threading.Timer(min(max(0.0, seconds), threading.TIMEOUT_MAX), self._process.time_out)
        timer.start()
        try:
            self._ask(_line(call, unproven(call, self._device)))
            for line in self._process.stdout or ():
                if line.startswith(MARK):
                    self.began = True
                    answer = json.loads(line.removeprefix(MARK))
                    if "why" in answer:
                        log.info("%s could not be measured:\n%s", call, answer["trace"])
                        return str(answer["why"])
                    if answer:
                        return parsed_choice(answer)
            return None
        finally:
            timer.cancel()

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def why(self) -> str:
        """How the process ended that answers no more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self.close()
        return self._process.why()

    def close(self) -> None:
        """End the process."""
        stop(self._process)


def measure_apart(
    calls: Sequence[GpuCall],
    device: torch.device,
    most: int,
    end: float,
    on_choice: Callable[[GpuCall, Choice | str], None],
) -> None:
    """Measure `calls` in this order until `end`; `on_choice` is told of each, or why it has none.

    Behind a call in which the process ends another process goes on.
    """
    worker: Worker | None = None
    try:
        for call in calls:
            if time.perf_counter() >= end:
                break
            worker = worker or Worker(device, most)
            answer = worker.measure(call, end - time.perf_counter())
            if answer is not None:
                on_choice(call, answer)
                continue
            why = worker.why()
            if time.perf_counter() >= end:
                break
            if not worker.began:
                warnings.warn(f"segfast: nothing is measured: {why}", stacklevel=2)
                break
            on_choice(call, why)
            worker = None
    finally:
        if worker is not None:
            worker.close()


def _settings() -> str:
    """The first line that a process is given: how cuDNN is used here."""
    cudnn = torch.backends.cudnn
    return json.dumps({"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}) + "\n"


def _line(call: GpuCall, without: tuple[str, ...] = ()) -> str:
    return json.dumps({"call": call_row(call), "without": without}, default=plain) + "\n"


def main(what: str, name: str, most: str) -> int:
    """Compile or measure the calls on standard input, a line each; answer with a line for each."""
    device = torch.device(name)
    for knob, value in json.loads(sys.stdin.readline()).items():
        setattr(torch.backends.cudnn, knob, value)
    _answer({})
    gpu = gpu_name(-1 if device.index is None else device.index)
    for line in iter(sys.stdin.readline, ""):
        given = json.loads(line)
        call = parsed_call(given["call"], gpu)
        assert isinstance(call, GpuCall)
        if what == "compile":
            torch.set_num_threads(1)  # as many processes as cores do the same
            _compile(call, device, int(most))
        else:
            _answer(_measured(call, device, int(most), tuple(given["without"])))
    return 0


def _measured(call: GpuCall, device: torch.device, most: int, without: tuple[str, ...]) -> dict[str, object]:
    """The answer of `measure`, or why there is none, as where memory is short.

    Where the device is lost the process ends.
    """
    try:
        choice = measure(call, device, most, without)
    except RuntimeError as error:
        trace = traceback.format_exc()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return {"why": describe(error), "trace": trace}
    keep(call, choice)  # for what consists of it
    return choice_row(choice)


def _answer(content: object) -> None:
    print(f"{MARK}{json.dumps(content)}", flush=True)


def _compile(call: GpuCall, device: torch.device, most: int) -> None:
    """Compile what `measure` will try; a kernel that cannot be is left to it to find out."""
    with contextlib.suppress(RuntimeError):
        for launch, pointers in launches(call, device, most):
            with contextlib.suppress(Exception):
                launch.warmup(*pointers)
