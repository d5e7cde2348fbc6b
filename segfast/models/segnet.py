"""SegNet: an encoder, and a decoder that enlarges by the encoder's own pooling indices.

Badrinarayanan, Kendall, Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
Segmentation", TPAMI 2017.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from segfast.nn import Conv2d, PackedMaxPool2d, PackedMaxUnpool2d

from ._base import SegmentationModel, check_counts, tensors
from ._layers import conv_norm_activation
from .encoders._base import rename_keys, scaled
from .encoders.vgg16 import STAGES


def _stage(channels: Sequence[int]) -> nn.Sequential:
    """3x3 convolutions with batch norm and ReLU, from each number of channels to the next."""
    pairs = itertools.pairwise(channels)
    return nn.Sequential(*[conv_norm_activation(before, after, 3) for before, after in pairs])


class SegNet(SegmentationModel):
    """SegNet on VGG16 with batch norm; see `segnet_vgg16`.

    The decoder mirrors the encoder, convolution by convolution. Between its stages nothing is interpolated:
    each value comes to where, in the encoder, the largest pixel of its window was, and all else is zero. Of
    each window 2 bits are kept for that.

    Args:
        name: under which `segfast.models.create` knows the network.
        config: the arguments it was made with there.
        num_classes: channels of the output.
        in_channels: of the image.
        width_mult: factor on every layer's channels, rounded to multiples of 8.
    """

    def __init__(
        self, name: str, config: Mapping[str, Any], num_classes: int, in_channels: int, width_mult: float
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        if not width_mult > 0:
            raise ValueError(f"width_mult must be positive, got {width_mult}")
        self.name = name
        self.config = dict(config)
        self.num_classes = num_classes
        self.in_channels = in_channels
        stages = [(count, scaled(channels, width_mult)) for count, channels in STAGES]
        narrowest = stages[0][1]
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        before = in_channels
        for count, channels in stages:
            # The last convolution of a mirror goes back to the channels before: of the first to the scores.
            above = [before] if len(self.encoder) > 0 else []
            self.encoder.append(_stage([before, *[channels] * count]))
            self.decoder.insert(0, _stage([*[channels] * count, *above]))
            before = channels
        self.classifier = Conv2d(narrowest, num_classes, 3, padding=1)
        self.pool, self.unpool = PackedMaxPool2d(ceil_mode=True), PackedMaxUnpool2d()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # as in the paper

    def forward(self, input: Tensor) -> Tensor:
        """Class scores `[N, num_classes, H, W]` of images `[N, in_channels, H, W]` of any size.

        Odd sides are pooled to halves rounded up, as Caffe's, and enlarged to what they were.

        Raises:
            ValueError: an input that is not 4-D or has no pixel.
        """
        self._check_input(input)
        pooled = []
        for stage in self.encoder:
            features = stage(input)
            input, indices = self.pool(features)
            pooled.append((indices, features.shape[2:]))
        for stage in self.decoder:
            input = stage(self.unpool(input, *pooled.pop()))
        return self.classifier(input)

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`: its own checkpoints, and torchvision's `vgg16_bn`.

        Biases of that, before a batch norm, go into the norm's running mean: the results are the same.

        Raises:
            ValueError: a checkpoint of neither.
        """
        own, state = self.state_dict(), tensors(state_dict)
        if state.keys() == own.keys():
            return state
        names, state = _torchvision_names(), dict(state)
        for convolution, norm in zip([*names][::2], [*names][1::2], strict=True):
            bias, mean = state.pop(f"{convolution}.bias", None), f"{norm}.running_mean"
            if bias is not None and mean in state:
                state[mean] = state[mean] - bias

        def rename(key: str) -> str | None:
            layer, _, kind = key.rpartition(".")
            return None if key.startswith("classifier.") else f"{names.get(layer, layer)}.{kind}"

        encoder = {key: value for key, value in own.items() if key.startswith("encoder.")}
        return own | rename_keys(state, rename, encoder, type(self).__name__)


def _torchvision_names() -> dict[str, str]:
    """Our names for the layers of torchvision's vgg16_bn, convolutions and norms in turns."""
    names: dict[str, str] = {}
    index = 0
    for stage, (count, _) in enumerate(STAGES):
        for layer in range(count):
            names |= {f"features.{index + i}": f"encoder.{stage}.{layer}.{i}" for i in (0, 1)}
            index += 3  # with the ReLU
        index += 1  # the pooling
    return names


def segnet_vgg16(num_classes: int = 21, in_channels: int = 3, *, width_mult: float = 1.0) -> SegNet:
    """SegNet on VGG16 with batch norm: 29.4 million parameters.

    Shapes: `[N, in_channels, H, W]` -> `[N, num_classes, H, W]` (see `SegNet.forward`).

    Args:
        num_classes: channels of the output.
        in_channels: of the image.
        width_mult: factor on every layer's channels, rounded to multiples of 8.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> segnet_vgg16(width_mult=0.125).eval()(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    """
    return SegNet("segnet_vgg16", dict(locals()), **locals())
