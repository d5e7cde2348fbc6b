"""A convolution with its epilogue in one call of cuDNN's graph API (PyPI's `nvidia-cudnn-frontend`).

The package uses the cuDNN that torch has loaded. Forward only.
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import Case, output_size
from benchmarks.problems import Problem, Tensors, affine

# An epilogue's activation, as the graph's node and its arguments. cuDNN's gelu is the one with erf.
_ACTIVATIONS: dict[str, tuple[str, dict[str, float]]] = {
    "relu": ("relu", {}),
    "relu6": ("relu", {"upper_clip": 6.0}),
    "silu": ("swish", {"swish_beta": 1.0}),
    "gelu": ("gelu", {}),
}


def layer(problem: Problem) -> Callable[[Tensors], torch.Tensor]:
    """Build and plan a conv2d (grouped too), conv_transpose2d or separable_conv2d case.

    A separable convolution is two graphs, one after the other: cuDNN fuses no two convolutions.

    Raises ImportError without the package, and cuDNN's own error where no engine takes a graph.
    """
    case, t = problem.case, problem.tensors
    if case.op != "separable_conv2d":
        run, output = _convolution(case, t["x"], t["weight"], _channel_terms(case, t))
    else:
        depthwise = case.replace(op="conv2d", params={**case.params, "co": case["ci"]})
        terms = _channel_terms(case, t, "depthwise_")
        first, between = _convolution(depthwise, t["x"], t["depthwise"], terms)
        plain = {"ci": case["ci"], "co": case["co"], "n": case["n"], "k": 1, "s": 1, "p": 0, "d": 1}
        sizes = dict(zip(("h", "w"), between.shape[2:], strict=True))
        linear = case.replace(epilogue=("bn",)) if "linear" in case.params else case
        pointwise = linear.replace(op="conv2d", params={**plain, **sizes})
        second, output = _convolution(pointwise, between, t["weight"], _channel_terms(case, t))

        def run() -> None:
            first()
            second()

    def function(_: Tensors) -> torch.Tensor:
        run()
        return output

    return function


def _convolution(
    case: Case, x: torch.Tensor, weight: torch.Tensor, terms: list[tuple[str, torch.Tensor]]
) -> tuple[Callable[[], None], torch.Tensor]:
    """A call of act(... conv(x, weight) ...), `terms` multiplied and added in order, and what it fills."""
    import cudnn

    kinds = {
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float16: cudnn.data_type.HALF,
        torch.float32: cudnn.data_type.FLOAT,
    }
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(x.device).cuda_stream)
    graph = cudnn.pygraph(
        io_data_type=kinds[x.dtype],
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    output = torch.empty(
        (case["n"], case["co"], *output_size(case)),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    # With a filter's stride over a single channel as cuDNN has it; torch leaves it open.
    weight = weight.as_strided(
        weight.shape, torch.empty_like(weight, memory_format=torch.channels_last).stride()
    )
    image, filters = graph.tensor_like(x), graph.tensor_like(weight)
    geometry = {
        "padding": [case["p"]] * 2,
        "stride": [case["s"]] * 2,
        "dilation": [case.params.get("d", 1)] * 2,
    }
    if case.op == "conv2d":
        # Groups follow from the filters' channels.
        y = graph.conv_fprop(image=image, weight=filters, **geometry)
    else:
        # A transposed convolution is the gradient of a convolution with respect to its image.
        y = graph.conv_dgrad(loss=image, filter=filters, **geometry)
        y.set_dim(list(output.shape)).set_stride(list(output.stride()))
    pointers: dict[Any, torch.Tensor] = {image: x, filters: weight}
    for node, values in terms:
        values = values.reshape(1, -1, 1, 1).contiguous(memory_format=torch.channels_last)
        term = graph.tensor_like(values)
        y = graph.mul(a=y, b=term) if node == "mul" else graph.add(a=y, b=term)
        pointers[term] = values
    if case.activation is not None:
        node, options = _ACTIVATIONS[case.activation]
        y = getattr(graph, node)(input=y, **options)
    y.set_output(True)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.device)
    pointers[y] = output
    return lambda: graph.execute(pointers, workspace, handle=handle), output


def _channel_terms(case: Case, t: Tensors, prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    if "bn" in case.epilogue:
        scale, shift = affine(t, prefix)
        return [("mul", scale), ("add", shift)]
    return [("add", t["bias"].float())] if "bias" in t else []
