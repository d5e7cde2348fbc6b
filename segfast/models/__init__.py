"""Whole segmentation networks, by class or by name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ._base import SegmentationModel
from .unet import UNet

__all__ = ["SegmentationModel", "UNet", "create", "list_models", "remap_state_dict"]

_MODELS: dict[str, type[SegmentationModel]] = {"unet": UNet}


def list_models() -> list[str]:
    """The names `create` knows.

    >>> "unet" in list_models()
    True
    """
    return sorted(_MODELS)


def create(name: str, **kwargs: Any) -> SegmentationModel:
    """Build the model of that name; `kwargs` go to its constructor.

    Raises:
        ValueError: no model of that name.

    >>> create("unet", width=4).num_classes
    2
    """
    if name not in _MODELS:
        raise ValueError(f"no model named {name!r}; there are {', '.join(list_models())}")
    return _MODELS[name](**kwargs)


def model_name(model: nn.Module) -> str:
    """The name under which `create` builds models of this class.

    Raises:
        ValueError: the class has none.
    """
    for name, cls in _MODELS.items():
        if type(model) is cls:
            return name
    raise ValueError(f"{type(model).__name__} is none of {', '.join(list_models())}")


def remap_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of another code base's checkpoint to those of `model`, for `model.load_state_dict`.

    For `UNet`: the layout of `milesial/Pytorch-UNet` (`inc.double_conv.0.weight`, ..., `outc.conv.bias`)
    with or without `module.` in front; entries that are not tensors are dropped. Outputs agree where the
    input's sides are multiples of `2**depth`; elsewhere that code pads the up-convolution's output with
    zeros, this one lets it run on. Keys that already are the model's own come back unchanged.

    Raises:
        ValueError: the bilinear variant (it has no up-convolution), unknown keys, or other sizes than the
            model's.
        TypeError: the model has no foreign layout to read.
    """
    remap = getattr(model, "remap_state_dict", None)
    if remap is None:
        raise TypeError(f"{type(model).__name__} has no foreign checkpoint layout to read")
    return remap(state_dict)
