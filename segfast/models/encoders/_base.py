"""The interface of an encoder to a decoder, output strides, and reading other code bases' checkpoints."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._base import check_counts, tensors

OUTPUT_STRIDES = (8, 16, 32)


class Encoder(nn.Module):
    """A classification network without its head: image `[N, in_channels, H, W]` -> list of features.

    The features come finest first; `channels[i]` and `reductions[i]` are the channels of the i-th and how
    many pixels of the image one of its pixels stands for. Convolutions of stride 2 are padded, so a side n
    becomes ceil(n / 2), and images of any size will do.
    """

    channels: tuple[int, ...]
    reductions: tuple[int, ...]

    def __init__(self, in_channels: int, width_mult: float) -> None:
        super().__init__()
        check_counts(in_channels=in_channels)
        if not width_mult > 0:
            raise ValueError(f"width_mult must be positive, got {width_mult}")
        self.in_channels = in_channels

    def forward(self, input: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def rename(self, key: str) -> str | None:
        """The own key for a key of a published checkpoint; None for what the encoder has no use for.

        A key of no layout that the encoder knows comes back unchanged.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Gaussian weights of variance 2 / (outputs that an input reaches) (He et al. 2015, section 2.2)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def remap_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """See `segfast.models.remap_state_dict`.

        Reads the encoder's own keys and those of the published classifiers. A classifier's head is dropped,
        and of a network with an `encoder.` only that is read. Where a checkpoint is older than the counters
        `num_batches_tracked`, the encoder's are kept.
        """
        state = tensors(state_dict)
        if any(key.startswith("encoder.") for key in state):
            state = {
                key.removeprefix("encoder."): v for key, v in state.items() if key.startswith("encoder.")
            }
        return rename_keys(state, self.rename, self.state_dict(), type(self).__name__)


def rename_keys(
    state: Mapping[str, Tensor], rename: Callable[[str], str | None], own: Mapping[str, Tensor], model: str
) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names that `rename` gives its keys, which are those of `own`.

    Keys without a name are dropped; counters `num_batches_tracked` that it lacks are `own`'s.

    Raises:
        ValueError: a key that the `model` does not know, none for one of its own, or another shape.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = rename(key)
        if name is None:
            continue
        if name not in own or name in renamed:
            raise ValueError(f"the checkpoint has a key that {model} does not know: {key}")
        renamed[name] = value
    for name, value in own.items():
        if name not in renamed:
            if not name.endswith(".num_batches_tracked"):
                raise ValueError(f"the checkpoint has nothing for {name}")
            renamed[name] = value
        if renamed[name].shape != value.shape:
            raise ValueError(
                f"{name}: the checkpoint has {list(renamed[name].shape)}, the model {list(value.shape)}"
            )
    return renamed


def strides_and_dilations(
    strides: Sequence[int], output_stride: int, stem: int = 2
) -> list[tuple[int, int, int]]:
    """Stride, dilation and accumulated stride of each block, none of the last above `output_stride`.

    A stride that would go beyond is 1 instead, and what comes after that block is dilated by as much (Chen et
    al. 2017, "Rethinking Atrous Convolution for Semantic Image Segmentation", section 3.1): the samples stay
    those of the strided network. `stem` is the stride before the first block.

    Raises:
        ValueError: an output stride other than 8, 16 and 32.

    >>> strides_and_dilations([2, 2, 2, 1, 2, 1], output_stride=16)
    [(2, 1, 4), (2, 1, 8), (2, 1, 16), (1, 1, 16), (1, 1, 16), (1, 2, 16)]
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"output_stride must be one of {OUTPUT_STRIDES}, got {output_stride!r}")
    plan, reached, dilation = [], stem, 1
    for stride in strides:
        if reached * stride > output_stride:
            plan.append((1, dilation, reached))
            dilation *= stride
        else:
            reached *= stride
            plan.append((stride, dilation, reached))
    return plan


def scaled(channels: int, width_mult: float) -> int:
    """`channels * width_mult` to the nearest multiple of 8, up where that would lose more than a tenth.

    >>> scaled(32, 0.5), scaled(24, 0.35)
    (16, 8)
    """
    exact = channels * width_mult
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded
