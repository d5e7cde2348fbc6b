"""Verifying and timing the candidates of calls, to choose the fastest that is right."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._choice import ATEN, CANDIDATES, Call, Choice, choices
from ._choice_files import write
from ._epilogue import ACTIVATIONS

# So many rounds, or after fewer the seconds a call may take.
_ROUNDS, _LEAST_ROUNDS, _ENOUGH_S = 5, 2, 0.3
_SLOPE = 0.01
# A candidate that took so many times as long as the fastest one in a round is out.
_HOPELESS = 1.5
# A round of one candidate takes at least so long, of several calls if need be.
_SHORTEST_S = 1e-3
# Read between two candidates, so that weights come from memory as they do in a network.
_FLUSH_BYTES = 8 << 20
# Rows of the output that are compared with exact ones, at the top, in the middle and at the bottom.
_BAND = 2


class _Operands(NamedTuple):
    """Random tensors as a call has them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None


def clock() -> float:
    """Seconds; on one thread those it was running, which other work on the machine does not lengthen."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure_and_keep(
    calls: Iterable[Call], *, budget_s: float = math.inf, on_call: Callable[[Call], None] | None = None
) -> dict[Call, Choice]:
    """Choose for each of `calls`, those with most multiplications first, and remember it on disk.

    `on_call` is told of each call that is done. Those that do not fit into `budget_s` seconds are left out.
    """
    begin = time.perf_counter()
    found: dict[Call, Choice] = {}
    for call in sorted(calls, key=Call.multiplications, reverse=True):
        if time.perf_counter() - begin > budget_s:
            break
        found[call] = measure(call)
        if on_call is not None:
            on_call(call)
    for call, choice in found.items():
        choices().add(call, choice)
    if found:
        write(found)
    return found


def measure(call: Call) -> Choice:
    """The fastest candidate of `call` that computes it right, with what each took (the lower quartile).

    The caller's random state stays as it was.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        operands = _random_operands(call)
        runs = {}
        for name, candidate in CANDIDATES[call.operation].items():
            if candidate.serves(call):
                run = _runner(call, name, operands)
                if run is not None and (name == ATEN or _is_right(call, operands, run)):
                    runs[name] = run
        if len(runs) == 1:
            return Choice(ATEN, {})
        us = _times(runs, operands.input)
        return Choice(min(us, key=us.__getitem__), us)


def _random_operands(call: Call) -> _Operands:
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(shape: Sequence[int], dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    shape = call.output()
    # The weight of a network in reduced precision stays in fp32; results are of the size of the input.
    taps = math.prod(call.weight[2:]) * (call.weight[0] if call.transposed else call.weight[1])
    return _Operands(
        normal(call.input).contiguous(memory_format=layout),
        normal(call.weight, torch.float32) / math.sqrt(taps),
        normal(shape[1:2]) if call.bias else None,
        normal(shape).contiguous(memory_format=layout) if call.residual else None,
    )


def _runner(call: Call, name: str, operands: _Operands) -> Callable[[], Tensor] | None:
    candidate = CANDIDATES[call.operation][name]
    try:
        prepared = candidate.prepare(operands.weight, call)
    except RuntimeError:
        return None  # as oneDNN refuses some geometries

    def run() -> Tensor:
        return candidate.run(call, operands.input, prepared, operands.bias, operands.residual, _SLOPE)

    return run


def _is_right(call: Call, operands: _Operands, run: Callable[[], Tensor]) -> bool:
    """Whether the result is that of exact arithmetic but for rounding, on some rows of the output."""
    try:
        y = run()
    except RuntimeError:
        return False
    if tuple(y.shape) != call.output() or y.dtype != call.dtype:
        return False
    eps = torch.finfo(call.dtype).eps
    depth = math.prod(call.weight[1:])
    for top, exact, magnitude in _exact_bands(call, operands):
        actual = y[:, :, top : top + exact.shape[2]].double()
        largest = exact.abs().max().item()
        # Each rounding of the result, and of the sums in fp32.
        allowed = 4 * eps * largest + 2.0**-22 * math.sqrt(depth) * magnitude.max().item()
        error = (actual - exact).abs().max().item()
        if not error <= allowed:
            return False
    return True


def _exact_bands(call: Call, operands: _Operands) -> Iterable[tuple[int, Tensor, Tensor]]:
    """The first row of each band, its exact result in fp64, and what its terms sum up to without signs."""
    weight = operands.weight.to(call.dtype)
    height = call.output()[2]
    tops = {0, max(0, height // 2 - _BAND // 2), max(0, height - _BAND)}
    for top in sorted(tops):
        rows = slice(top, min(height, top + _BAND))
        exact = _exact(call, operands.input.double(), weight.double(), rows)
        magnitude = _exact(call, operands.input.float().abs(), weight.float().abs(), rows)
        if operands.bias is not None:
            exact = exact + operands.bias.double()[:, None, None]
        if operands.residual is not None:
            exact = exact + operands.residual[:, :, rows].double()
        yield top, ACTIVATIONS[call.activation](exact, _SLOPE), magnitude


def _exact(call: Call, input: Tensor, weight: Tensor, rows: slice) -> Tensor:
    """Some rows of the convolution alone, from the rows of the input that they need."""
    if call.transposed:
        geometry = (call.stride, call.padding, call.output_padding, call.groups, call.dilation)
        return F.conv_transpose2d(input, weight, None, *geometry)[:, :, rows]
    stride, padding, dilation = call.stride[0], call.padding[0], call.dilation[0]
    begin = rows.start * stride - padding
    end = (rows.stop - 1) * stride - padding + dilation * (call.weight[2] - 1) + 1
    height = input.shape[2]
    inside = input[:, :, max(begin, 0) : max(min(end, height), 0)]
    missing = (max(0, min(-begin, end - begin)), max(0, min(end - height, end - begin)))
    inside = F.pad(inside, (0, 0, *missing))
    return F.conv2d(inside, weight, None, call.stride, (0, call.padding[1]), call.dilation, call.groups)


def _times(runs: dict[str, Callable[[], Tensor]], input: Tensor) -> dict[str, float]:
    """Microseconds of each, interleaved; of what is hopeless, of the rounds that it took part in."""
    flushed = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device="cpu")
    samples: dict[str, list[float]] = {name: [] for name in runs}
    repeats = {}
    for name, run in runs.items():
        run()
        begin = clock()
        run()
        repeats[name] = max(1, min(50, int(_SHORTEST_S / max(clock() - begin, 1e-9))))
    racing = list(runs)
    start = clock()
    for turn in range(_ROUNDS):
        for name in racing[turn % len(racing) :] + racing[: turn % len(racing)]:
            flushed.sum()
            input.sum()  # written a moment ago, in a network
            begin = clock()
            for _ in range(repeats[name]):
                runs[name]()
            samples[name].append((clock() - begin) / repeats[name])
        fastest = min(min(samples[name]) for name in racing)
        racing = [name for name in racing if min(samples[name]) <= _HOPELESS * fastest]
        if len(racing) == 1 or (turn + 1 >= _LEAST_ROUNDS and clock() - start > _ENOUGH_S):
            break
    # Of a machine with other work, the quieter rounds.
    return {name: 1e6 * sorted(times)[len(times) // 4] for name, times in samples.items()}
