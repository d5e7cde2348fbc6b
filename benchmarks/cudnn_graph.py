"""A convolution with its epilogue in one call of cuDNN's graph API (PyPI's `nvidia-cudnn-frontend`).

The package uses the cuDNN that torch has loaded. Forward only.
"""

from collections.abc import Callable

import torch

from benchmarks.cases import output_size
from benchmarks.problems import Problem, Tensors, affine


def convolution(problem: Problem) -> Callable[[Tensors], torch.Tensor]:
    """Build and plan act(scale * conv(x, w) + shift) for a conv2d or conv_transpose2d case.

    Raises ImportError without the package, and cuDNN's own error where no engine takes the graph.
    """
    import cudnn

    case, t = problem.case, problem.tensors
    kinds = {
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float16: cudnn.data_type.HALF,
        torch.float32: cudnn.data_type.FLOAT,
    }
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(problem.device).cuda_stream)
    graph = cudnn.pygraph(
        io_data_type=kinds[t["x"].dtype],
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    output = torch.empty(
        (case["n"], case["co"], *output_size(case)),
        dtype=t["x"].dtype,
        device=problem.device,
        memory_format=torch.channels_last,
    )
    x, weight = graph.tensor_like(t["x"]), graph.tensor_like(t["weight"])
    geometry = {
        "padding": [case["p"]] * 2,
        "stride": [case["s"]] * 2,
        "dilation": [case.params.get("d", 1)] * 2,
    }
    if case.op == "conv2d":
        y = graph.conv_fprop(image=x, weight=weight, **geometry)
    else:
        # A transposed convolution is the gradient of a convolution with respect to its image.
        y = graph.conv_dgrad(loss=x, filter=weight, **geometry)
        y.set_dim(list(output.shape)).set_stride(list(output.stride()))
    pointers = {x: t["x"], weight: t["weight"]}
    for node, values in _channel_terms(case, t):
        values = values.reshape(1, -1, 1, 1).contiguous(memory_format=torch.channels_last)
        term = graph.tensor_like(values)
        y = graph.mul(a=y, b=term) if node == "mul" else graph.add(a=y, b=term)
        pointers[term] = values
    if case.activation is not None:
        y = graph.relu(input=y, upper_clip=6.0) if case.activation == "relu6" else graph.relu(input=y)
    y.set_output(True)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=problem.device)
    pointers[y] = output

    def run(_: Tensors) -> torch.Tensor:
        graph.execute(pointers, workspace, handle=handle)
        return output

    return run


def _channel_terms(case, t: Tensors) -> list[tuple[str, torch.Tensor]]:
    if "bn" in case.epilogue:
        scale, shift = affine(t)
        return [("mul", scale), ("add", shift)]
    return [("add", t["bias"].float())] if "bias" in t else []
