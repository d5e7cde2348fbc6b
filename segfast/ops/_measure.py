"""Verifying and timing the candidates of calls, to choose the fastest that is right."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call import CANDIDATES, AnyCall, Call
from ._choice import ATEN, Choice, choices
from ._choice_files import write
from ._epilogue import ACTIVATIONS

# So many rounds, or after fewer the seconds a call may take.
_ROUNDS, _LEAST_ROUNDS, _ENOUGH_S = 7, 2, 0.1
_SLOPE = 0.01
# A candidate is out that took so many times as long as the fastest one, after one round, two, and more. Where
# calls are long one round tells as much as two of short ones, which other work on the machine disturbs, and
# where they are very long as much as three.
_HOPELESS = (3.0, 1.5, 1.2)
# A round of one candidate takes at least so long, of several calls if need be.
_SHORTEST_S = 1e-3
# What a layer takes in a network, where caches are cold, to come to anything but ATen: to be saved before it
# pays.
_ASKING_US = 10.0
# Of a call that takes so long the first one counts: what else a first call takes is little beside it.
_LONG_S, _VERY_LONG_S = 1e-2, 5e-2
# Read between two candidates, so that weights come from memory as they do in a network.
_FLUSH_BYTES = 8 << 20
# Rows of ATen's output that are compared with exact ones, at the top, in the middle and at the bottom, and
# how many of the channels.
_BAND = 2
_CHANNELS = 8
# Operands are whole numbers up to these, by a power of two. Those of the input have more bits than bfloat16.
_LARGEST_INPUT, _LARGEST_WEIGHT = 2047, 31
# A sum of n terms in fp32 is off by sqrt(n) roundings or fewer, and by so many where they are more: those are
# added up in blocks.
_MOST_ROUNDED = 16
# The part of the time that the thread must have been running. It waits where other work has the cores: for a
# core, or for torch's other threads.
_LEAST_RUNNING = 0.8
# So many random numbers, a prime, are repeated: to draw each takes as long as to compute with it.
_DRAWN = 65521
# Of filters of so many numbers and more, which come from memory at each call, parts of that size tell enough.
_LARGE_WEIGHT = 2**24


class _Operands(NamedTuple):
    """Random tensors as a call has them, and by how much rounding in sums of their products may be off."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    rounding: float


class _Run:
    """Computes a call with what a candidate made of the weight; `first_s` is what the first time took."""

    def __init__(self, call: Call, name: str, operands: _Operands) -> None:
        candidate = CANDIDATES[call.operation][name]
        prepared = candidate.prepare(operands.weight, call)
        arguments = (call, operands.input, prepared, operands.bias, operands.residual, _SLOPE)
        self._compute: Callable[[], Tensor] = lambda: candidate.run(*arguments)
        self.first_s = 0.0

    def __call__(self) -> Tensor:
        return self._compute()

    def first(self) -> Tensor:
        begin = clock()
        y = self._compute()
        self.first_s = clock() - begin
        return y


def clock() -> float:
    """Seconds; on one thread those it was running, which other work on the machine does not lengthen."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def quiet_check() -> Callable[[], bool]:
    """A function that tells whether this thread was running nearly all the time since now."""
    wall, running = time.perf_counter(), time.thread_time()
    return lambda: time.thread_time() - running >= _LEAST_RUNNING * (time.perf_counter() - wall)


def measure_and_keep(
    calls: Iterable[Call], *, budget_s: float = math.inf, on_call: Callable[[AnyCall], None] | None = None
) -> dict[AnyCall, Choice]:
    """Choose for each of `calls`, those with most multiplications first, and remember it on disk.

    `on_call` is told of each call that is done. Those that do not fit into `budget_s` seconds are left out.
    Those that other work on the machine disturbed are measured once more at the end. Where it does so again,
    what both times was the fastest is remembered as well, for a container's quota, or threads that sleep
    while they wait, look like other work and never end; else the choice holds in this process alone.
    """
    begin = time.perf_counter()
    found: dict[AnyCall, Choice] = {}
    disturbed: list[Call] = []
    for call in sorted(calls, key=Call.multiplications, reverse=True):
        if time.perf_counter() - begin > budget_s:
            break
        was_quiet = quiet_check()
        found[call] = measure(call)
        if not was_quiet():
            disturbed.append(call)
        if on_call is not None:
            on_call(call)
    lasting = {call: choice for call, choice in found.items() if call not in disturbed}
    for call in disturbed:
        if time.perf_counter() - begin > budget_s:
            break
        was_quiet = quiet_check()
        first, found[call] = found[call], measure(call)
        if was_quiet() or found[call].name == first.name:
            lasting[call] = found[call]
    for each, choice in found.items():
        choices().add(each, choice)
    if lasting:
        write(lasting)
    return found


def measure(call: Call) -> Choice:
    """The fastest candidate of `call` that computes it right, with what each took (the lower quartile).

    The caller's random state stays as it was.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        others = [name for name, it in CANDIDATES[call.operation].items() if name != ATEN and it.serves(call)]
        if not others:
            return Choice(ATEN, {})
        call, parts = _part(call)
        operands = _random_operands(call)
        aten = _Run(call, ATEN, operands)
        exact = _reference(call, operands, aten.first())
        if exact is None:
            return Choice(ATEN, {})
        runs = {ATEN: aten}
        for name in others:
            run = _right(call, name, operands, exact)
            if run is not None:
                runs[name] = run
        if len(runs) == 1:
            return Choice(ATEN, {})
        us = {name: parts * us for name, us in _times(runs, operands.input).items()}
        return Choice(min(us, key=lambda name: us[name] + (name != ATEN) * _ASKING_US), us)


