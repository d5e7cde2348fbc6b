"""Other people's ASPPs, in eval and without gradients computed as one `FusedASPP`.

The module's class changes; its parameters and children stay as they are. In training, with gradients, hooks
on a child, a compiler or tracer looking, or a child replaced by something unknown, it computes what it always
did.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .._rules import own_class
from .aspp import FusedASPP, aspp_in
from .sequence import runs_fused
from .swap import FusedModule, fused_class, runs_in_eval

# In the __dict__ of a fused ASPP: the class of its pooled branch, whose forward was known or compared.
_POOL = "_segfast_aspp"
_KNOWN = {
    "torchvision.models.segmentation.deeplabv3.ASPP": "torchvision.models.segmentation.deeplabv3.ASPPPooling",
    "segmentation_models_pytorch.decoders.deeplabv3.decoder.ASPP": (
        "segmentation_models_pytorch.decoders.deeplabv3.decoder.ASPPPooling"
    ),
    "mmseg.models.decode_heads.aspp_head.ASPPHead": "torch.nn.modules.container.Sequential",
}


def is_aspp(module: nn.Module) -> bool:
    """True if the module's parts are those of an ASPP, as torchvision and smp, or mmseg, name them."""
    return _parts(module) is not None


def is_known(module: nn.Module) -> bool:
    """True if the module's forward is known to be that of an ASPP: its class is a published one."""
    parts = _parts(module)
    return parts is not None and _KNOWN.get(_name(module)) == _name(parts[1])


def aspp_of(module: nn.Module) -> FusedASPP | None:
    """The module's layers, or None where one of them is something else than in an ASPP."""
    parts = _parts(module)
    return None if parts is None else aspp_in(module, *parts[:3], pool_first=parts[3])


def fuse_aspp(module: nn.Module) -> None:
    """Let `module`, an ASPP, compute its `FusedASPP`."""
    parts = _parts(module)
    assert parts is not None
    vars(module)[_POOL] = own_class(parts[1])
    mixin = _Head if hasattr(type(module), "_forward_feature") else _ASPP
    kind: Any = type(module)
    module.__class__ = fused_class(mixin, kind)


def is_fused_aspp(module: nn.Module) -> bool:
    """True if `fuse_aspp` has been here."""
    return _POOL in vars(module)


def unfuse_aspps(model: nn.Module) -> None:
    """Undo `fuse_aspp` for every ASPP in `model`."""
    for module in model.modules():
        if vars(module).pop(_POOL, None) is not None:
            fused: Any = module
            fused.__class__ = fused.unfused_class


class _ASPP(FusedModule):
    """Mixed into the class of an ASPP whose forward is one `FusedASPP`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            aspp = _ready(self)
            if aspp is not None and _runs(aspp, args[0]):
                return aspp.run(self, args[0])  # type: ignore[arg-type]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _Head(FusedModule):
    """Mixed into the class of mmseg's head, which classifies what its `_forward_feature` returns."""

    def _forward_feature(self, inputs: Any) -> Tensor:
        aspp = _ready(self)
        if aspp is not None:
            input = self._transform_inputs(inputs)  # type: ignore[attr-defined]
            if _runs(aspp, input):
                return aspp.run(self, input)  # type: ignore[arg-type]
        return super()._forward_feature(inputs)  # type: ignore[misc]


def _ready(module: Any) -> FusedASPP | None:
    """The module's ASPP if nothing about its state speaks against running it."""
    if not runs_in_eval(module):
        return None
    parts = _parts(module)
    if parts is None or own_class(parts[1]) is not vars(module)[_POOL]:
        return None
    return aspp_in(module, *parts[:3], pool_first=parts[3])


def _runs(aspp: FusedASPP, input: Any) -> bool:
    return runs_fused(input) and aspp.is_eligible(input)


def _parts(module: Any) -> tuple[list[nn.Module], nn.Module, nn.Module, bool] | None:
    """Branches, pooled branch, projection, and whether the pooled branch is the first of all."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    children = module._modules
    convs, project = children.get("convs"), children.get("project")
    if len(children) == 2 and isinstance(convs, nn.ModuleList) and len(convs) > 1 and project is not None:
        *branches, pool = convs
        return branches, pool, project, False
    pool, branches, project = [children.get(name) for name in ("image_pool", "aspp_modules", "bottleneck")]
    if pool is not None and isinstance(branches, nn.ModuleList) and project is not None:
        return list(branches), pool, project, True
    return None


def _name(module: nn.Module) -> str:
    return f"{own_class(module).__module__}.{own_class(module).__qualname__}"
