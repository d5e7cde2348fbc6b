"""Verifying and timing what could run a call on a GPU: ATen, cuDNN's fused calls, our kernels' tiles."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._timing import interleave
from . import _proofs
from ._backend import backend, too_old
from ._choice import ATEN, Choice
from ._gpu import PARTS, TRITON, left_to_parts
from ._gpu_call import FEW, GPU_OPERATIONS, Bound, Draw, GpuCall
from ._operands import load_kernels

# Seconds of timing for everything that could run one call.
_SECONDS = 0.15
# Larger calls are verified on their first image.
_MOST_ELEMENTS = 2**26


class Variant(NamedTuple):
    """Tiles by the kernels' operations; one that is not mentioned has its usual one."""

    tiles: tuple[tuple[str, Any], ...] = ()

    @contextlib.contextmanager
    def in_force(self, launches: dict) -> Iterator[None]:
        """Within it kernels run with these; `launches` keeps their launches from one time to the next."""
        kernels = load_kernels()
        with contextlib.ExitStack() as stack:
            stack.enter_context(kernels.separate_launches(launches))
            for operation, tile in self.tiles:
                stack.enter_context(kernels.override_tile(operation, tile, launches))
            yield


def measure(
    call: GpuCall, device: torch.device, most: int = FEW, without: tuple[str, ...] | None = None
) -> Choice:
    """The fastest that computes `call` right, with what each took; of each kernel `most` tiles are tried.

    `without` are candidates to leave out, by default those that are `unproven`. The caller's random state
    stays as it was.
    """
    without = unproven(call, device) if without is None else without
    operation = GPU_OPERATIONS[call.operation]
    with _as_called(call, device):
        given = operation.bind(call, Draw(call, device))
        ours = given.as_kernels_read()
        right = _verifier(call, device)
        runs = {ATEN: _runner(call, given, ATEN)}
        runs |= {name: _runner(call, given, name) for name in given.candidates if right(name)}
        if operation.composite:
            runs[PARTS] = _runner(call, given, PARTS)
        problems = None if TRITON in without else problems_of(call, ours)
        found = {
            f"{TRITON} {i}": variant
            for i, variant in enumerate(variants(problems, device, most))
            if right(TRITON, variant)
        }
        runs |= {name: _runner(call, ours, TRITON, variant) for name, variant in found.items()}
        if len(runs) == 1:
            return Choice(ATEN, {}, unproven=without)
        us = _times(runs, device)
        best = _best_of_each(problems or {}, found, us)
        if best is not None and right(TRITON, best):
            together = f"{TRITON} together"
            both = {ATEN: runs[ATEN], together: _runner(call, ours, TRITON, best)}
            us[together], found[together] = _times(both, device)[together], best
    return _choice(us, found, problems or {})._replace(unproven=without)


@contextlib.contextmanager
def _as_called(call: GpuCall, device: torch.device) -> Iterator[None]:
    """A context on that device, with the call's fp32 precision and without the caller's modes."""
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    with torch.inference_mode(False), torch.cuda.device(device), torch.autocast("cuda", enabled=False):
        if call.precision:
            conv.fp32_precision = "tf32" if call.precision == "tf32" else "ieee"
        try:
            yield
        finally:
            conv.fp32_precision = before


def unproven(call: GpuCall, device: torch.device) -> tuple[str, ...]:
    """The candidates of `call` that nothing proves right on this GPU: our kernels, or none."""
    if too_old(device):
        return ()  # they do not run there, proven or not
    operations = GPU_OPERATIONS[call.operation].proofs(call.gradients)
    proven = all(_proofs.proven(operation, call.dtype, device) for operation in operations)
    return () if proven else (TRITON,)


def problems_of(call: GpuCall, bound: Bound) -> dict[Any, Any] | None:
    """The problems of `call` on our kernels, each with its usual tile; None if they cannot run it.

    Nothing is launched.
    """
    kernels = load_kernels()
    try:
        with kernels.record_problems() as problems, kernels.record_launches():
            _runner(call, bound, TRITON)()
    except (NotImplementedError, RuntimeError):
        return None
    device = bound.tensors[0].device
    return {problem: kernels.choose_tile(problem, device) for problem in problems}


