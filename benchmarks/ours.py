"""segfast's own way through each operator case: the backend is the caller's choice, as for any user."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

import segfast.functional
from benchmarks import crf_peers
from benchmarks.baselines import Peer
from benchmarks.cases import is_crf, is_depthwise, is_head
from benchmarks.problems import Formula, Problem, Tensors, affine
from benchmarks.timing import Candidate, Skipped
from segfast.nn import BilinearUpsample


def ours(problem: Problem) -> Iterator[Peer]:
    """The fused operator, or why there is none yet."""
    case = problem.case
    if is_crf(case):
        yield from crf_peers.ours(problem)
        return
    op = "depthwise_conv2d" if is_depthwise(case) else case.op
    if op not in _MAKE:
        yield Skipped("segfast", f"segfast has no {op} yet")
        return
    function = _MAKE[op](problem)
    tensors = _laid_out(problem)
    candidate = Candidate("segfast", problem.bind(function, tensors), ours=True)
    yield candidate
    if problem.device.type == "cuda":
        yield on_auto(candidate)
    if is_head(case):
        yield Candidate("segfast_nchw", problem.bind(function, problem.contiguous()), ours=True)
    if op == "separable_conv2d":
        yield from _forms(problem, function, tensors)
    if case.params.get("weight") == "bilinear" and case.direction == "forward":
        module = BilinearUpsample(case["s"], case["k"], case["p"]).to(problem.device)
        functions = {"segfast": function, "segfast_module": lambda t: module(t["x"])}
        yield Candidate("segfast_module", problem.bind(functions["segfast_module"]), ours=True)
        for name, plain in functions.items():
            yield Candidate(f"{name}_nchw", problem.bind(plain, problem.contiguous()), ours=True)


def on_auto(candidate: Candidate) -> Candidate:
    """The same on backend "auto", whichever is in force: what a user gets, with the choices there are."""

    def run() -> Any:
        with segfast.backend("auto"):
            return candidate.run()

    return dataclasses.replace(candidate, name=f"{candidate.name}_auto", run=run)


def _conv_transpose2d(problem: Problem) -> Formula:
    case = problem.case
    s, p = case["s"], case["p"]
    scale, shift = affine(problem.tensors) if "bn" in case.epilogue else (None, None)

    def function(t: Tensors) -> torch.Tensor:
        return segfast.functional.conv_transpose2d(
            t["x"], t["weight"], t.get("bias"), s, p, scale=scale, shift=shift, activation=case.activation
        )

    return function


def _up_concat(problem: Problem) -> Formula:
    case = problem.case
    s, p = case["s"], case["p"]

    def function(t: Tensors) -> torch.Tensor:
        return segfast.functional.up_concat(
            t["x"], t["skip"], t["weight"], t.get("bias"), s, p, activation=case.activation
        )

    return function


def _conv2d(problem: Problem) -> Formula:
    case = problem.case
    geometry = [case[name] for name in ("s", "p", "d", "g")]
    scale, shift = affine(problem.tensors) if "bn" in case.epilogue else (None, None)

    def function(t: Tensors) -> torch.Tensor:
        return segfast.functional.conv2d(
            t["x"],
            t["weight"],
            t.get("bias"),
            *geometry,
            scale=scale,
            shift=shift,
            residual=t.get("residual"),
            activation=case.activation,
        )

    return function


def _aspp_branches(problem: Problem) -> Formula:
    case = problem.case
    dilations = (1, *case["rates"])
    scale, shift = (vector.repeat(len(dilations)) for vector in affine(problem.tensors))

    def function(t: Tensors) -> torch.Tensor:
        weights = [t["weight"], *(t[f"rate{i}"] for i in range(len(case["rates"])))]
        return segfast.functional.parallel_conv2d(
            t["x"], weights, dilations, scale=scale, shift=shift, activation=case.activation
        )

    return function


def _aspp(problem: Problem) -> Formula:
    """The module with the case's weights: its own ones in a forward, the differentiated ones else."""
    case, t = problem.case, problem.tensors
    aspp = segfast.nn.ASPP(case["ci"], case["rates"], case["co"]).to(problem.device, case.torch_dtype).eval()
    rates = range(len(case["rates"]))
    names = {"weight": "convs.0.0.weight", "pool": f"convs.{len(rates) + 1}.1.weight"}
    names |= {f"rate{i}": f"convs.{i + 1}.0.weight" for i in rates} | {"project": "project.0.weight"}
    statistics = {"running_mean": "mean", "running_var": "var", "weight": "gamma", "bias": "beta"}
    with torch.no_grad():
        for module in aspp.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for name, ours in statistics.items():
                    getattr(module, name).copy_(t[ours])
        for name, ours in names.items():
            parameter = aspp.get_parameter(ours)
            parameter.data = t[name]
    aspp.requires_grad_(False)
    if case.direction == "forward":
        return lambda t: aspp(t["x"])
    return lambda t: torch.func.functional_call(aspp, {names[name]: t[name] for name in names}, (t["x"],))


