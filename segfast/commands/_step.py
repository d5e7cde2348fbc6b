"""One call of a model, or one training step, as `segfast check` runs it: seeded, on ATen, in a layout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .._errors import UserError
from .._optimize.verify import call, leaves
from ..ops._backend import backend

# What ATen may compute images in; which one is faster depends on the network and the device.
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Step:
    """One call of a model, or one forward and backward with the same random gradient each time.

    Each call converts the images to `memory_format`, if there is one.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any], train: bool):
        self.model = model
        self.inputs = inputs
        self.train = train
        self.memory_format: torch.memory_format | None = None

    def __call__(self) -> Any:
        with torch.set_grad_enabled(self.train):
            self.model.zero_grad(set_to_none=True)
            inputs = _pytree.tree_map_only(Tensor, lambda t: _converted(t, self.memory_format), self.inputs)
            # The model may work in place; a copy is made in both of what is compared and timed.
            outputs = call(self.model, inputs)
            if self.train:
                tensors = [t for t in floating(outputs).values() if t.requires_grad]
                if not tensors:
                    raise UserError("train: no output of the model depends on its parameters")
                torch.autograd.backward(tensors, [torch.randn_like(t) for t in tensors])
        return outputs


def laid_out(step: Step, memory_format: torch.memory_format | None) -> Callable[[], Any]:
    """The step on ATen, with weights and images in this layout; it has run."""
    step.memory_format = memory_format
    for tensor in (*step.model.parameters(), *step.model.buffers()):
        tensor.data = _converted(tensor.data, memory_format)
    run = seeded(on_aten(step))
    run()
    return run


def has_layouts(model: nn.Module, inputs: Any) -> bool:
    """True if a weight or an input can be in one of `LAYOUTS` or another."""
    return any(map(_has_layout, (*model.parameters(), *model.buffers(), *_pytree.tree_leaves(inputs))))


def layout_of(model: nn.Module) -> str:
    """The one of `LAYOUTS` that a model's weights have: "NCHW" unless one has the other for certain."""
    weights = (p for p in model.parameters() if _has_layout(p) and not p.is_contiguous())
    last = any(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    return "channels_last" if last else "NCHW"


def seeded(run: Callable[[], Any]) -> Callable[[], Any]:
    """Dropout and the gradients of the outputs must be the same before and after."""

    def seeded() -> Any:
        torch.manual_seed(0)
        return run()

    return seeded


def on_aten(run: Callable[[], Any]) -> Callable[[], Any]:
    def on_aten() -> Any:
        with backend("aten"):
            return run()

    return on_aten


def floating(outputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors of whatever a model returns, by their path in it."""
    found = {p: t for p, t in leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()}
    if not found:
        raise UserError(f"the model returned {type(outputs).__name__} without a floating-point tensor in it")
    return found


def _has_layout(value: Any) -> bool:
    plain = type(value) in (nn.Parameter, Tensor) and value.layout == torch.strided
    return plain and value.dim() == 4


def _converted(tensor: Tensor, memory_format: torch.memory_format | None) -> Tensor:
    """A copy, or `tensor` itself if it is so already, or has no layout."""
    if memory_format is None or not _has_layout(tensor):
        return tensor
    return tensor.contiguous(memory_format=memory_format)
