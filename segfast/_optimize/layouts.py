"""The layouts of a model's filters: channels_last, and what our kernels read without a copy."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn

from ..nn._rules import all_rules, own_class
from ..ops._aten_only import fusion_could_help
from ..ops._backend import taken_by_kernels
from .eligible import record_of
from .verify import call, running_mode, undisturbed

# Where weights get the layout that the kernels read without a copy.
_LAYOUT_DEVICES = ("cuda",)


def all_channels_last(model: nn.Module) -> bool:
    """Lay every filter out so, and note it; not what is wrapped, whose buckets are laid out already."""
    if _is_wrapped(model):
        return False
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is None or tensor.dim() != 4 or type(tensor) is not nn.Parameter:
                continue
            if _channels_last(tensor.data).stride() != tensor.stride():
                set_layout(module, (name,), _channels_last)
                record = record_of(module)
                record["contiguous"] = tuple({*record.get("contiguous", ()), name})
    return True


def _is_wrapped(model: nn.Module) -> bool:
    return any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())


def lay_out(model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> None:
    """Give what kernels take on these inputs their layout, and note in each record what had another.

    Not in a model that is wrapped, whose buckets are laid out already.

    A weight that ATen takes stays as it is: in another layout ATen may copy it at every call. But where the
    kernels behind it take only the channels_last images that such a weight makes, it is channels_last too.
    """
    if _is_wrapped(model):
        return
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    owned = [
        (module, name, tensor)
        for module in modules
        for name, tensor in {**module._parameters, **module._buffers}.items()
        if _is_weight(tensor)
    ]
    weights = [tensor for _, _, tensor in owned]
    if not any(fusion_could_help(weight) for weight in weights):
        return
    layouts = {rule.target: rule.layout for rule in all_rules() if rule.layout is not None}
    before = [(t, t.data, None if t.grad is None else t.grad.data) for t in weights]

    def lay(taken: set[int] | None, others: Callable[[torch.Tensor], torch.Tensor] | None) -> set[int]:
        """Lay out the weights in `taken` (None: all), the rest by `others`; return what is taken then."""
        for tensor, data, grad in before:
            tensor.data = data
            if tensor.grad is not None and grad is not None:
                tensor.grad.data = grad
        for module, name, tensor in owned:
            own = layouts.get(own_class(module), _channels_last)
            layout = own if taken is None or id(tensor) in taken else others
            if layout is not None and layout(tensor.data).stride() != tensor.stride():
                set_layout(module, (name,), layout)
        with running_mode(model, False), undisturbed(model):
            return {id(t) for t in taken_by_kernels(lambda: call(model, inputs), weights)}

    taken = lay(None, None)
    if lay(taken, None) != taken:
        lay(taken, _channels_last)
    strides = {id(tensor): data.stride() for tensor, data, _ in before}
    for module, name, tensor in owned:
        if tensor.stride() != strides[id(tensor)]:
            record = record_of(module)
            record["contiguous"] = tuple({*record.get("contiguous", ()), name})


def _is_weight(tensor: Any) -> TypeGuard[torch.Tensor]:
    plain = type(tensor) in (nn.Parameter, torch.Tensor)
    return plain and tensor.device.type in _LAYOUT_DEVICES and tensor.dim() == 4


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def set_layout(
    module: nn.Module, names: tuple[str, ...], layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Change the layout under the same Parameter objects, as `Module.to(memory_format=...)` does."""
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        tensor.data = layout(tensor.data)
        if tensor.grad is not None:
            tensor.grad.data = layout(tensor.grad.data)
