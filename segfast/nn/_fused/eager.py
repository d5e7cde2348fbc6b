"""Layers that may be computed together: nobody looks in between, and nothing is lost by it."""

import torch
from torch import Tensor, nn

from ...ops._backend import _INTERPRETING
from .folding import runs_eagerly

# In the __dict__ of a module whose forward calls fused sequences.
CALLER = "_segfast_caller"
_LOSSLESS = (torch.float32, torch.float64)
global_hooks = torch.nn.modules.module._has_any_global_hook


def only_forward(module: nn.Module) -> bool:
    """True if calling `module` is no more than its class's forward: no hooks, no forward of its own."""
    ours = CALLER in vars(module)  # one hook before its forward, one after it
    return not (
        len(module._forward_hooks) > ours
        or len(module._forward_pre_hooks) > ours
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
