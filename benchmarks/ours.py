"""segfast's own way through each operator case: the backend is the caller's choice, as for any user."""

from collections.abc import Iterator

import torch

import segfast.functional
from benchmarks.baselines import Peer
from benchmarks.problems import Formula, Problem, Tensors, affine
from benchmarks.timing import Candidate, Skipped
from segfast.nn import BilinearUpsample


def ours(problem: Problem) -> Iterator[Peer]:
    """The fused operator, or why there is none yet."""
    make = {"conv_transpose2d": _conv_transpose2d, "up_concat": _up_concat}.get(problem.case.op)
    if make is None:
        yield Skipped("segfast", f"segfast has no {problem.case.op} yet")
        return
    function = make(problem)
    yield Candidate("segfast", problem.bind(function), ours=True)
    if problem.case.params.get("weight") == "bilinear" and problem.case.direction == "forward":
        case = problem.case
        module = BilinearUpsample(case["s"], case["k"], case["p"]).to(problem.device)
        functions = {"segfast": function, "segfast_module": lambda t: module(t["x"])}
        yield Candidate("segfast_module", problem.bind(functions["segfast_module"]), ours=True)
        for name, plain in functions.items():
            yield Candidate(f"{name}_nchw", problem.bind(plain, problem.contiguous()), ours=True)


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