def launches(call: GpuCall, device: torch.device, most: int) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Each kernel, ready to be called, that `measure` launches, and its pointers; nothing is launched."""
    with _as_called(call, device):
        bound = GPU_OPERATIONS[call.operation].bind(call, Draw(call, device)).as_kernels_read()
        for variant in variants(problems_of(call, bound), device, most):
            with load_kernels().record_launches() as found:
                _runner(call, bound, TRITON, variant)()
            yield from found


def variants(problems: Mapping[Any, Any] | None, device: torch.device, most: int) -> list[Variant]:
    """The usual tiles, and `most` for each problem, one changed at a time."""
    if problems is None:
        return []
    kernels = load_kernels()
    arch, limit = kernels.architecture(device), kernels.shared_memory_limit(device)
    found = [Variant()]
    for problem, usual in problems.items():
        others = [tile for tile in kernels.candidates(problem, arch, limit) if tile != usual]
        found += [Variant(((problem.operation, tile),)) for tile in others[: most - 1]]
    return list(dict.fromkeys(found))


def _best_of_each(problems: Iterable[Any], found: dict[str, Variant], us: dict[str, float]) -> Variant | None:
    """The fastest tile of each kernel put together; None where that is one that was timed."""
    best: dict[str, Any] = {}
    usual = us.get(f"{TRITON} 0", math.inf)
    for operation in dict.fromkeys(problem.operation for problem in problems):
        own = {name: v for name, v in found.items() if v.tiles and v.tiles[0][0] == operation}
        fastest = min(own, key=lambda name: us[name], default=None)
        if fastest is not None and us[fastest] < usual:
            best[operation] = own[fastest].tiles[0][1]
    return Variant(tuple(best.items())) if len(best) > 1 else None


def _choice(us: dict[str, float], found: dict[str, Variant], problems: Mapping[Any, Any]) -> Choice:
    times = {name: time for name, time in us.items() if name not in found}
    tiles: tuple[tuple[str, str, tuple[Any, ...]], ...] = ()
    if found:
        fastest = min(found, key=lambda name: us[name])
        times[TRITON] = us[fastest]
        chosen = dict(found[fastest].tiles)
        tiles = tuple(
            (problem.operation, problem.bucket, astuple(chosen.get(problem.operation, usual)))
            for problem, usual in problems.items()
        )
    name = min(times, key=times.__getitem__)
    return Choice(name, times, tiles)


def _runner(
    call: GpuCall, bound: Bound, name: str, variant: Variant | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the implementation `name` on the tensors of `bound`: outputs, then gradients."""
    function = bound.candidates.get(name, bound.function)
    leaves = _leaves(bound)
    launches: dict = {}
    grads: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        with contextlib.ExitStack() as stack:
            if variant is not None:
                stack.enter_context(variant.in_force(launches))
            if name == PARTS:
                stack.enter_context(left_to_parts(call.operation))
            stack.enter_context(backend({ATEN: "aten", TRITON: "triton"}.get(name, "auto")))
            stack.enter_context(torch.set_grad_enabled(call.gradients))
            outputs = _tuple(function(*bound.tensors))
            if not call.gradients:
                return outputs
            floats = [t for t in outputs if t.is_floating_point()]
            if not grads:
                grads.extend(_ones_of_both_signs(t) for t in floats)
            return (*[t.detach() for t in outputs], *torch.autograd.grad(floats, leaves, grads))

    if call.gradients:
        for t in leaves:
            t.requires_grad_()
    return run


def _leaves(bound: Bound) -> list[Tensor]:
    """The tensors that gradients are asked for."""
    return [t for t in bound.tensors if t.is_floating_point()]


def _ones_of_both_signs(like: Tensor) -> Tensor:
    """1 and -1 in turns of 3 and 2, of the same shape and layout: what a gradient is tried with."""
    signs = torch.ones(like.numel(), dtype=like.dtype, device=like.device)
    signs[::5] = signs[2::5] = -1
    return torch.empty_like(like).copy_(signs.view(like.shape))


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Within it cuDNN takes the algorithm it thinks fastest: of what runs once it need not be."""
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searching


def _verifier(call: GpuCall, device: torch.device) -> Callable[..., bool]:
    """Says of a name, and a variant of our kernels, whether it computes `call` right.

    That is within twice ATen's error and a rounding of what ATen gives in fp64.
    """
    small = call if _elements(call) <= _MOST_ELEMENTS else _of_one_image(call)
    given = GPU_OPERATIONS[call.operation].bind(small, Draw(small, device))
    ours = given.as_kernels_read()
    wide = [t.double() if t.is_floating_point() else t for t in given.tensors]
    with without_search():
        exact = _runner(small, given._replace(tensors=tuple(wide)), ATEN)()
        del wide
        aten = _runner(small, given, ATEN)()
    outputs = len(exact) - (len(_leaves(given)) if small.gradients else 0)
    gradients = [i >= outputs for i in range(len(exact))]
    errors = [_error(*each) for each in zip(aten, exact, gradients, strict=True)]
    del aten

    def right(name: str, variant: Variant | None = None) -> bool:
        try:
            results = _runner(small, ours if name == TRITON else given, name, variant)()
            torch.cuda.synchronize(device)
        except (RuntimeError, NotImplementedError):
            return False  # what the compiler, cuDNN or the device refuses is no candidate
        if [t.shape for t in results] != [t.shape for t in exact]:
            return False
        compared = zip(results, exact, errors, gradients, strict=True)
        return all(_error(r, e, g) <= _allowed(r, error, given.depth, g) for r, e, error, g in compared)

    return right


def _error(actual: Tensor, reference: Tensor, gradient: bool = False) -> float:
    """The largest error as a part of the largest value; of whole numbers the part that differs.

    Of a `gradient` the norm of the error over the norm: where an activation has a corner, a last digit
    decides of some elements whether they are there at all.
    """
    if not reference.is_floating_point():
        return float((actual != reference).double().mean())
    difference = actual.double() - reference
    sizes = [t.norm() if gradient else t.abs().max() for t in (difference, reference)]
    return float(sizes[0] / torch.where(sizes[1] > 0, sizes[1], 1))


def _allowed(result: Tensor, aten_error: float, depth: int, gradient: bool) -> float:
    """The bound on `_error`: twice ATen's, two roundings, and what the order of sums and TF32 cost."""
    if not result.is_floating_point():
        return 2 * aten_error + 1e-3  # where two classes are as good as equal either is right
    tf32 = result.dtype == torch.float32 and load_kernels().dot_precision(torch.float32) == "tf32"
    rounding = 2 * torch.finfo(result.dtype).eps + 2.0**-22 * math.sqrt(depth) + tf32 * 2.0**-8
    corners = math.sqrt(2.0**-9 if tf32 else 2.0**-20)
    return 2 * aten_error + rounding + gradient * corners


def _elements(call: GpuCall) -> int:
    return sum(map(math.prod, call.images)) + sum(map(math.prod, call.weights))


def _of_one_image(call: GpuCall) -> GpuCall:
    return call._replace(images=tuple((1, *shape[1:]) for shape in call.images))


def _times(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Microseconds of each, interleaved."""
    for run in runs.values():
        run()
    timings = interleave(runs, device, budget_s=_SECONDS, min_rounds=5)
    return {name: timing.us for name, timing in timings.items()}
