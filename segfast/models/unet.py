"""U-Net.

Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfast.functional import conv_transpose2d, up_concat
from segfast.nn import Conv2d, ConvTranspose2d, UpsampleConv2d
from segfast.nn._fused.folding import Remembers
from segfast.nn._fused.layers import run_layers
from segfast.nn._fused.training import call_keeping_less
from segfast.ops.conv2d import prefers_virtual_concat
from segfast.ops.conv_transpose2d.up_concat import geometry, up_convolution

from ._base import SegmentationModel, check_counts
from ._milesial import remap

UNET_ACTIVATIONS = ("relu", "leaky_relu")
NORMS = (None, "batch")
UPS = ("transposed", "upsample")


def _activation(name: str, negative_slope: float) -> nn.Module:
    return nn.ReLU(inplace=True) if name == "relu" else nn.LeakyReLU(negative_slope, inplace=True)


class DoubleConv(Remembers, nn.Sequential):
    """3x3 convolution, norm, activation, twice. `padding=0` makes the output 4 smaller than the input.

    The input may be a list of images, as `segfast.functional.conv2d` takes it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        padding: int = 1,
        activation: str = "relu",
        negative_slope: float = 0.01,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        for index, channels in enumerate((in_channels, out_channels), start=1):
            # Batch norm has a shift of its own.
            conv = Conv2d(channels, out_channels, 3, padding=padding, bias=norm is None)
            self.add_module(f"conv{index}", conv)
            if norm == "batch":
                self.add_module(f"norm{index}", nn.BatchNorm2d(out_channels))
            self.add_module(f"activation{index}", _activation(activation, negative_slope))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        layers = list(self)
        half = len(layers) // 2
        return run_layers(layers[half:], run_layers(layers[:half], input))


class DecoderBlock(nn.Module):
    """2x2 up-convolution, concatenation with the encoder's skip, `DoubleConv`.

    With `up="upsample"` a nearest upsampling and a 3x3 convolution take the up-convolution's place. Where the
    first convolution runs on our kernel it reads both images where they lie; elsewhere the up-convolution
    writes into the concatenation.
    """

    def __init__(self, in_channels: int, out_channels: int, up: str, **conv_options: Any) -> None:
        super().__init__()
        self.up: Any
        if up == "upsample":
            self.up = UpsampleConv2d(in_channels, out_channels)
        else:
            self.up = ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        self.conv = DoubleConv(2 * out_channels, out_channels, **conv_options)

    def forward(self, input: Tensor, skip: Tensor, zero_pad: bool = False) -> Tensor:
        """`zero_pad`: fill with zeros what the up-convolution lacks to the skip's size."""
        if isinstance(self.up, UpsampleConv2d):
            up = self.up(input)
            if _may_be_short(input, skip):
                lack = [have - n for have, n in zip(skip.shape[-2:], up.shape[-2:], strict=True)]
                up = F.pad(up, (0, lack[1], 0, lack[0]), mode="replicate")
            return self.conv([skip, up])
        # The up-convolution's result will be like the skip, with as many channels.
        first: Any = self.conv.conv1
        apart = prefers_virtual_concat([skip, skip], first.weight, padding=first.padding)
        short = zero_pad and _may_be_short(input, skip)
        if not (apart or short):
            return self.conv(up_concat(input, skip, self.up.weight, self.up.bias, stride=2))
        if zero_pad:
            up = conv_transpose2d(input, self.up.weight, self.up.bias, 2)
            if short:
                (height, width), (rows, columns) = up.shape[-2:], skip.shape[-2:]
                up = F.pad(up, (0, columns - width, 0, rows - height))
        else:
            extra, _, size = geometry(input, skip, self.up.weight, (2, 2), (0, 0))
            up = up_convolution(input, self.up.weight, self.up.bias, (2, 2), (0, 0), extra, size)
        return self.conv([skip, up])


def _may_be_short(input: Tensor, skip: Tensor) -> bool:
    """True if twice the input may be smaller than the skip: always, where sizes may be free."""
    if torch.compiler.is_compiling():
        return True  # asked, it would compile anew for every parity
    return any(2 * n != have for n, have in zip(input.shape[-2:], skip.shape[-2:], strict=True))


