"""Layers that may be computed together: nobody looks in between, nothing is lost by it, and it saves time."""

from typing import Any

import torch
from torch import Tensor, nn

from ...ops._aten_only import fusion_could_help
from ...ops._backend import _INTERPRETING
from .folding import runs_eagerly

_LOSSLESS = (torch.float32, torch.float64)
# Of an input on a CPU: below, the operator's own overhead may show.
_LEAST_ELEMENTS = 2**15
global_hooks = torch.nn.modules.module._has_any_global_hook


def worth_fusing(input: Any, growth: float = 1) -> bool:
    """True if one operator is worth asking for: ATen is done with small images before it is put together.

    It is where something of ours, of cuDNN's or of oneDNN's could compute it. `growth` is how many times
    larger the images are that count. False for what is no tensor: `torch.fx` traces the layers one by one.
    """
    if not isinstance(input, Tensor):
        return False
    if torch.compiler.is_compiling():
        # On a CPU the compiler folds norms by itself, and knows them by their own names alone.
        return _INTERPRETING or not input.is_cpu
    if fusion_could_help(input):
        return True
    return input.is_cpu and input.numel() * growth >= _LEAST_ELEMENTS


def only_forward(module: nn.Module) -> bool:
    """True if calling `module` is no more than its class's forward: no hooks, no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def folds_filters(input: Tensor, conv: nn.Module) -> bool:
    """True if ATen may have the norms in the filters: where nothing is lost, or differentiated."""
    return (
        input.is_cpu
        and not _INTERPRETING
        and _is_lossless(input, conv.weight)  # type: ignore[arg-type]
        and not torch.is_grad_enabled()
        and runs_eagerly()
    )


def _is_lossless(input: Tensor, weight: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return weight.dtype == torch.float32  # rounded once, with the norm in it or not
    return input.dtype == weight.dtype and weight.dtype in _LOSSLESS
