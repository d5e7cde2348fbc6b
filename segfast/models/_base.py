"""What the training loop, the checkpoints and the commands ask of a network."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class SegmentationModel(nn.Module):
    """A network `[N, in_channels, H, W]` -> `[N, num_classes, H', W']`.

    Those that torchvision has too return its dictionary: such scores under "out", and under "aux" those of an
    auxiliary head. `segfast.train` reads both forms.

    `config` holds by name the arguments of the constructor, or of the function in `segfast.models` that made
    it; `segfast.models.create` rebuilds the network from them.
    """

    in_channels: int
    num_classes: int
    config: dict[str, Any]


def tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without the `module.` that DataParallel puts in front of their keys."""
    return {
        key.removeprefix("module."): value for key, value in state_dict.items() if isinstance(value, Tensor)
    }


def main_scores(output: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The scores of a network's output, of either form (see `SegmentationModel`)."""
    return output if isinstance(output, Tensor) else output["out"]
