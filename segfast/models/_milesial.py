"""Checkpoints in the key layout of the widely used `milesial/Pytorch-UNet`. Only key names are matched here.

`inc.double_conv.{0,1,3,4}`, `downI.maxpool_conv.1.double_conv.*`, `upI.up`, `upI.conv.double_conv.*`,
`outc.conv`.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._base import tensors

if TYPE_CHECKING:
    from .unet import UNet

_LAYERS = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}
_KEY = re.compile(
    r"(?:(?P<inc>inc)|down(?P<down>\d+)\.maxpool_conv\.1|up(?P<up>\d+)\.conv)\.double_conv\.(?P<layer>[0134])\.(?P<rest>\w+)"
)
_UP_KEY = re.compile(r"up(\d+)\.up\.(weight|bias)")
_HEAD_KEY = re.compile(r"outc\.conv\.(weight|bias)")


def is_milesial(state_dict: Mapping[str, Any]) -> bool:
    """True if the keys are of this layout."""
    return any(key.startswith("inc.double_conv.") for key in state_dict)


def remap(state_dict: Mapping[str, Any], model: "UNet") -> dict[str, Tensor]:
    """Rename the keys to those of `model` (see `segfast.models.remap_state_dict`).

    A bias before a batch norm, which older checkpoints have, is folded into the running mean:
    `conv + bias - mean` is `conv - (mean - bias)`, and in training the norm subtracts the bias anyway.
    A padded `model` is told that its up-convolutions end in zeros where a side is odd (`zero_pad_up`).

    Raises:
        ValueError: the bilinear variant, another architecture, or sizes that are not those of `model`.
    """
    state = tensors(state_dict)
    own = model.state_dict()
    if state.keys() == own.keys():
        return state
    if not is_milesial(state):
        raise ValueError(
            f"the checkpoint's keys are neither {type(model).__name__}'s own nor of the milesial layout: "
            f"{', '.join(sorted(state)[:3])}, ..."
        )
    if not any(_UP_KEY.fullmatch(key) for key in state):
        raise ValueError(
            "the checkpoint is of the bilinear variant: it upsamples by interpolation and has no weights for "
            "the up-convolutions (up1.up.weight); use a checkpoint made with bilinear=False"
        )
    _check_config(state, model)
    renamed = {_rename(key, model.depth): value for key, value in state.items()}
    for key in [key for key in renamed if key.endswith((".conv1.bias", ".conv2.bias"))]:
        mean = key.replace(".conv1.bias", ".norm1.running_mean").replace(".conv2.bias", ".norm2.running_mean")
        if mean in renamed:
            renamed[mean] = renamed[mean] - renamed.pop(key)
    for key, value in own.items():
        if key not in renamed:
            raise ValueError(f"the checkpoint has nothing for {key}")
        if renamed[key].shape != value.shape:
            raise ValueError(
                f"{key}: the checkpoint has {list(renamed[key].shape)}, the model {list(value.shape)}"
            )
    model.config["zero_pad_up"] = model.padded
    return renamed


def _check_config(state: Mapping[str, Tensor], model: "UNet") -> None:
    """Say in the constructor's terms where the checkpoint's network differs from `model`."""
    first, last = state["inc.double_conv.0.weight"], state.get("outc.conv.weight")
    if last is None:
        raise ValueError("the checkpoint has nothing for head.weight (outc.conv.weight)")
    theirs = {
        "in_channels": first.shape[1],
        "num_classes": last.shape[0],
        "width": first.shape[0],
        "depth": len({key.split(".")[0] for key in state if key.startswith("down")}),
        "norm": "batch" if "inc.double_conv.1.running_mean" in state else None,
    }
    wrong = {name: value for name, value in theirs.items() if model.config[name] != value}
    if wrong:
        need = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        have = ", ".join(f"{name}={model.config[name]!r}" for name in wrong)
        raise ValueError(f"the checkpoint needs UNet({need}); the model has {have}")


def _rename(key: str, depth: int) -> str:
    if match := _KEY.fullmatch(key):
        layer = f"{_LAYERS[match['layer']]}.{match['rest']}"
        if match["inc"]:
            return f"encoder.0.{layer}"
        if match["up"]:
            return f"decoder.{int(match['up']) - 1}.conv.{layer}"
        level = int(match["down"])
        return f"bottleneck.{layer}" if level == depth else f"encoder.{level}.{layer}"
    if match := _UP_KEY.fullmatch(key):
        return f"decoder.{int(match[1]) - 1}.up.{match[2]}"
    if match := _HEAD_KEY.fullmatch(key):
        return f"head.{match[1]}"
    raise ValueError(f"the checkpoint has a key that is not of the milesial layout: {key}")
