"""Initial weights for upsampling layers."""

import torch
from torch import Tensor


def bilinear_kernel(
    size: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The 1-D kernel [size] of bilinear interpolation, as FCN initializes its upsampling (Long et al. 2015).

    Example:
        >>> bilinear_kernel(4).tolist()
        [0.25, 0.75, 0.75, 0.25]
    """
    factor = (size + 1) // 2
    center = factor - 1 if size % 2 else factor - 0.5
    return 1 - (torch.arange(size, dtype=dtype, device=device) - center).abs() / factor


@torch.no_grad()
def bilinear_(weight: Tensor) -> Tensor:
    """Fill a transposed convolution's weight [C_in, C_out, kH, kW], in place, with bilinear interpolation.

    Zero off the channel diagonal. With groups == channels the weight is [C, 1, kH, kW] and every filter is
    bilinear.

    Raises:
        ValueError: the weight is not 4-D, or neither square in its channels nor one filter a channel.

    Source: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation" (2015).

    Example:
        >>> import torch
        >>> bilinear_(torch.empty(2, 2, 4, 4))[0, 1].abs().max().item()
        0.0
    """
    if weight.dim() != 4 or weight.shape[1] not in (1, weight.shape[0]):
        raise ValueError(
            "weight must be [C, C, kH, kW], or [C, 1, kH, kW] with one filter a channel, "
            f"got {list(weight.shape)}"
        )
    rows, columns = (bilinear_kernel(n, torch.float64, "cpu") for n in weight.shape[2:])
    filters = torch.outer(rows, columns).to(weight)
    weight.zero_()
    each = torch.arange(weight.shape[0], device=weight.device)
    weight[each, each if weight.shape[1] > 1 else 0] = filters
    return weight


@torch.no_grad()
def icnr_(weight: Tensor, stride: int, init=torch.nn.init.kaiming_normal_) -> Tensor:
    """Fill a transposed convolution's weight [C_in, C_out, k, k], in place, without a checkerboard.

    k must be a multiple of the stride.

    Every sub-pixel phase gets the same filter, so that at the start the layer is a nearest-neighbor
    upsampling of a convolution. `init` fills the small weight [C_in, C_out, k/stride, k/stride].

    Raises:
        ValueError: the kernel's sides are not multiples of the stride.

    Source: Aitken et al., "Checkerboard artifact free sub-pixel convolution" (2017).

    Example:
        >>> import torch
        >>> w = icnr_(torch.empty(2, 3, 2, 2), stride=2)
        >>> bool((w == w[:, :, :1, :1]).all())
        True
    """
    if weight.dim() != 4 or stride < 1 or weight.shape[2] % stride or weight.shape[3] % stride:
        raise ValueError(
            f"weight must be [C_in, C_out, kH, kW] with sides that are multiples of stride {stride}, "
            f"got {list(weight.shape)}"
        )
    small = weight.new_empty(*weight.shape[:2], weight.shape[2] // stride, weight.shape[3] // stride)
    init(small)
    weight.copy_(small.repeat_interleave(stride, 2).repeat_interleave(stride, 3))
    return weight
