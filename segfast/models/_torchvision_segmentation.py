"""Shared by torchvision's networks: an encoder, a head on its last features, one beside it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from segfast.nn import Conv2d
from segfast.nn._fused.folding import Remembers
from segfast.nn._fused.layers import run_layers

from ._base import SegmentationModel, check_counts, tensors, unlike
from ._layers import resize
from .encoders import Encoder

OUTPUT_STRIDES = (8, 16)


class FCNHead(Remembers, nn.Sequential):
    """3x3 convolution to a quarter of the channels, norm, ReLU, dropout, 1x1 convolution to the scores."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__(
            Conv2d(in_channels, in_channels // 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(in_channels // 4),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            Conv2d(in_channels // 4, num_classes, 1),
        )

    def forward(self, input: Tensor) -> Tensor:
        *block, dropout, scores = self
        return scores(dropout(run_layers(block, input)))


class TorchvisionSegmentation(SegmentationModel):
    """A segmentation network of torchvision: `backbone`, `classifier`, `aux_classifier`.

    Parameters bear torchvision's names: its checkpoints load by `load_state_dict`, and with
    `segfast.models.remap_state_dict` also where only one of the two networks has the auxiliary head, and
    those of the classifier that the backbone is from.

    Args:
        name: under which `segfast.models.create` knows the network.
        config: the arguments it was made with there.
        backbone: at output stride 8 or 16.
        classifier: on the backbone's last features.
        aux_classifier: on those at `aux_feature`, or None.
        num_classes: channels of the output.
        aux_feature: a position among the backbone's features.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        backbone: Encoder,
        classifier: nn.Module,
        aux_classifier: nn.Module | None,
        num_classes: int,
        aux_feature: int = -2,
    ) -> None:
        super().__init__()
        self.aux_feature = aux_feature
        self.name = name
        self.config = dict(config)
        self.num_classes = num_classes
        self.in_channels = backbone.in_channels
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier

    def forward(self, input: Tensor, *, upsample: bool = True) -> dict[str, Tensor]:
        """Class scores by name: "out", and "aux" where there is an auxiliary head.

        Of images `[N, in_channels, H, W]` they are `[N, num_classes, H, W]`. With `upsample=False` they are
        left at the features' size, for `segfast.nn.UpsampleCrossEntropyLoss` and `UpsampleArgmax`.

        Raises:
            ValueError: an input that is not 4-D or has no pixel.
        """
        self._check_input(input)
        scores = self.coarse_scores(self.backbone(input))
        if not upsample:
            return scores
        return {key: resize(value, input.shape[2:]) for key, value in scores.items()}

    def coarse_scores(self, features: list[Tensor]) -> dict[str, Tensor]:
        """The scores by name, before they are enlarged to the image."""
        scores = {"out": self.classifier(features[-1])}
        if self.aux_classifier is not None:
            scores["aux"] = self.aux_classifier(features[self.aux_feature])
        return scores

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`.

        Reads checkpoints of this network, with or without an auxiliary head, and the classifier's that the
        backbone is from. What those do not have keeps the weights that the model has.

        Raises:
            ValueError: a checkpoint of neither.
        """
        own, state = self.state_dict(), tensors(state_dict)
        if any(key.startswith("backbone.") for key in state):
            state = {
                key: value
                for key, value in state.items()
                if key in own or not key.startswith("aux_classifier.")
            }
            aux = {key: value for key, value in own.items() if key.startswith("aux_classifier.")}
            state = aux | state
            if state.keys() != own.keys():
                raise ValueError(f"the checkpoint is of another network: {unlike(state, own)}")
            return state
        backbone = self.backbone.remap_state_dict(state)
        return own | {f"backbone.{key}": value for key, value in backbone.items()}


def refuse_weights(*weights: object) -> None:
    """Raise ValueError for anything but None: torchvision's arguments name what it downloads."""
    if any(w is not None for w in weights):
        raise ValueError(
            "weights and weights_backbone must be None, for nothing is downloaded: call load_state_dict with "
            f"the state_dict of torchvision's model; got {[w for w in weights if w is not None]}"
        )


def check_options(num_classes: int, output_stride: int) -> None:
    """Raise ValueError for options out of range."""
    check_counts(num_classes=num_classes)
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride must be one of {OUTPUT_STRIDES}, got {output_stride!r}")
