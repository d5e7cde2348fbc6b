"""MediaPipe's portrait segmenter, with its published weights.

The network of `selfie_segmentation.tflite` (npm package `@mediapipe/selfie_segmentation`, Apache-2.0): an
encoder of MobileNetV3's blocks (Howard et al., "Searching for MobileNetV3", ICCV 2019), that paper's LR-ASPP
on its coarsest level, and a decoder that weights the channels of each skip by what both sides hold. Batch
norms are folded into the convolutions, as published.
"""

from importlib import resources

import torch.nn.functional as F
from torch import Tensor, nn

from segfast._errors import UserError
from segfast.nn import Conv2d, ConvTranspose2d, DepthwiseConv2d

from ._base import SegmentationModel, check_counts

WEIGHTS = "selfie_segmenter.safetensors"
STEM_CHANNELS = 16
CONTEXT_CHANNELS = 128
# Of each bottleneck: expanded channels, output channels, kernel size, stride, channels of the gate's middle
# (0: no gate), activation.
BOTTLENECKS = (
    (16, 16, 3, 2, 8, "relu"),
    (72, 24, 3, 2, 0, "relu"),
    (88, 24, 3, 1, 0, "relu"),
    (96, 32, 5, 2, 24, "hardswish"),
    (128, 32, 5, 1, 32, "hardswish"),
    (128, 32, 5, 1, 32, "hardswish"),
    (96, 32, 5, 1, 24, "hardswish"),
    (96, 32, 5, 1, 24, "hardswish"),
)


def _pad_for_stride_2(input: Tensor, kernel_size: int) -> Tensor:
    """Zeros around `input` as TensorFlow's "SAME" puts them: the odd one goes to the right and the bottom."""
    height, width = (kernel_size - 2 + length % 2 for length in input.shape[-2:])
    return F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))


class SqueezeExcite(nn.Module):
    """A weight in (0, 1) for each channel of each image, from the channels' means.

    Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018. `[N, C, H, W]` -> `[N, C, 1, 1]`.
    """

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, middle, 1)
        self.expand = nn.Conv2d(middle, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        mean = input.mean((2, 3), keepdim=True)
        return self.expand(self.reduce(mean).relu()).sigmoid()


class Bottleneck(nn.Module):
    """1x1 expansion, depthwise convolution, gate, 1x1 projection; a residual where the shapes allow it."""

    def __init__(
        self,
        in_channels: int,
        expanded: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        gate: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.residual = stride == 1 and in_channels == out_channels
        self.expand = Conv2d(in_channels, expanded, 1, activation=activation)
        padding = kernel_size // 2 if stride == 1 else 0  # of stride 2: `_pad_for_stride_2`
        self.depthwise = DepthwiseConv2d(
            expanded, expanded, kernel_size, stride, padding, activation=activation
        )
        self.gate = SqueezeExcite(expanded, gate) if gate else None
        self.project = nn.Conv2d(expanded, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        x = self.expand(input)
        if self.stride == 2:
            x = _pad_for_stride_2(x, self.kernel_size)
        x = self.depthwise(x)
        if self.gate is not None:
            x = x * self.gate(x)
        x = self.project(x)
        return input + x if self.residual else x


class LRASPP(nn.Module):
    """A 1x1 convolution whose channels the whole image weights (Howard et al., section 6.4)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.features = Conv2d(in_channels, out_channels, 1, activation="relu")
        self.gate = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        gate = self.gate(input.mean((2, 3), keepdim=True)).sigmoid()
        return self.features(input) * gate


class DecoderBlock(nn.Module):
    """Upsample to the skip's size, add the skip with its channels weighted, refine by a depthwise residual.

    `[N, in_channels, H, W]` and a skip `[N, channels, H', W']` -> `[N, channels, H', W']`.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, channels, 1)
        self.gate = SqueezeExcite(channels, channels)
        self.conv = Conv2d(channels, channels, 1, activation="relu")
        self.depthwise = DepthwiseConv2d(channels, channels, 3, padding=1, activation="relu")

    def forward(self, input: Tensor, skip: Tensor) -> Tensor:
        # A 1x1 convolution commutes with bilinear upsampling; before it, it costs a quarter.
        x = F.interpolate(self.reduce(input), size=skip.shape[-2:], mode="bilinear", align_corners=False)
        x = self.conv(x + skip * self.gate(x + skip))
        return x + self.depthwise(x)


class SelfieSegmenter(SegmentationModel):
    """MediaPipe's selfie segmentation: which pixels of a photo show a person.

    The pretrained network wants RGB in [0, 1], the whole photo squeezed to 256x256, one or two people near
    the camera; its one output channel is the logit of "person". Other sizes run; it was not made for them.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the output (logits).
        pretrained: load the published weights, which are for 3 channels and 1 class. They are part of the
            package: nothing is downloaded.

    Shapes: `[N, in_channels, H, W]` -> `[N, num_classes, H, W]`.

    Raises:
        ValueError: no such pretrained weights; an input that is not 4-D or has no pixel.
        UserError: the package safetensors, which reads the weights, is missing.

    >>> import torch
    >>> SelfieSegmenter()(torch.zeros(1, 3, 256, 256)).shape
    torch.Size([1, 1, 256, 256])
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 1, *, pretrained: bool = False) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, num_classes=num_classes)
        if pretrained and (in_channels, num_classes) != (3, 1):
            raise ValueError(
                "the pretrained weights are for in_channels=3 and num_classes=1, "
                f"got {in_channels} and {num_classes}"
            )
        self.config = {"in_channels": in_channels, "num_classes": num_classes}
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.stem = Conv2d(in_channels, STEM_CHANNELS, 3, stride=2, activation="hardswish")
        self.encoder = nn.ModuleList()
        # Each level's finest channels: what the decoder gets as skips.
        channels, skips = STEM_CHANNELS, []
        for expanded, out_channels, kernel_size, stride, gate, activation in BOTTLENECKS:
            if stride == 2:
                skips.append(channels)
            self.encoder.append(
                Bottleneck(channels, expanded, out_channels, kernel_size, stride, gate, activation)
            )
            channels = out_channels
        self.context = LRASPP(channels, CONTEXT_CHANNELS)
        widths = [CONTEXT_CHANNELS, *reversed(skips)]
        self.decoder = nn.ModuleList(map(DecoderBlock, widths[:-1], widths[1:]))
        self.head = ConvTranspose2d(widths[-1], num_classes, kernel_size=2, stride=2)
        if pretrained:
            self.load_state_dict(_pretrained_state())
        else:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian weights of variance 2/N, N the inputs of each output (He et al. 2015); no biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        nn.init.normal_(self.head.weight, std=self.head.in_channels**-0.5)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        height, width = input.shape[-2:]
        x = self.stem(_pad_for_stride_2(input, 3))
        skips = []
        for block in self.encoder:
            if block.stride == 2:
                skips.append(x)
            x = block(x)
        x = self.context(x)
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            x = block(x, skip)
        # Cut off what an odd side has too much; a slice would not be contiguous.
        return F.pad(self.head(x), (0, -(width % 2), 0, -(height % 2)))


def _pretrained_state() -> dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise UserError(
            "pretrained weights need the package safetensors (the extra 'demo' has it)"
        ) from error
    return load(resources.files("segfast").joinpath("data", WEIGHTS).read_bytes())
