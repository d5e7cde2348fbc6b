"""DeepLabV3+.

Chen, Zhu, Papandreou, Schroff, Adam, "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation", ECCV 2018.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.nn import SeparableConv2d
from segfast.nn._fused.aspp import FusedASPP
from segfast.nn._fused.conv import FusedConv
from segfast.nn._fused.eager import only_forward, worth_fusing
from segfast.nn._fused.folding import PooledBatchNorm2d, Remembers
from segfast.nn._fused.layers import FusedLayer, fused_layer
from segfast.nn._fused.separable import FusedSeparable

from ._base import SegmentationModel, check_counts, tensors, unlike
from ._layers import conv_norm_activation, resize
from .encoders import Encoder, MobileNetV2Encoder, ResNetEncoder, Xception65Encoder

OUTPUT_STRIDES = (8, 16)
# Of the convolutions in the pyramid, in pixels of its input, at output stride 16; twice that at 8.
RATES = (6, 12, 18)
LOW_LEVEL_CHANNELS = 48


def _conv3x3(in_channels: int, out_channels: int, dilation: int, separable: bool) -> nn.Module:
    """3x3 convolution, norm, ReLU; `separable`: norm and ReLU after the depthwise one as well."""
    if not separable:
        return conv_norm_activation(in_channels, out_channels, 3, dilation=dilation)
    return SeparableConv2d(
        in_channels,
        out_channels,
        3,
        padding=dilation,
        dilation=dilation,
        norm_layer=nn.BatchNorm2d,
        depthwise_activation="relu",
        activation="relu",
    )


class ASPP(Remembers):
    """Atrous spatial pyramid pooling with image-level features (Chen et al. 2017, section 3.3).

    A 1x1 convolution, a 3x3 one at each of the dilations `rates` and one of the mean over the image, side by
    side, then a 1x1 convolution over them all. `[N, in_channels, H, W]` -> `[N, out_channels, H, W]`.
    `segfast.nn.ASPP` under other names, with a norm and ReLU between the halves of separable branches.
    """

    def __init__(
        self, in_channels: int, out_channels: int, rates: Sequence[int], *, separable: bool, dropout: float
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_norm_activation(in_channels, out_channels)])
        self.branches.extend(_conv3x3(in_channels, out_channels, rate, separable) for rate in rates)
        self.pool = conv_norm_activation(in_channels, out_channels, norm_layer=PooledBatchNorm2d)
        self.project = conv_norm_activation((len(rates) + 2) * out_channels, out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        aspp = self._aspp() if not self.training and worth_fusing(input) else None
        if aspp is not None and aspp.is_eligible(input):
            return self.dropout(aspp.run(self, input))
        features = [branch(input) for branch in self.branches]
        pooled = self.pool(F.adaptive_avg_pool2d(input, 1))
        # In the others' memory format, which `cat` would lose if one of them had another. Enlarged first:
        # torch's exporter to ONNX forgets that a copy broadcasts.
        features.append(torch.empty_like(features[0]).copy_(pooled.expand_as(features[0])))
        return self.dropout(self.project(torch.cat(features, 1)))

    def _aspp(self) -> FusedASPP | None:
        """The layers as few operators compute them in eval; None under hooks."""
        if not all([only_forward(part) for part in (*self.branches, self.pool, self.project)]):
            return None
        branches = [_fused_layer(branch) for branch in self.branches]
        pool, project = fused_layer(list(self.pool)), fused_layer(list(self.project))
        known = [fused for fused in branches if fused is not None]
        if len(known) < len(branches) or not (isinstance(pool, FusedConv) and isinstance(project, FusedConv)):
            return None
        return FusedASPP(tuple(known), pool, project, ())


def _fused_layer(branch: Any) -> FusedLayer | None:
    """The branch as one operator."""
    if not isinstance(branch, SeparableConv2d):
        return fused_layer(list(branch))
    return FusedSeparable(
        branch.conv_dw,
        branch.bn_dw,
        branch.depthwise_activation,
        branch.conv_pw,
        branch.bn_pw,
        branch.activation,
    )


class DeepLabV3Plus(SegmentationModel):
    """DeepLabV3+ on an encoder; see `deeplabv3plus_mobilenet_v2` and the other functions of such names.

    Encoder -> `ASPP` -> enlarged to the encoder's features of stride 4, which a 1x1 convolution brings to 48
    channels -> both through two 3x3 convolutions -> 1x1 convolution -> enlarged to the input. Everything is
    enlarged bilinearly with `align_corners=False`. Images may have any size; the output has the same.

    For training with batch norm, an image's features need more than one pixel or a batch more than one image.
    The norm of the image-level features sees one pixel of each image: at batch 1 it uses its running
    statistics (`segfast.nn.ASPP` does the same).

    Args:
        name: under which `segfast.models.create` knows the network.
        config: the arguments it was made with there.
        encoder: with features of stride 4 in second place.
        num_classes: channels of the output.
        separable: depthwise-separable 3x3 convolutions, else dense ones.
        decoder_channels: of the pyramid and the decoder.
        dropout: probability, after the pyramid.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        encoder: Encoder,
        num_classes: int,
        *,
        separable: bool,
        decoder_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        output_stride = encoder.reductions[-1]
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride must be one of {OUTPUT_STRIDES}, got {output_stride}")
        check_counts(num_classes=num_classes, decoder_channels=decoder_channels)
        self.name = name
        self.config = dict(config)
        self.num_classes = num_classes
        self.in_channels = encoder.in_channels
        self.encoder = encoder
        rates = [rate * 16 // output_stride for rate in RATES]
        self.aspp = ASPP(encoder.channels[-1], decoder_channels, rates, separable=separable, dropout=dropout)
        self.low_level = conv_norm_activation(encoder.channels[1], LOW_LEVEL_CHANNELS)
        self.decoder = nn.Sequential(
            _conv3x3(decoder_channels + LOW_LEVEL_CHANNELS, decoder_channels, 1, separable),
            _conv3x3(decoder_channels, decoder_channels, 1, separable),
        )
        self.head = nn.Conv2d(decoder_channels, num_classes, 1)

    def forward(self, input: Tensor, *, upsample: bool = True) -> Tensor:
        """Class scores `[N, num_classes, H, W]` of images `[N, in_channels, H, W]`.

        With `upsample=False` they are left at a quarter of the input's size, rounded up, for
        `segfast.nn.UpsampleCrossEntropyLoss` and `UpsampleArgmax` with the input's `size`: the scores of the
        full size then never exist.

        Raises:
            ValueError: an input that is not 4-D or has no pixel.
        """
        self._check_input(input)
        features = self.encoder(input)
        low = self.low_level(features[1])
        high = resize(self.aspp(features[-1]), low.shape[2:])
        scores = self.head(self.decoder(torch.cat([high, low], 1)))
        return resize(scores, input.shape[2:]) if upsample else scores

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`.

        Reads checkpoints of this network and of its encoder alone, the published classifiers among them; with
        those the decoder keeps the weights it has.

        Raises:
            ValueError: a checkpoint of neither.
        """
        own, state = self.state_dict(), tensors(state_dict)
        if state.keys() == own.keys():
            return state
        in_encoder = [key.startswith("encoder.") for key in state]
        if any(in_encoder) and not all(in_encoder):
            raise ValueError(
                f"the checkpoint is of another network with an encoder: {unlike(state, own)}; "
                "to read that encoder alone, remap and load into `model.encoder`"
            )
        encoder = self.encoder.remap_state_dict(state)
        return own | {f"encoder.{key}": value for key, value in encoder.items()}


def _build(name: str, config: dict[str, Any], encoder: Encoder) -> DeepLabV3Plus:
    """The network of the arguments that the function of that name was called with."""
    decoder = {option: config[option] for option in ("separable", "decoder_channels", "dropout")}
    return DeepLabV3Plus(name, config, encoder, config["num_classes"], **decoder)


def deeplabv3plus_mobilenet_v2(
    num_classes: int = 21,
    output_stride: int = 16,
    in_channels: int = 3,
    *,
    width_mult: float = 1.0,
    separable: bool = True,
    decoder_channels: int = 256,
    dropout: float = 0.1,
) -> DeepLabV3Plus:
    """DeepLabV3+ on MobileNetV2: 2.7 million parameters, 5.8 million with `separable=False`.

    Shapes: `[N, in_channels, H, W]` -> `[N, num_classes, H, W]` (see `DeepLabV3Plus.forward`).

    Args:
        num_classes: channels of the output.
        output_stride: pixels of the image to one of the encoder's last features: 16, or 8 (finer, slower).
        in_channels: of the image.
        width_mult: factor on the encoder's channels (`segfast.models.encoders.MobileNetV2Encoder`).
        separable: depthwise-separable 3x3 convolutions in pyramid and decoder, else dense ones.
        decoder_channels: of pyramid and decoder.
        dropout: probability, after the pyramid.

    Raises:
        ValueError: an option out of range.

    >>> import torch
    >>> model = deeplabv3plus_mobilenet_v2(width_mult=0.25, decoder_channels=16).eval()
    >>> model(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    >>> model(torch.zeros(1, 3, 65, 50), upsample=False).shape
    torch.Size([1, 21, 17, 13])
    """
    config = dict(locals())
    return _build(
        "deeplabv3plus_mobilenet_v2", config, MobileNetV2Encoder(in_channels, output_stride, width_mult)
    )


def deeplabv3plus_xception65(
    num_classes: int = 21,
    output_stride: int = 16,
    in_channels: int = 3,
    *,
    width_mult: float = 1.0,
    middle_blocks: int = 16,
    separable: bool = True,
    decoder_channels: int = 256,
    dropout: float = 0.1,
) -> DeepLabV3Plus:
    """DeepLabV3+ on Aligned Xception-65: 41.1 million parameters, 54.7 million with `separable=False`.

    Shapes, the other arguments and what is raised are as for `deeplabv3plus_mobilenet_v2`.

    Args:
        middle_blocks: of the encoder's middle flow; 8 make it Xception-41.

    >>> import torch
    >>> model = deeplabv3plus_xception65(width_mult=0.125, middle_blocks=1, decoder_channels=16).eval()
    >>> model(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    """
    config = dict(locals())
    return _build(
        "deeplabv3plus_xception65",
        config,
        Xception65Encoder(in_channels, output_stride, width_mult, middle_blocks),
    )


def deeplabv3plus_resnet50(
    num_classes: int = 21,
    output_stride: int = 16,
    in_channels: int = 3,
    *,
    width_mult: float = 1.0,
    separable: bool = True,
    decoder_channels: int = 256,
    dropout: float = 0.1,
) -> DeepLabV3Plus:
    """DeepLabV3+ on ResNet-50: 26.7 million parameters, 40.4 million with `separable=False`.

    Shapes, arguments and what is raised are as for `deeplabv3plus_mobilenet_v2`.

    >>> import torch
    >>> model = deeplabv3plus_resnet50(width_mult=0.125, decoder_channels=16).eval()
    >>> model(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    """
    config = dict(locals())
    encoder = ResNetEncoder(in_channels, output_stride, width_mult, 50)
    return _build("deeplabv3plus_resnet50", config, encoder)


def deeplabv3plus_resnet101(
    num_classes: int = 21,
    output_stride: int = 16,
    in_channels: int = 3,
    *,
    width_mult: float = 1.0,
    separable: bool = True,
    decoder_channels: int = 256,
    dropout: float = 0.1,
) -> DeepLabV3Plus:
    """DeepLabV3+ on ResNet-101: 45.7 million parameters, 59.3 million with `separable=False`.

    Shapes, arguments and what is raised are as for `deeplabv3plus_mobilenet_v2`.

    >>> import torch
    >>> model = deeplabv3plus_resnet101(width_mult=0.125, decoder_channels=16).eval()
    >>> model(torch.zeros(1, 3, 65, 50)).shape
    torch.Size([1, 21, 65, 50])
    """
    config = dict(locals())
    encoder = ResNetEncoder(in_channels, output_stride, width_mult, 101)
    return _build("deeplabv3plus_resnet101", config, encoder)
