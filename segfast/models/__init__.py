"""Whole segmentation networks, by class or by name."""

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ._base import SegmentationModel
from .deeplab import DeepLab, deeplabv1_vgg16, deeplabv2_resnet101, deeplabv2_vgg16
from .deeplabv3 import DeepLabV3, deeplabv3_mobilenet_v3_large, deeplabv3_resnet50, deeplabv3_resnet101
from .deeplabv3plus import (
    DeepLabV3Plus,
    deeplabv3plus_mobilenet_v2,
    deeplabv3plus_resnet50,
    deeplabv3plus_resnet101,
    deeplabv3plus_xception65,
)
from .fcn import FCN, fcn8s, fcn16s, fcn32s
from .fcn_alexnet import fcn8s_alexnet, fcn16s_alexnet, fcn32s_alexnet
from .fcn_googlenet import fcn8s_googlenet, fcn16s_googlenet, fcn32s_googlenet
from .fcn_resnet import FCNResNet, fcn_resnet50, fcn_resnet101
from .hypercolumns import Hypercolumns, draw_points, hypercolumns_resnet50, hypercolumns_vgg16
from .lraspp import LRASPP, lraspp_mobilenet_v3_large
from .segnet import SegNet, segnet_vgg16
from .selfie_segmenter import SelfieSegmenter
from .unet import UNet

__all__ = [
    "FCN",
    "LRASPP",
    "DeepLab",
    "DeepLabV3",
    "DeepLabV3Plus",
    "FCNResNet",
    "Hypercolumns",
    "SegNet",
    "SegmentationModel",
    "SelfieSegmenter",
    "UNet",
    "create",
    "deeplabv1_vgg16",
    "deeplabv2_resnet101",
    "deeplabv2_vgg16",
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3plus_mobilenet_v2",
    "deeplabv3plus_resnet50",
    "deeplabv3plus_resnet101",
    "deeplabv3plus_xception65",
    "draw_points",
    "fcn8s",
    "fcn8s_alexnet",
    "fcn8s_googlenet",
    "fcn16s",
    "fcn16s_alexnet",
    "fcn16s_googlenet",
    "fcn32s",
    "fcn32s_alexnet",
    "fcn32s_googlenet",
    "fcn_resnet50",
    "fcn_resnet101",
    "hypercolumns_resnet50",
    "hypercolumns_vgg16",
    "list_models",
    "lraspp_mobilenet_v3_large",
    "remap_state_dict",
    "segnet_vgg16",
]

# Classes, and the functions that build one class in several ways: `name` then tells its networks apart.
_MODELS: dict[str, Callable[..., SegmentationModel]] = {
    "deeplabv1_vgg16": deeplabv1_vgg16,
    "deeplabv2_resnet101": deeplabv2_resnet101,
    "deeplabv2_vgg16": deeplabv2_vgg16,
    "deeplabv3_mobilenet_v3_large": deeplabv3_mobilenet_v3_large,
    "deeplabv3_resnet50": deeplabv3_resnet50,
    "deeplabv3_resnet101": deeplabv3_resnet101,
    "deeplabv3plus_mobilenet_v2": deeplabv3plus_mobilenet_v2,
    "deeplabv3plus_resnet50": deeplabv3plus_resnet50,
    "deeplabv3plus_resnet101": deeplabv3plus_resnet101,
    "deeplabv3plus_xception65": deeplabv3plus_xception65,
    "fcn8s": fcn8s,
    "fcn8s_alexnet": fcn8s_alexnet,
    "fcn8s_googlenet": fcn8s_googlenet,
    "fcn16s": fcn16s,
    "fcn16s_alexnet": fcn16s_alexnet,
    "fcn16s_googlenet": fcn16s_googlenet,
    "fcn32s": fcn32s,
    "fcn32s_alexnet": fcn32s_alexnet,
    "fcn32s_googlenet": fcn32s_googlenet,
    "fcn_resnet50": fcn_resnet50,
    "fcn_resnet101": fcn_resnet101,
    "hypercolumns_resnet50": hypercolumns_resnet50,
    "hypercolumns_vgg16": hypercolumns_vgg16,
    "lraspp_mobilenet_v3_large": lraspp_mobilenet_v3_large,
    "segnet_vgg16": segnet_vgg16,
    "selfie_segmenter": SelfieSegmenter,
    "unet": UNet,
}


def list_models(pattern: str = "*") -> list[str]:
    """The names `create` knows, sorted; of `pattern`, those that match it as file names match in a shell.

    >>> list_models("fcn_resnet*")
    ['fcn_resnet101', 'fcn_resnet50']
    """
    return sorted(fnmatch.filter(_MODELS, pattern))


def create(name: str, **options: Any) -> SegmentationModel:
    """Build the model of that name, with random weights; its function or class gets `options`.

    Raises:
        ValueError: no model of that name; the nearest ones are listed. An option out of range.
        TypeError: an option that the model does not have.

    >>> create("unet", width=4).num_classes
    2
    """
    check_name(name)
    return _MODELS[name](**options)


def check_name(name: str) -> None:
    """Raise ValueError for a name that `create` does not know."""
    if name not in _MODELS:
        nearest = ", ".join(difflib.get_close_matches(name, _MODELS, n=5, cutoff=0))
        raise ValueError(
            f"segfast has no model {name!r}; the nearest are {nearest}; segfast.models.list_models() has all"
        )


def model_name(model: nn.Module) -> str:
    """The name under which `create` builds this model.

    Raises:
        ValueError: it has none; a subclass of a network does not take over its name.
    """
    for name, build in _MODELS.items():
        if type(model) is build or vars(model).get("name") == name:
            return name
    raise ValueError(f"{type(model).__name__} is none of {', '.join(list_models())}")


def remap_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of another code base's checkpoint to those of `model`, for `model.load_state_dict`.

    The checkpoint may hold the weights under "state_dict" or "model", beside an epoch and an optimizer, and
    its keys what DataParallel (`module.`) and torch.compile (`_orig_mod.`) put into them.

    For `UNet`: the layout of `milesial/Pytorch-UNet` (`inc.double_conv.0.weight`, ..., `outc.conv.bias`);
    entries that are not tensors are dropped. A padded `model` then computes what that network does at every
    size: its `config["zero_pad_up"]` is set to True, which a `UNet` that is to read the renamed weights by
    itself is given as an argument.

    For `DeepLabV3Plus` and the encoders in `segfast.models.encoders`: the classifiers of torchvision
    (`mobilenet_v2`, `resnet50`, ...) and timm (`mobilenetv2_100`, `xception65`), or their encoders, with or
    without `encoder.` in front. What those do not have, the decoder, keeps the weights that `model` has.

    For `FCN`: torchvision's `vgg16`, `alexnet` or `googlenet`, whose linear layers become convolutions. For
    `FCNResNet`, `DeepLabV3` and `LRASPP`: torchvision's networks of the same names, with or without the
    auxiliary head, and its `resnet50`, `resnet101` and `mobilenet_v3_large`. For `DeepLab` and
    `Hypercolumns`: torchvision's `vgg16`, `resnet50` and `resnet101`. For `SegNet`: torchvision's `vgg16_bn`.

    Keys that already are the model's own come back unchanged.

    Raises:
        ValueError: the bilinear U-Net (it has no up-convolution), unknown or missing keys, no tensors at all,
            or other sizes than the model's.
        TypeError: the model has no foreign layout to read, or the checkpoint is no mapping.
    """
    remap = getattr(model, "remap_state_dict", None)
    if remap is None:
        raise TypeError(f"{type(model).__name__} has no foreign checkpoint layout to read")
    return remap(state_dict)
