"""The peers of every case: what PyTorch, cuDNN and others do with the same layer.

`peers(trial)` yields a Candidate for each that exists on this machine, else a Skipped with the reason.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import crf_peers, cudnn_graph
from benchmarks.cases import is_crf
from benchmarks.environment import dry_run
from benchmarks.timing import Candidate, Skipped
from benchmarks.trial import Formula, Trial, folded
from segfast.ops._case import Tensors
from segfast.ops.conv2d.cases import Branches
from segfast.ops.separable_conv2d.cases import DepthwiseConv2d

Peer = Candidate | Skipped
COMPILE_MODE = "max-autotune-no-cudagraphs"


def peers(trial: Trial, *, compiled: bool = False) -> Iterator[Peer]:
    """Every peer of an operator case; `compiled` adds torch.compile, which takes seconds a case."""
    case = trial.case
    if is_crf(case):
        yield from crf_peers.peers(trial)
        return
    yield Candidate("aten_nchw", trial.bind(trial.formula, trial.contiguous()))
    yield Candidate("aten_nhwc", trial.bind(trial.formula))
    if isinstance(case, DepthwiseConv2d):
        yield from _depthwise_kernels(trial)
    if case.direction == "forward" and case.op in ("conv2d", "conv_transpose2d"):
        yield from _fused(trial)
    elif case.direction == "forward" and trial.device.type == "cuda":
        if isinstance(case, Branches):
            yield Candidate("cudnn_conv_relu", trial.bind(_fused_pyramid(trial)))
        elif case.op == "separable_conv2d":
            yield from _cudnn_graph(trial)
    if compiled:
        from torch._functorch import config

        # A backward timed alone runs many times over one forward's saved tensors.
        config.donated_buffer = False
        function = torch.compile(trial.formula, mode=COMPILE_MODE, dynamic=False)
        yield Candidate("compile", trial.bind(function), note=compile_note(COMPILE_MODE))


def compile_note(mode: str) -> str:
    """The compiler's name, and how it compiled."""
    return f"torch {torch.__version__} {mode}, channels_last"


def _depthwise_kernels(trial: Trial) -> Iterator[Peer]:
    """PyTorch's own depthwise kernels, then cuDNN's, where this torch can be told which to use."""
    if trial.device.type != "cuda" and not dry_run():
        return
    for kernels in ("native", "cudnn"):
        if not hasattr(torch.backends.cudnn, "depthwise_kernel"):
            note = f"torch {torch.__version__} has no cudnn.depthwise_kernel"
            yield Skipped(f"aten_nhwc_{kernels}", note)
            continue
        for layout, tensors in (("nhwc", trial.tensors), ("nchw", trial.contiguous())):
            run = trial.bind(trial.formula, tensors)
            yield Candidate(f"aten_{layout}_{kernels}", _with_depthwise(kernels, run))


def _with_depthwise(kernels: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with cudnn.depthwise_kernel set, the backward pass included."""
    cudnn: Any = torch.backends.cudnn

    def call() -> Any:
        # One attribute, not cudnn.flags(): that sets benchmark and fp32's precision as well.
        before, cudnn.depthwise_kernel = cudnn.depthwise_kernel, kernels
        try:
            return run()
        finally:
            cudnn.depthwise_kernel = before

    return call


def _fused(trial: Trial) -> Iterator[Peer]:
    """Batch norm folded into the filter, and cuDNN's own calls that take the epilogue along."""
    case, tensors = trial.case, trial.tensors
    if "bn" in case.epilogue:
        tensors = folded(tensors)
        bare = case.replace(epilogue=tuple(name for name in case.epilogue if name != "bn"))
        yield Candidate("aten_nhwc_folded", trial.bind(bare.formula, tensors))
    if trial.device.type != "cuda":
        return
    if case.op == "conv2d" and case.activation == "relu":
        options = [*([case[name]] * 2 for name in ("s", "p", "d")), case["g"]]

        def convolution_relu(t: Tensors) -> torch.Tensor:
            return torch.cudnn_convolution_relu(t["x"], t["weight"], t["bias"], *options)

        def convolution_add_relu(t: Tensors) -> torch.Tensor:
            operands = (t["x"], t["weight"], t["residual"], 1.0, t["bias"])
            return torch.cudnn_convolution_add_relu(*operands, *options)

        if "add" in case.epilogue:
            yield Candidate("cudnn_conv_add_relu", trial.bind(convolution_add_relu, tensors))
        else:
            yield Candidate("cudnn_conv_relu", trial.bind(convolution_relu, tensors))
    yield from _cudnn_graph(trial)


def _fused_pyramid(trial: Trial) -> Formula:
    """An ASPP, or its branches, with every convolution, batch norm and relu one call of cuDNN's."""
    case, tensors = trial.case, trial.tensors
    names = [name for name, value in tensors.items() if value.dim() == 4 and name != "x"]
    filters = {name: folded({**tensors, "weight": tensors[name]}) for name in names}

    def layer(x: torch.Tensor, t: Tensors, name: str, d: int = 1) -> torch.Tensor:
        weight, bias = (filters[name][part] for part in ("weight", "bias"))
        padding = d * (weight.shape[2] // 2)
        return torch.cudnn_convolution_relu(x, weight, bias, [1, 1], [padding] * 2, [d] * 2, 1)

    return functools.partial(case.formula, layer=layer)


def _cudnn_graph(trial: Trial) -> Iterator[Peer]:
    if importlib.util.find_spec("cudnn") is None:
        yield Skipped("cudnn_graph", "nvidia-cudnn-frontend is not installed")
        return
    try:
        function = cudnn_graph.layer(trial)
    except Exception as error:
        yield Skipped("cudnn_graph", f"{type(error).__name__}: {error}".splitlines()[0])
        return
    yield Candidate("cudnn_graph", trial.bind(function))