def _check_options(activation: str, norm: str | None, padded: bool, zero_pad_up: bool, up: str) -> None:
    if activation not in UNET_ACTIVATIONS:
        raise ValueError(f"activation must be one of {UNET_ACTIVATIONS}, got {activation!r}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if zero_pad_up and not padded:
        raise ValueError("zero_pad_up is for the padded network, got zero_pad_up=True and padded=False")
    if up not in UPS:
        raise ValueError(f"up must be one of {UPS}, got {up!r}")
    if up == "upsample" and (zero_pad_up or not padded):
        raise ValueError(
            "up='upsample' is for the padded network without zero_pad_up, "
            f"got padded={padded} and zero_pad_up={zero_pad_up}"
        )


class UNet(SegmentationModel):
    """U-Net for images of any size.

    Padded, the output has the input's height and width, odd or even: an up-convolution whose output is one
    short of its skip is made skip-sized, and an input with a side below `2**depth` is zero-padded to that
    and the output cut back. Unpadded (the paper's: 572x572 -> 388x388), skips are center-cropped and the
    output is `margin` smaller on each side where every pooling halves an even size.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the output: class scores (logits), or real values to regress
            (`segfast.train.Options(loss="l1")`, "l2" or "huber").
        width: channels of the first level; each level down has twice as many.
        depth: number of poolings, at least 1.
        padded: pad the 3x3 convolutions.
        activation: "relu" or "leaky_relu".
        negative_slope: of "leaky_relu".
        norm: None (the paper's) or "batch"; the 3x3 convolutions then have no bias.
        zero_pad_up: of the padded network: the row or column that an up-convolution lacks to its skip, where
            a side is odd, is zero, as in `milesial/Pytorch-UNet`. By default the up-convolution runs on
            there: the row or column holds its bias.
        up: "transposed", the paper's up-convolution, or, of the padded network, "upsample": nearest
            upsampling and a 3x3 convolution (`segfast.nn.UpsampleConv2d`), which leave no checkerboard.

    Shapes: `[N, in_channels, H, W]` -> `[N, num_classes, H', W']`.

    Raises:
        ValueError: an option out of range; an input that is not 4-D, has no pixel or is too small for the
            unpadded network.

    >>> import torch
    >>> UNet(width=4)(torch.zeros(1, 1, 37, 50)).shape
    torch.Size([1, 2, 37, 50])
    >>> UNet(width=4, padded=False)(torch.zeros(1, 1, 572, 572)).shape
    torch.Size([1, 2, 388, 388])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        width: int = 64,
        depth: int = 4,
        padded: bool = True,
        activation: str = "relu",
        negative_slope: float = 0.01,
        norm: str | None = None,
        zero_pad_up: bool = False,
        up: str = "transposed",
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, num_classes=num_classes, width=width, depth=depth)
        _check_options(activation, norm, padded, zero_pad_up, up)
        self.config = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "width": width,
            "depth": depth,
            "padded": padded,
            "activation": activation,
            "negative_slope": negative_slope,
            "norm": norm,
            "zero_pad_up": zero_pad_up,
            "up": up,
        }
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.depth = depth
        self.padded = padded
        options: dict[str, Any] = {
            "padding": 1 if padded else 0,
            "activation": activation,
            "negative_slope": negative_slope,
            "norm": norm,
        }
        channels = [width * 2**level for level in range(depth + 1)]
        inputs = [in_channels, *channels]
        self.encoder = nn.ModuleList(DoubleConv(inputs[i], channels[i], **options) for i in range(depth))
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = DoubleConv(channels[-2], channels[-1], **options)
        self.decoder = nn.ModuleList(
            DecoderBlock(channels[i + 1], channels[i], up, **options) for i in reversed(range(depth))
        )
        self.head = nn.Conv2d(width, num_classes, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gaussian weights of variance 2/N before an activation (the paper, section 3), else 1/N."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                # A 2x2 up-convolution of stride 2 gives each output pixel one tap of each input channel.
                taps = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
                gain = 2 if taps > 1 else 1
                nn.init.normal_(module.weight, std=math.sqrt(gain / (module.in_channels * taps)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, UpsampleConv2d):
                with torch.no_grad():  # no activation follows
                    module.conv.weight /= math.sqrt(2)

    @property
    def size_divisor(self) -> int:
        """Pixels of the input that become one at the bottleneck."""
        return 2**self.depth

    @property
    def margin(self) -> int:
        """Pixels that the unpadded network loses on each side (92 at depth 4)."""
        return 6 * 2**self.depth - 4

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of this size; not positive where there is none."""
        return self._output_length(height), self._output_length(width)

    def bottleneck_pixels(self, height: int, width: int) -> int:
        """Pixels of the smallest map for an input of this size that has an output."""
        pixels = 1
        for length in (height, width):
            for _ in range(self.depth):
                length = (length if self.padded else length - 4) // 2
            pixels *= max(1, length if self.padded else length - 4)
        return pixels

    def _output_length(self, length: int) -> int:
        if self.padded:
            return length
        for _ in range(self.depth):
            length = (length - 4) // 2
        length -= 4
        for _ in range(self.depth):
            length = 2 * length - 4
        return length

    def forward(self, input: Tensor) -> Tensor:
        self._check_input(input)
        height, width = input.shape[-2:]
        self.check_size(height, width)
        if self.padded and (height < self.size_divisor or width < self.size_divisor):
            short = (0, max(0, self.size_divisor - width), 0, max(0, self.size_divisor - height))
            return call_keeping_less(self._forward, F.pad(input, short))[..., :height, :width]
        return call_keeping_less(self._forward, input)

    def _forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for block in self.decoder:
            x = block(x, skips.pop(), self.config["zero_pad_up"])
        return self.head(x)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if an input of this size has no output."""
        if min(self.output_size(height, width)) < 1:
            smallest = next(n for n in range(1, 16 * self.size_divisor) if self._output_length(n) >= 1)
            raise ValueError(
                f"input is {height}x{width}; an unpadded UNet of depth {self.depth} needs "
                f"at least {smallest}x{smallest}"
            )

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`."""
        return remap(state_dict, self)
