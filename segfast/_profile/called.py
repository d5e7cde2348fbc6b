"""The FLOPs of operators that torch's profiler saw: those that a compiled graph calls."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .passes import OWN_FLOPS


def flops_of_call(event: Any) -> int:
    """As torch's flop counter counts them, from the shapes and numbers that the operator was given.

    Of one that it has no formula for, what the operators in it have: 0 of a kernel that inductor wrote. And 0
    of one that must be given a text or a list of tensors, of which the profiler tells nothing. `event` was
    recorded with shapes.
    """
    namespace, _, name = event.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name, None) if name else None
    counter = FlopCounterMode(display=False, custom_mapping=OWN_FLOPS)
    if packet is None or packet not in counter.flop_registry:
        return sum(map(flops_of_call, event.cpu_children))
    overloads = [getattr(packet, each) for each in packet.overloads()]
    overload = next((each for each in overloads if _takes(each, event)), None)
    if overload is None:
        return 0
    given = zip(overload._schema.arguments, event.input_shapes, event.concrete_inputs, strict=True)
    arguments = {
        argument.name: _argument(argument, shape, value)
        for argument, shape, value in given
        # Where the result is to be written.
        if not (argument.kwarg_only and argument.is_write)
    }
    with counter:
        packet(**arguments)
    return counter.get_total_flops()


def _takes(overload: Any, event: Any) -> bool:
    """True if the event's arguments are those of `overload`, of which the profiler does not tell the name."""
    arguments = overload._schema.arguments
    if len(arguments) != len(event.input_shapes):
        return False
    given = zip(arguments, event.input_shapes, event.concrete_inputs, strict=True)
    return all(_fits(argument, shape, value) for argument, shape, value in given)


def _fits(argument: Any, shape: list[int], value: Any) -> bool:
    if _is_tensor(argument):
        return value is None
    # Nothing is recorded of a text or a list of tensors, which may be left out only where it is optional.
    return not shape and (value is not None or str(argument.type).startswith("Optional"))


def _is_tensor(argument: Any) -> bool:
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def _argument(argument: Any, shape: list[int], value: Any) -> Any:
    if not _is_tensor(argument):
        return value
    # Of a tensor with no dimension and of None the profiler tells the same.
    none = not shape and str(argument.type).startswith("Optional")
    return None if none else torch.empty(shape, device="meta")
