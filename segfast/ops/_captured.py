"""Tensors computed once from parameters, kept, and read by captured CUDA graphs where they lie.

A graph goes on reading that memory at each replay, and nobody says when the graph is gone. So the memory
stays, one copy of it: what is computed anew is written there.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def is_captured(tensors: Iterable[Tensor | None]) -> bool:
    """A CUDA graph is being captured on the device of one of these."""
    return any([t is not None and t.is_cuda for t in tensors]) and torch.cuda.is_current_stream_capturing()


def renewed(kept: Any, fresh: Any) -> Any:
    """`kept` with the values of `fresh`, which has its structure; `fresh` if shapes or the like differ.

    Nothing is written where the values are the same: autograd may have saved `kept`.
    """
    pairs = list(zip(_pytree.tree_leaves(kept), _pytree.tree_leaves(fresh), strict=True))
    if any([_kind(old) != _kind(new) for old, new in pairs]):
        return fresh
    with torch.inference_mode(False), torch.no_grad():
        for old, new in pairs:
            if isinstance(old, Tensor) and not torch.equal(old, new):
                old.copy_(new)
    return kept


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