def _part(call: Call) -> tuple[Call, int]:
    """The call of so many parts of the output channels as its filters are large, and how many these are."""
    parts = 1 if call.transposed or call.groups > 1 else max(1, math.prod(call.weight) // _LARGE_WEIGHT)
    while call.weight[0] % parts:
        parts -= 1
    return call._replace(weight=(call.weight[0] // parts, *call.weight[1:])), parts


def _random_operands(call: Call) -> _Operands:
    """Operands whose sums of products are exact in fp32, in whatever order they are added.

    All are whole numbers by a power of two, and so few bits long that no sum of theirs is of 2**24 or more
    (of eight standard deviations, that is). Results are of the size of the input's numbers, about 1.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    # Of a transposed convolution each result is one of a window's, whose taps are a stride apart.
    steps = call.stride if call.transposed else (1, 1)
    terms = call.weight[0] // call.groups if call.transposed else call.weight[1]
    terms *= math.prod(-(-taps // step) for taps, step in zip(call.weight[2:], steps, strict=True))
    largest = min(_LARGEST_INPUT, int(2**24 * 3 / (8 * _LARGEST_WEIGHT * math.sqrt(terms))))
    unit = 2.0 ** -round(math.log2(largest / math.sqrt(3)))
    weight_unit = 2.0 ** -round(math.log2(_LARGEST_WEIGHT * math.sqrt(terms / 3)))

    def numbers(shape: Sequence[int], largest: int, unit: float) -> Tensor:
        count = math.prod(shape)
        drawn = torch.randint(-largest, largest + 1, (min(count, _DRAWN),), generator=generator, device="cpu")
        drawn = drawn.to(torch.float32).mul_(unit)
        return drawn.repeat(-(-count // _DRAWN))[:count].view(*shape)

    def like_input(shape: Sequence[int]) -> Tensor:
        return numbers(shape, largest, unit).to(call.dtype)

    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    shape = call.output()
    # Of the terms of a result without their signs.
    magnitude = terms * (largest * unit / 2) * (_LARGEST_WEIGHT * weight_unit / 2)
    return _Operands(
        like_input(call.input).contiguous(memory_format=layout),
        # The weight of a network in reduced precision stays in fp32.
        numbers(call.weight, _LARGEST_WEIGHT, weight_unit),
        like_input(shape[1:2]) if call.bias else None,
        like_input(shape).contiguous(memory_format=layout) if call.residual else None,
        2.0**-22 * min(math.sqrt(terms), _MOST_ROUNDED) * magnitude,
    )


def _reference(call: Call, operands: _Operands, y: Tensor) -> Tensor | None:
    """The exact result of the call in fp32, of which ATen gave `y`; None where ATen's is not exact.

    It is not where torch was told to multiply fp32 in bfloat16, or by a fault.
    """
    if call.dtype != torch.float32:
        call = call._replace(dtype=torch.float32)
        input, weight, bias, residual = (None if t is None else t.float() for t in operands[:4])
        assert input is not None and weight is not None
        operands = _Operands(input, weight, bias, residual, operands.rounding)
        y = _Run(call, ATEN, operands)()
    call, operands, some = _of_some_channels(call, operands, y)
    height = y.shape[2]
    for top in {0, max(0, height // 2 - _BAND // 2), max(0, height - _BAND)}:
        rows = slice(top, min(height, top + _BAND))
        if not _is_close(call, operands, some[:, :, rows], _in_fp64(call, operands, rows)):
            return None
    return y


def _of_some_channels(call: Call, operands: _Operands, y: Tensor) -> tuple[Call, _Operands, Tensor]:
    """A call of a part of the output channels, or of the groups where there are some, and its part of `y`."""
    grouped = call.groups > 1
    step = max(1, (call.groups if grouped else y.shape[1]) // _CHANNELS)

    def some(t: Tensor, axis: int) -> Tensor:
        parts = t.unflatten(axis, (call.groups, -1)) if grouped else t.unflatten(axis, (-1, 1))
        return parts.movedim(axis, 0)[::step].movedim(0, axis).flatten(axis, axis + 1)

    input, weight, bias, residual, rounding = operands
    part = _Operands(
        some(input, 1) if grouped else input,
        some(weight, 1 if call.transposed and not grouped else 0),
        None if bias is None else some(bias, 0),
        None if residual is None else some(residual, 1),
        rounding,
    )
    groups = -(-call.groups // step) if grouped else 1
    return call._replace(input=part.input.shape, weight=part.weight.shape, groups=groups), part, some(y, 1)


def _right(call: Call, name: str, operands: _Operands, reference: Tensor) -> _Run | None:
    """The candidate `name`, if its result is `reference` but for rounding."""
    try:
        run = _Run(call, name, operands)
        y = run.first()
    except RuntimeError:
        return None  # as oneDNN refuses some geometries
    if y.shape != reference.shape or y.dtype != call.dtype:
        return None
    return run if _is_close(call, operands, y, reference) else None


def _is_close(call: Call, operands: _Operands, y: Tensor, exact: Tensor) -> bool:
    """True if `y` is `exact` up to the rounding of the result and of sums in fp32. May change `y`."""
    allowed = 4 * torch.finfo(call.dtype).eps * _largest(exact) + operands.rounding
    return _largest(y.to(exact.dtype).sub_(exact)) <= allowed


def _largest(t: Tensor) -> float:
    """The largest absolute value of images in channels_last; NaN if one is."""
    low, high = torch.aminmax(t.permute(0, 2, 3, 1))
    return torch.maximum(-low, high).item()


def _in_fp64(call: Call, operands: _Operands, rows: slice) -> Tensor:
    """Some rows of the call's result."""
    y = _convolution_in_fp64(call, operands.input, operands.weight, rows)
    if operands.bias is not None:
        y = y + operands.bias.double()[:, None, None]
    if operands.residual is not None:
        y = y + operands.residual[:, :, rows].double()
    return ACTIVATIONS[call.activation](y, _SLOPE)


def _convolution_in_fp64(call: Call, input: Tensor, weight: Tensor, rows: slice) -> Tensor:
    """Some rows of the convolution alone, from the rows of the input that they need."""
    stride, padding, height = call.stride[0], call.padding[0], input.shape[2]
    reach = call.dilation[0] * (call.weight[2] - 1)
    if call.transposed:
        begin = (rows.start + padding) // stride - -(-reach // stride)
        end = (rows.stop - 1 + padding) // stride + 1
    else:
        begin = rows.start * stride - padding
        end = (rows.stop - 1) * stride - padding + reach + 1
    inside = input[:, :, max(begin, 0) : max(min(end, height), 0)]
    missing = (max(0, min(-begin, end - begin)), max(0, min(end - height, end - begin)))
    inside, weight = F.pad(inside, (0, 0, *missing)).double(), weight.double()
    if not call.transposed:
        return F.conv2d(inside, weight, None, call.stride, (0, call.padding[1]), call.dilation, call.groups)
    paddings = (0, call.padding[1]), (stride - 1, call.output_padding[1])
    y = F.conv_transpose2d(inside, weight, None, call.stride, *paddings, call.groups, call.dilation)
    first = rows.start + padding - begin * stride
    return y[:, :, first : first + rows.stop - rows.start]


def _times(runs: dict[str, _Run], input: Tensor) -> dict[str, float]:
    """Microseconds of each, interleaved; of what is hopeless, of the rounds that it took part in."""
    flushed = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device="cpu")
    samples: dict[str, list[float]] = {name: [] for name in runs}
    repeats = dict.fromkeys(runs, 1)
    for name, run in runs.items():
        if run.first_s >= _LONG_S:
            samples[name].append(run.first_s)
            continue
        begin = clock()
        run()
        repeats[name] = max(1, min(50, int(_SHORTEST_S / max(clock() - begin, 1e-9))))
    racing = list(runs)
    start = clock()
    for turn in range(_ROUNDS):
        for name in racing[turn % len(racing) :] + racing[: turn % len(racing)]:
            if len(samples[name]) > turn:
                continue
            flushed.sum()
            input.sum()  # written a moment ago, in a network
            begin = clock()
            for _ in range(repeats[name]):
                runs[name]()
            samples[name].append((clock() - begin) / repeats[name])
        fastest = min(min(samples[name]) for name in racing)
        told = turn + (fastest >= _LONG_S) + (fastest >= _VERY_LONG_S)
        hopeless = fastest * _HOPELESS[min(told, len(_HOPELESS) - 1)]
        racing = [name for name in racing if min(samples[name]) <= hopeless]
        if len(racing) == 1 or (turn + 1 >= _LEAST_ROUNDS and clock() - start > _ENOUGH_S):
            break
    # Of a machine with other work, the quieter rounds.
    return {name: 1e6 * sorted(times)[len(times) // 4] for name, times in samples.items()}
