"""A case as calls of cuDNN's graph API: `segfast.ops._cudnn_graph` with the case's epilogue. Forward only."""

from collections.abc import Callable

import torch

from benchmarks.cases import Case, output_size
from benchmarks.problems import Problem, Tensors, affine
from segfast.ops._cudnn_graph import fused_graph

Term = tuple[str, torch.Tensor]


def layer(problem: Problem) -> Callable[[Tensors], torch.Tensor]:
    """Build and plan a conv2d (grouped too), conv_transpose2d or separable_conv2d case.

    A separable convolution is two graphs, one after the other: cuDNN fuses no two convolutions.

    Raises ImportError without the package, and GraphRefused where no engine takes a graph.
    """
    case, terms = problem.case, _channel_terms(problem.case, problem.tensors)
    if case.op != "separable_conv2d":

        def function(t: Tensors) -> torch.Tensor:
            added = [("add", t["residual"])] if "add" in case.epilogue else []
            return _convolution(case, t["x"], t["weight"], [*terms, *added])
    else:
        depthwise = case.replace(op="conv2d", params={**case.params, "co": case["ci"]})
        first = _channel_terms(case, problem.tensors, "depthwise_")
        sizes = dict(zip(("h", "w"), output_size(case), strict=True))
        plain = {"ci": case["ci"], "co": case["co"], "n": case["n"], "k": 1, "s": 1, "p": 0, "d": 1}
        linear = case.replace(epilogue=("bn",)) if "linear" in case.params else case
        pointwise = linear.replace(op="conv2d", params={**plain, **sizes})

        def function(t: Tensors) -> torch.Tensor:
            between = _convolution(depthwise, t["x"], t["depthwise"], first)
            return _convolution(pointwise, between, t["weight"], terms)

    function(problem.tensors)
    return function


def _convolution(case: Case, x: torch.Tensor, weight: torch.Tensor, terms: list[Term]) -> torch.Tensor:
    shape = (case["n"], case["co"], *output_size(case))
    geometry = [(case.params.get(name, default),) * 2 for name, default in (("s", 1), ("p", 0), ("d", 1))]
    transposed = case.op == "conv_transpose2d"
    return fused_graph(x, weight, terms, shape, *geometry, case.activation, transposed=transposed)


def _channel_terms(case: Case, t: Tensors, prefix: str = "") -> list[Term]:
    found: list[Term] = []
    if "bn" in case.epilogue:
        scale, shift = affine(t, prefix)
        found = [("mul", scale), ("add", shift)]
    elif "bias" in t:
        found = [("add", t["bias"].float())]
    return [(kind, values[None, :, None, None]) for kind, values in found]
