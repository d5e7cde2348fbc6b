"""The peers of every case: what PyTorch, cuDNN and others do with the same layer.

`peers(problem)` yields a Candidate for each that exists on this machine, else a Skipped with the reason.
"""

import importlib.util
import inspect
from collections.abc import Iterator

import torch

from benchmarks import cudnn_graph
from benchmarks.problems import FORMULAS, Problem, Tensors, folded
from benchmarks.timing import Candidate, Skipped

Peer = Candidate | Skipped
COMPILE_MODE = "max-autotune-no-cudagraphs"
MOST_EXPONENTIALS = 1e12  # of a plain CRF: more would take a minute on the fastest GPU


def peers(problem: Problem, *, compiled: bool = False) -> Iterator[Peer]:
    """Every peer of an operator case; `compiled` adds torch.compile, which takes seconds a case."""
    case = problem.case
    if case.op == "dense_crf":
        yield from _crf(problem)
        return
    yield Candidate("aten_nchw", problem.bind(problem.formula, problem.contiguous()))
    yield Candidate("aten_nhwc", problem.bind(problem.formula))
    if case.params.get("g", 1) > 1 or case.op == "separable_conv2d":
        yield from _native_depthwise(problem)
    if case.direction == "forward" and case.op in ("conv2d", "conv_transpose2d"):
        yield from _fused(problem)
    if compiled:
        from torch._functorch import config

        # A backward timed alone runs many times over one forward's saved tensors.
        config.donated_buffer = False
        function = torch.compile(problem.formula, mode=COMPILE_MODE, dynamic=False)
        yield Candidate("compile", problem.bind(function), note=compile_note())


def compile_note() -> str:
    return f"torch {torch.__version__} {COMPILE_MODE}, channels_last"


def _native_depthwise(problem: Problem) -> Iterator[Peer]:
    """PyTorch's own depthwise kernels in place of cuDNN's, where this torch can be told to use them."""
    flags = torch.backends.cudnn.flags
    if "depthwise_kernel" not in inspect.signature(flags).parameters:
        yield Skipped("aten_nhwc_native", f"torch {torch.__version__} has no cudnn depthwise_kernel flag")
        return

    def native(t: Tensors) -> torch.Tensor:
        with flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, depthwise_kernel="native"):
            return problem.formula(t)

    yield Candidate("aten_nhwc_native", problem.bind(native))
    yield Candidate("aten_nchw_native", problem.bind(native, problem.contiguous()))


def _fused(problem: Problem) -> Iterator[Peer]:
    """Batch norm folded into the filter, and cuDNN's own calls that take the epilogue along."""
    case, tensors = problem.case, problem.tensors
    if "bn" in case.epilogue:
        tensors = folded(tensors)
        bare = case.replace(epilogue=tuple(name for name in case.epilogue if name != "bn"))
        yield Candidate("aten_nhwc_folded", problem.bind(FORMULAS[case.op](bare), tensors))
    if problem.device.type != "cuda":
        return
    if case.op == "conv2d" and case.activation == "relu":
        geometry = [[case[name]] * 2 for name in ("s", "p", "d")]

        def convolution_relu(t: Tensors) -> torch.Tensor:
            return torch.cudnn_convolution_relu(t["x"], t["weight"], t["bias"], *geometry, case["g"])

        yield Candidate("cudnn_conv_relu", problem.bind(convolution_relu, tensors))
    if importlib.util.find_spec("cudnn") is None:
        yield Skipped("cudnn_graph", "nvidia-cudnn-frontend is not installed")
        return
    try:
        function = cudnn_graph.convolution(problem)
    except Exception as error:
        yield Skipped("cudnn_graph", f"{type(error).__name__}: {error}".splitlines()[0])
        return
    yield Candidate("cudnn_graph", problem.bind(function))


def _crf(problem: Problem) -> Iterator[Peer]:
    case = problem.case
    if case.exponentials > MOST_EXPONENTIALS:
        yield Skipped("pytorch_exact", f"{case.exponentials:.1e} exponentials in plain PyTorch take too long")
    else:
        yield Candidate("pytorch_exact", problem.bind(problem.formula), note="all pairs, fp32")
    if importlib.util.find_spec("pydensecrf") is None:
        yield Skipped("pydensecrf", "pydensecrf is not installed (pydensecrf2 on PyPI)")
        return
    # An approximation, shown with its error.
    yield Candidate(
        "pydensecrf", lambda: _pydensecrf(problem), note="permutohedral lattice, one CPU core", tolerance=0.5
    )


def _pydensecrf(problem: Problem) -> torch.Tensor:
    """Set-up and iterations, from and to the problem's device: what a user waits for."""
    import numpy
    from pydensecrf import densecrf

    case = problem.case
    unary, image = (problem.tensors[name].cpu().numpy() for name in ("unary", "image"))
    labels, height, width = unary.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(numpy.ascontiguousarray(unary.reshape(labels, -1), dtype=numpy.float32))
    crf.addPairwiseGaussian(sxy=case["gamma"], compat=case["gaussian_weight"])
    rgb = numpy.ascontiguousarray(image.transpose(1, 2, 0)).astype(numpy.uint8)
    crf.addPairwiseBilateral(sxy=case["alpha"], srgb=case["beta"], rgbim=rgb, compat=case["bilateral_weight"])
    q = numpy.array(crf.inference(case["iterations"]))
    return torch.from_numpy(q).reshape(labels, height, width).to(problem.device)