def _depthwise_conv2d(problem: Problem) -> Formula:
    case = problem.case
    s, p, d = case["s"], case["p"], case["d"]
    scale, shift = affine(problem.tensors) if "bn" in case.epilogue else (None, None)

    def function(t: Tensors) -> torch.Tensor:
        return segfast.functional.depthwise_conv2d(
            t["x"], t["weight"], t.get("bias"), s, p, d, scale=scale, shift=shift, activation=case.activation
        )

    return function


def _separable_conv2d(problem: Problem) -> Formula:
    case = problem.case
    s, p, d = case["s"], case["p"], case["d"]
    depthwise_scale, depthwise_shift = affine(problem.tensors, "depthwise_")
    scale, shift = affine(problem.tensors)
    activation = None if "linear" in case.params else case.activation

    def function(t: Tensors) -> torch.Tensor:
        return segfast.functional.separable_conv2d(
            t["x"],
            t["depthwise"],
            t["weight"],
            None,
            None,
            s,
            p,
            d,
            depthwise_scale=depthwise_scale,
            depthwise_shift=depthwise_shift,
            depthwise_activation=case.activation,
            scale=scale,
            shift=shift,
            activation=activation,
        )

    return function


def _head(problem: Problem) -> Formula:
    case = problem.case
    function = getattr(segfast.functional, case.op)
    if case.op == "upsample_argmax":
        return lambda t: function(t["x"], scale_factor=case["scale"])
    return lambda t: function(t["x"], t["labels"], scale_factor=case["scale"])


_MAKE: dict[str, Callable[[Problem], Formula]] = {
    "aspp": _aspp,
    "aspp_branches": _aspp_branches,
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "up_concat": _up_concat,
    "depthwise_conv2d": _depthwise_conv2d,
    "separable_conv2d": _separable_conv2d,
    "upsample_argmax": _head,
    "upsample_cross_entropy": _head,
    "upsample_dice": _head,
}


def _laid_out(problem: Problem) -> Tensors:
    """The inputs, on a GPU with depthwise filters as `segfast.optimize` lays them out."""
    from segfast.ops.separable_conv2d.operators import taps_major

    case, tensors = problem.case, dict(problem.tensors)
    name = "depthwise" if case.op == "separable_conv2d" else "weight" if is_depthwise(case) else None
    if name is not None and problem.device.type == "cuda":
        tensors[name] = taps_major(tensors[name])
    return tensors


def _forms(problem: Problem, function: Formula, tensors: Tensors) -> Iterator[Peer]:
    """A separable convolution in each of its forms, whichever is chosen; none where ATen serves the call."""
    if importlib.util.find_spec("triton") is None:
        return
    from segfast.kernels import architecture, candidates, override_tile, record_launches
    from segfast.kernels._device import shared_memory_limit
    from segfast.kernels._tiles import record_problems

    with record_problems() as asked, record_launches():
        problem.bind(function, tensors)()
    forward = next((p for p in asked if p.operation == "separable_conv2d_forward"), None)
    if forward is None:
        return
    device = problem.device
    known = candidates(forward, architecture(device), shared_memory_limit(device))

    def forced(tile: Any) -> Callable[[], Any]:
        run, launches = problem.bind(function, tensors), {}

        def call() -> Any:
            with override_tile(forward.operation, tile, launches):
                return run()

        return call

    for form in ("fused", "two kernels"):
        tile = next(tile for tile in known if tile.form == form)
        name = f"segfast_{form.replace(' ', '_')}"
        yield Candidate(name, forced(tile), ours=True, note=str(tile))
