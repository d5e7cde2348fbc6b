"""What the training loop, the checkpoints and the commands ask of a network."""

from typing import Any

from torch import nn


class SegmentationModel(nn.Module):
    """A network `[N, in_channels, H, W]` -> `[N, num_classes, H', W']`.

    `config` holds the constructor's arguments by name; `segfast.models.create` rebuilds the network from it.
    """

    in_channels: int
    num_classes: int
    config: dict[str, Any]
