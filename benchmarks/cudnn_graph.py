"""A case as calls of cuDNN's graph API: `segfast.ops._cudnn_graph` with the case's epilogue. Forward only."""

from collections.abc import Callable

import torch

from benchmarks.trial import Trial
from segfast.ops._case import Tensors
from segfast.ops._convolution_case import ConvolutionCase, affine
from segfast.ops._cudnn_graph import fused_graph
from segfast.ops.conv2d.cases import Conv2d
from segfast.ops.separable_conv2d.cases import DepthwiseConv2d

Term = tuple[str, torch.Tensor]


def layer(trial: Trial) -> Callable[[Tensors], torch.Tensor]:
    """Build and plan a conv2d (grouped too), conv_transpose2d or separable_conv2d case.

    A separable convolution is two graphs, one after the other: cuDNN fuses no two convolutions.

    Raises ImportError without the package, and GraphRefused where no engine takes a graph.
    """
    case, terms = trial.case, _channel_terms(trial.case, trial.tensors)
    if case.op != "separable_conv2d":

        def function(t: Tensors) -> torch.Tensor:
            added = [("add", t["residual"])] if "add" in case.epilogue else []
            return _convolution(case, t["x"], t["weight"], [*terms, *added])
    else:
        depthwise = case.become(DepthwiseConv2d, params={**case.params, "co": case["ci"]})
        first = _channel_terms(case, trial.tensors, "depthwise_")
        sizes = dict(zip(("h", "w"), case.output_size, strict=True))
        plain = {"ci": case["ci"], "co": case["co"], "n": case["n"], "k": 1, "s": 1, "p": 0, "d": 1}
        linear = case.replace(epilogue=("bn",)) if "linear" in case.params else case
        pointwise = linear.become(Conv2d, params={**plain, **sizes})

        def function(t: Tensors) -> torch.Tensor:
            between = _convolution(depthwise, t["x"], t["depthwise"], first)
            return _convolution(pointwise, between, t["weight"], terms)

    function(trial.tensors)
    return function


def _convolution(
    case: ConvolutionCase, x: torch.Tensor, weight: torch.Tensor, terms: list[Term]
) -> torch.Tensor:
    shape = (case["n"], case["co"], *case.output_size)
    geometry = [(case.get(name),) * 2 for name in ("s", "p", "d")]
    return fused_graph(x, weight, terms, shape, *geometry, case.activation, transposed=case.transposed)


def _channel_terms(case: ConvolutionCase, t: Tensors, prefix: str = "") -> list[Term]:
    found: list[Term] = []
    if "bn" in case.epilogue:
        scale, shift = affine(t, prefix)
        found = [("mul", scale), ("add", shift)]
    elif "bias" in t:
        found = [("add", t["bias"].float())]
    return [(kind, values[None, :, None, None]) for kind, values in found]
