"""FCN on VGG16, AlexNet and GoogLeNet.

Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015. VGG16 is from
Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from segfast.functional import conv_transpose2d
from segfast.nn import Conv2d, ConvTranspose2d
from segfast.nn.init import bilinear_

from ._base import SegmentationModel, check_counts, tensors
from ._classifiers import CLASSIFIERS, Stage, pooled, pooled_length, rescaled, torchvision_names

STRIDES = (8, 16, 32)
# Of the first convolution: what the unpadded fc6 takes away again, and so any image is large enough.
PAPER_PADDING = 100


class Step(NamedTuple):
    """An enlarging layer: its name, stride and kernel, and what meets its result.

    That is the scores of the stage of that number, or the image (None). Pixel 0 of it lies on pixel `offset`
    of the enlarged scores, which are cut by that much; below 0 it is the skip that is cut.
    """

    name: str
    stage: int | None
    factor: int
    kernel: int
    offset: int


def enlarging_steps(reached: Sequence[tuple[int, float]], scores_at: float, stride: int) -> list[Step]:
    """The enlarging layers, coarse to fine.

    Args:
        reached: of each stage's features, the pixels of the image to one of them, and where in the image
            the middle of the first stands.
        scores_at: where the first of the coarse scores stands, at stride 32.
        stride: of the finest scores.

    A kernel is twice the layer's stride, or one less where only that puts pixels upon pixels.
    """
    steps: list[Step] = []
    strides = [step for step, _ in reached]
    for fine in (16, 8, 1):
        if 1 < fine < stride:
            continue
        stage = None if fine == 1 else strides.index(fine)
        meets = 0.0 if stage is None else reached[stage][1]
        factor = stride if stage is None else 2
        for kernel in (2 * factor, 2 * factor - 1):
            first = scores_at - fine * (kernel - 1) / 2
            offset = (meets - first) / fine
            if offset == round(offset):
                break
        if stage is None:
            name = "upscore" if stride == 32 else f"upscore{stride}"
        else:
            name = f"upscore_pool{steps[-1].stage}" if steps else "upscore2"
        steps.append(Step(name, None if stage is None else stage + 1, factor, kernel, round(offset)))
        scores_at = max(first, meets)
    return steps


def _check_options(
    backbone: str, stride: int, padded: bool | None, transform_input: bool, in_channels: int
) -> None:
    if backbone not in CLASSIFIERS:
        raise ValueError(f"backbone must be one of {tuple(CLASSIFIERS)}, got {backbone!r}")
    if stride not in STRIDES:
        raise ValueError(f"stride must be one of {STRIDES}, got {stride!r}")
    if padded and CLASSIFIERS[backbone].fc6 is None:
        raise ValueError(f"padded is for a backbone with an fc6, got padded=True and {backbone!r}")
    if transform_input and (backbone, in_channels) != ("googlenet", 3):
        raise ValueError(
            f"transform_input is for 'googlenet' with 3 input channels, got {backbone!r} with {in_channels}"
        )


class FCN(SegmentationModel):
    """A classifier turned into a network of scores, enlarged by learnable transposed convolutions.

    VGG16's and AlexNet's fc6 and fc7 are convolutions, of 7x7 or 6x6 and of 1x1; GoogLeNet has none, and its
    average pooling is left out, as in the paper, as are its auxiliary heads. The scores at stride 32 are
    enlarged twofold and added to scores of the features at stride 16 (VGG16's pool4), and those again to
    scores of the features at stride 8 (pool3), then enlarged to the image. VGG16's layers bear the names of
    the paper's own networks.

    The enlarging layers begin as bilinear interpolation, all others that make scores as zero: load a
    classifier (`segfast.models.remap_state_dict`) before training. The paper's loss is the cross-entropy of
    every pixel, its optimizer SGD with momentum 0.9.

    Args:
        num_classes: channels of the output.
        in_channels: of the image.
        backbone: "vgg16", "alexnet" or "googlenet".
        stride: of the finest scores: 32, 16 or 8.
        padded: the paper's padding of 100 pixels around the image, which makes up for fc6 having none; or
            else every convolution keeps the size, and half the pixels are computed at 500x500. None is the
            padding, but for GoogLeNet, which has no fc6.
        width: channels of the first stage; 64 is the published classifier.
        dropout: probability, after fc6 and fc7, or before GoogLeNet's scores.
        transform_input: of GoogLeNet: rescale images that were normalized as torchvision's are, as the
            weights that torchvision publishes need it.

    Shapes: `[N, in_channels, H, W]` -> `[N, num_classes, H, W]`, for any H and W; without the padding at
    least 35 on AlexNet and 15 on GoogLeNet.

    Raises:
        ValueError: an option out of range; an input that is not 4-D or too small.

    >>> import torch
    >>> FCN(width=2)(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        backbone: str = "vgg16",
        stride: int = 8,
        padded: bool | None = None,
        width: int = 64,
        dropout: float = 0.5,
        transform_input: bool = False,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels, width=width)
        _check_options(backbone, stride, padded, transform_input, in_channels)
        classifier = CLASSIFIERS[backbone]
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "width": width,
            "dropout": dropout,
        }
        if classifier.fc6 is None:
            padded = False
            self.config["transform_input"] = transform_input
        else:
            padded = padded is None or padded
            self.config["padded"] = padded
        self.name = f"fcn{stride}s" if backbone == "vgg16" else f"fcn{stride}s_{backbone}"
        self.backbone = backbone
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.transform_input = transform_input
        kernel, step, padding = classifier.first
        padding = PAPER_PADDING if padded else padding
        stages = classifier.build(in_channels, width, padding)
        # Names of the layers, and the pooling behind them.
        self.stages = [(list(stage.layers), stage.pool) for stage in stages]
        self.smallest = 1 if padded else _smallest_side(stages, *classifier.first)
        at, reached = (kernel - 1) / 2 - padding, []
        for stage in stages:
            for name, layer in stage.layers.items():
                self.add_module(name, layer)
            if stage.pool is not None:
                at, step = at + step * (stage.pool - 1) / 2, 2 * step
            reached.append((step, at))
        channels = stages[-1].channels
        if classifier.fc6 is not None:
            fc6_padding = 0 if padded else classifier.fc6 // 2
            at += step * ((classifier.fc6 - 1) / 2 - fc6_padding)
            self.fc6 = Conv2d(channels, 64 * width, classifier.fc6, padding=fc6_padding, activation="relu")
            self.fc7 = Conv2d(64 * width, 64 * width, 1, activation="relu")
            channels = 64 * width
        self.dropout = nn.Dropout(dropout)
        self.score_fr = Conv2d(channels, num_classes, 1)
        self.steps = enlarging_steps(reached, at, stride)
        self._add_enlarging([stage.channels for stage in stages])
        self.reset_parameters()

    def _add_enlarging(self, channels: Sequence[int]) -> None:
        """The layers of `self.steps`, for stages of so many channels."""
        for enlarging in self.steps:
            if enlarging.stage is not None:
                features = channels[enlarging.stage - 1]
                self.add_module(f"score_pool{enlarging.stage}", Conv2d(features, self.num_classes, 1))
        for enlarging in self.steps:
            classes, kernel = self.num_classes, enlarging.kernel
            up = ConvTranspose2d(classes, classes, kernel, stride=enlarging.factor, bias=False)
            self.add_module(enlarging.name, up)

    def reset_parameters(self) -> None:
        """Gaussian weights of variance 2 / (outputs that an input reaches); scores 0, enlarging bilinear."""
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.ConvTranspose2d):
                bilinear_(module.weight)
            elif isinstance(module, nn.Conv2d):
                if name.startswith("score"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def heat_map(self, input: Tensor) -> Tensor:
        """The coarse class scores `[N, num_classes, h, w]`, at stride 32, before anything is enlarged.

        Of a 224x224 image they are, without the paper's padding, what the classifier says of it: on VGG16 and
        AlexNet the pixel in the middle of the 7x7, on GoogLeNet the mean of the 7x7.
        """
        return self._scores(self._pools(input)[-1])

    def forward(self, input: Tensor) -> Tensor:
        pools = self._pools(input)
        x = self._scores(pools[-1])
        for name, stage, factor, kernel, offset in self.steps:
            up: Any = getattr(self, name)
            if stage is None:
                # Of AlexNet and GoogLeNet they may end a few pixels before the image does: repeat the last.
                if self.backbone != "vgg16":
                    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
                return _window(up, x, offset, input.shape[2:])
            skip = getattr(self, f"score_pool{stage}")(pools[stage - 1])
            if offset < 0:
                height, width = (factor * (n - 1) + kernel for n in x.shape[2:])
                skip = skip[:, :, -offset : height - offset, -offset : width - offset]
                x = conv_transpose2d(x, up.weight, stride=up.stride, residual=skip)
            else:
                x = _window(up, x, offset, skip.shape[2:]) + skip
        raise AssertionError("the last step has no skip")

    def _pools(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        if self.smallest > 1 and (x.shape[2] < self.smallest or x.shape[3] < self.smallest):
            raise ValueError(
                f"input is {x.shape[2]}x{x.shape[3]}; {self.name} needs at least "
                f"{self.smallest}x{self.smallest} for its poolings"
            )
        if self.transform_input:
            x = rescaled(x)
        pools = []
        for names, pool in self.stages:
            for name in names:
                x = getattr(self, name)(x)
            x = pooled(x, pool)
            pools.append(x)
        return pools

    def _scores(self, x: Tensor) -> Tensor:
        if CLASSIFIERS[self.backbone].fc6 is not None:
            x = self.fc7(self.dropout(self.fc6(x)))
        return self.score_fr(self.dropout(x))

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`.

        Reads checkpoints of this network and of its classifier as torchvision names the layers: linear layers
        become convolutions. The last one is read where it has as many classes as the model, and all scores of
        the model and its enlarging layers keep their weights otherwise. Auxiliary heads are dropped.

        Raises:
            ValueError: a checkpoint of neither, or of other sizes.
        """
        own, state = self.state_dict(), tensors(state_dict)
        if state.keys() == own.keys():
            return state
        classifier = CLASSIFIERS[self.backbone]
        names = torchvision_names([layers for layers, _ in self.stages], classifier)
        renamed = dict(own)
        # The counters of batch norms, `num_batches_tracked`, are not in older checkpoints.
        optional = re.compile(r"score|upscore|.*\.num_batches_tracked$")
        missing = {key for key in own if not optional.match(key)}
        for key, value in state.items():
            if classifier.fc6 is None and key.startswith(("aux1.", "aux2.")):
                continue
            theirs = next((name for name in names if key.startswith(f"{name}.")), None)
            name = "" if theirs is None else names[theirs] + key.removeprefix(theirs)
            if name not in own:
                raise ValueError(
                    f"the checkpoint has a key that is neither {type(self).__name__}'s own nor "
                    f"{classifier.title}'s: {key}"
                )
            if name.startswith("score_fr.") and value.shape[0] != self.num_classes:
                continue
            # A linear layer over what 7x7 pixels hold, channel by channel, is a convolution by 7x7.
            if value.dim() == 2 and value.numel() == own[name].numel():
                value = value.reshape(own[name].shape)
            if value.shape != own[name].shape:
                raise ValueError(
                    f"{name}: the checkpoint has {list(value.shape)}, the model {list(own[name].shape)}"
                )
            renamed[name] = value
            missing.discard(name)
        if missing:
            raise ValueError(f"the checkpoint has nothing for {min(missing)}")
        return renamed


def _smallest_side(stages: Sequence[Stage], kernel: int, stride: int, padding: int) -> int:
    """The least height and width of an image of which every pooling leaves a pixel."""
    side = 1
    while True:
        length = (side + 2 * padding - kernel) // stride + 1
        for stage in stages:
            length = pooled_length(length, stage.pool) if length > 0 else 0
        if length > 0:
            return side
        side += 1


def _window(up: Any, x: Tensor, offset: int, size: Sequence[int]) -> Tensor:
    """`up(x)` from pixel `offset` on, `size` of it."""
    factor, kernel = up.stride[0], up.kernel_size[0]
    # What lies before the offset is padding, and not computed. Pixels of x that reach only there are dropped,
    # which keeps the padding below the kernel's size.
    drop = max(0, -(-(offset - kernel + 1) // factor))
    x = x[:, :, drop:, drop:]
    x = conv_transpose2d(x, up.weight, stride=up.stride, padding=offset - factor * drop)
    # Cut by a negative padding: slices of unknown size would tie an exported program to its example.
    return F.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))


def fcn32s(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padded: bool = True,
    width: int = 64,
    dropout: float = 0.5,
) -> FCN:
    """FCN-32s on VGG16, 136.2 million parameters: the coarse scores enlarged at once (see `FCN`).

    >>> import torch
    >>> fcn32s(width=2, padded=False)(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(num_classes, in_channels, stride=32, padded=padded, width=width, dropout=dropout)


def fcn16s(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padded: bool = True,
    width: int = 64,
    dropout: float = 0.5,
) -> FCN:
    """FCN-16s on VGG16, 134.8 million parameters: with the scores of pool4 (see `FCN`).

    >>> import torch
    >>> fcn16s(width=2, padded=False)(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(num_classes, in_channels, stride=16, padded=padded, width=width, dropout=dropout)


def fcn8s(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padded: bool = True,
    width: int = 64,
    dropout: float = 0.5,
) -> FCN:
    """FCN-8s on VGG16, 134.5 million parameters: with the scores of pool4 and pool3 (see `FCN`).

    >>> import torch
    >>> fcn8s(width=2, padded=False)(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 21, 37, 50])
    """
    return FCN(num_classes, in_channels, stride=8, padded=padded, width=width, dropout=dropout)
