"""LR-ASPP on MobileNetV3, as torchvision builds it.

Howard et al., "Searching for MobileNetV3", ICCV 2019, section 6.4; the network is torchvision's
`lraspp_mobilenet_v3_large`.
"""

from torch import Tensor, nn

from segfast.nn import Conv2d

from ._layers import conv_norm_activation, resize
from ._torchvision_segmentation import TorchvisionSegmentation, check_options, refuse_weights
from .encoders import MobileNetV3LargeEncoder
from .encoders._base import scaled


class LRASPPHead(nn.Module):
    """Scores of coarse features, whose channels the whole image weights, and of finer ones, summed."""

    def __init__(self, low_channels: int, high_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.cbr = conv_norm_activation(high_channels, channels)
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), Conv2d(high_channels, channels, 1, bias=False), nn.Sigmoid()
        )
        self.low_classifier = Conv2d(low_channels, num_classes, 1)
        self.high_classifier = Conv2d(channels, num_classes, 1)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        x = self.cbr(high) * self.scale(high)
        # A 1x1 convolution commutes with bilinear enlargement; before it, it costs a quarter.
        return self.low_classifier(low) + resize(self.high_classifier(x), low.shape[2:])


class LRASPP(TorchvisionSegmentation):
    """LR-ASPP; see `lraspp_mobilenet_v3_large`."""

    def coarse_scores(self, features: list[Tensor]) -> dict[str, Tensor]:
        """The scores at stride 8, before they are enlarged to the image."""
        *_, low, _, high = features
        return {"out": self.classifier(low, high)}


def lraspp_mobilenet_v3_large(
    *,
    weights: None = None,
    weights_backbone: None = None,
    num_classes: int = 21,
    in_channels: int = 3,
    width_mult: float = 1.0,
) -> LRASPP:
    """torchvision's `lraspp_mobilenet_v3_large`: 3.2 million parameters.

    Shapes: `[N, in_channels, H, W]` -> `{"out": [N, num_classes, H, W]}`. torchvision's weights load by
    `load_state_dict`.

    Args:
        weights, weights_backbone: None; nothing is downloaded.
        num_classes: channels of the output.
        in_channels: of the image.
        width_mult: factor on the channels (`segfast.models.encoders.MobileNetV3LargeEncoder`).

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> lraspp_mobilenet_v3_large(width_mult=0.25).eval()(torch.zeros(1, 3, 65, 50))["out"].shape
    torch.Size([1, 21, 65, 50])
    """
    config = dict(locals())
    refuse_weights(config.pop("weights"), config.pop("weights_backbone"))
    check_options(num_classes, 16)
    backbone = MobileNetV3LargeEncoder(in_channels, 16, width_mult)
    *_, low, _, high = backbone.channels
    classifier = LRASPPHead(low, high, scaled(128, width_mult), num_classes)
    return LRASPP("lraspp_mobilenet_v3_large", config, backbone, classifier, None, num_classes)
