"""A CUDA device for the `device` tests: a real one, or the simulated one of `make simulate`.

`python -m ttsem.sanitize pytest` answers for `torch.cuda`, keeps every tensor on the CPU and executes the IR
that Triton makes of each launch. What it leaves open is filled in here, so that tests and product need
not know which of the two it is.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from triton.runtime import JITFunction

from segfast.kernels._device import without_inline_ptx

SIMULATED = Path(JITFunction.run.__code__.co_filename).parent.name == "ttsem"


class _Launchable:
    """The result of a first launch: the kernel compiled for its arguments, as Triton's `CompiledKernel`.

    `run` takes what the short launch passes (see `segfast.kernels._launch`) and holds it to what the
    kernel was compiled for: a GPU would run the machine code of the first call, whatever the arguments.
    """

    function = packed_metadata = None

    def __init__(self, simulate, kernel, arguments, options):
        self._simulate, self._kernel, self._options = simulate, kernel, options
        self._compiled_for = _specialization(kernel, arguments)

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        given = _specialization(self._kernel, arguments)
        assert given == self._compiled_for, (
            f"{self._kernel.fn.__name__}: compiled for {self._compiled_for}, launched again with {given}"
        )
        self._simulate(self._kernel, *arguments, grid=(x, y, z), warmup=False, **self._options)


def _specialization(kernel, arguments) -> list:
    """All of the arguments that Triton builds into the machine code."""
    kinds = []
    for parameter, value in zip(kernel.params, arguments, strict=True):
        if parameter.is_constexpr or value is None or isinstance(value, bool):
            kinds.append(value)
        elif isinstance(value, torch.Tensor):
            kinds.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            kinds.append(("i32" if -(2**31) <= value < 2**31 else "i64", value == 1, value % 16 == 0))
        else:
            kinds.append(type(value).__name__)
    return kinds


def _launches_that_are_remembered(monkeypatch) -> None:
    simulate = JITFunction.run

    def run(kernel, *arguments, grid, warmup, **named):
        result = simulate(kernel, *arguments, grid=grid, warmup=warmup, **named)
        if warmup:
            return result
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, arguments, strict=False)) | {n: named[n] for n in named if n in names}
        options = {name: value for name, value in named.items() if name not in names}
        return _Launchable(simulate, kernel, [values[name] for name in names], options)

    monkeypatch.setattr(JITFunction, "run", run)


def _device_within_backward(monkeypatch) -> None:
    """The pretence rests within a call it has redirected, as a backward pass is: it begins anew there."""
    (pretence,) = torch.overrides._get_current_function_mode_stack()
    run_backward = torch.autograd.graph._engine_run_backward

    def pretending(*args, **kwargs):
        with pretence:
            return run_backward(*args, **kwargs)

    for module in (torch.autograd, torch.autograd.graph):
        monkeypatch.setattr(module, "_engine_run_backward", pretending)


def _answers_of_the_runtime(monkeypatch) -> None:
    """Answers of the CUDA runtime to `torch.cuda`: nothing is captured, no generator is the device's."""
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=None: state.clone(),
        "set_rng_state": lambda state, device=None: None,
        "get_rng_state_all": lambda: [state.clone()],
        "set_rng_state_all": lambda states: None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def complete_simulation(monkeypatch) -> None:
    """Fill in what the simulated device leaves open."""
    _launches_that_are_remembered(monkeypatch)
    _device_within_backward(monkeypatch)
    _answers_of_the_runtime(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def _completed_simulation():
    if not SIMULATED:
        yield
        return
    with pytest.MonkeyPatch.context() as monkeypatch, without_inline_ptx():
        complete_simulation(monkeypatch)
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def _precision(name: str):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


# What kernels compute in: a dtype, and for fp32 how its products are made.
@pytest.fixture(params=["bfloat16", "float16", "tf32", "float32"])
def arithmetic(request):
    with _precision("tf32" if request.param == "tf32" else "ieee"):
        yield request.param
