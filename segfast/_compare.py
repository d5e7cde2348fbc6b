"""Whether a model computes the same with its layers fused as without."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .nn._fused_chain import fusing


def arguments(example_inputs: Any) -> tuple[Any, ...]:
    """A model's arguments: a tensor alone is the first."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def difference(model: nn.Module, inputs: tuple[Any, ...]) -> str | None:
    """What is wrong with the fused model's outputs, or None."""
    devices = {t.device for t in inputs if isinstance(t, Tensor) and t.is_cuda}
    with running_mode(model, False), torch.no_grad(), torch.random.fork_rng(list(devices)):
        results = []
        for fused in (False, True):
            torch.manual_seed(0)
            try:
                with fusing(fused):
                    results.append(_pytree.tree_leaves(model(*inputs)))
            except RuntimeError as error:
                return first_line(error)
    for expected, actual in zip(*results, strict=True):
        if isinstance(expected, Tensor) and expected.is_floating_point() and expected.numel():
            if expected.shape != actual.shape:
                return f"an output of {list(expected.shape)} became {list(actual.shape)}"
            scale = expected.abs().nan_to_num(0, 0, 0).max().item()
            worst = (actual - expected).abs().nan_to_num(0).max().item()
            if worst > scale * math.sqrt(torch.finfo(expected.dtype).eps):
                return f"an output changed by {worst:.3g}, its largest value is {scale:.3g}"
    return None


@contextmanager
def running_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """`model` in train or eval; afterwards each module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
