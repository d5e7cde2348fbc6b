"""What users call: the names and argument order of `torch.nn.functional`, plus the fused arguments."""

import torch

from .ops.conv_transpose2d import conv_transpose2d, up_concat

__all__ = ["conv_transpose2d", "up_concat"]

for _name in __all__:
    # Symbolic tracing keeps the call whole instead of stepping into the choice of backend.
    torch.fx.wrap(_name)
