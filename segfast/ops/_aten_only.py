"""Asked before an operator is put together: could anything but ATen run on these images?"""

from torch import Tensor

from ._backend import _INTERPRETING, get_backend, is_noting
from ._choice import could_choose
from ._gpu import can_choose


def certainly_aten(input: Tensor) -> bool:
    """True if our kernels and cuDNN's fused calls are out of question for `input`, and nobody asks why."""
    if get_backend() == "triton" or is_noting():
        return False
    return not _could_run_on_gpu(input) if input.is_cuda else input.is_cpu and not _INTERPRETING


def fusion_could_help(input: Tensor) -> bool:
    """True if something could run on `input` that computes a convolution and what follows it in one pass.

    Elsewhere layers put together are the same passes over the images, and Python's time besides.
    """
    if input.is_cuda:
        return _could_run_on_gpu(input)
    return (input.is_cpu and _INTERPRETING) or could_choose(input)


def _could_run_on_gpu(input: Tensor) -> bool:
    """True if our kernels, or cuDNN's fused calls, could run on `input`."""
    choice = get_backend()
    return choice == "triton" or (choice == "auto" and can_choose(_index(input)))


def _index(input: Tensor) -> int:
    index = input.device.index
    return -1 if index is None else index
