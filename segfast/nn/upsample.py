"""Upsampling without learned transposed kernels: FCN's fixed bilinear one, and upsample-then-convolve."""

import torch
from torch import Tensor

from ..ops.conv_transpose2d.bilinear import Factors, upsample_separable
from ._scripting import Unscriptable
from .init import bilinear_kernel


class BilinearUpsample(Unscriptable, torch.nn.Module):
    """The transposed convolution with fixed bilinear weights (FCN's `learnable=False`), one axis at a time.

    The same result as `ConvTranspose2d(channels, channels, kernel_size, stride, padding, output_padding)`
    with weights from `segfast.nn.init.bilinear_`, for any number of channels, and with nothing to learn or to
    save.

    Args:
        stride: the upsampling factor.
        kernel_size: side of the kernel; 2 * stride - stride % 2 by default, as FCN has it.
        padding, output_padding: as in `torch.nn.ConvTranspose2d`.

    Shapes: [N, C, H, W] to [N, C, H_out, W_out], H_out = (H - 1) stride - 2 padding + kernel_size +
    output_padding.

    Raises:
        ValueError: a stride or kernel size below 1, negative padding, output_padding not below the stride.
        RuntimeError: an input of whole numbers, or too small a result.

    Source: Long, Shelhamer and Darrell (2015), section 3.3.

    Example:
        >>> import torch
        >>> BilinearUpsample(32)(torch.ones(1, 21, 4, 4)).shape
        torch.Size([1, 21, 160, 160])
    """

    kernel: Tensor

    def __init__(
        self, stride: int, kernel_size: int | None = None, padding: int = 0, output_padding: int = 0
    ):
        super().__init__()
        if kernel_size is None:
            kernel_size = 2 * stride - stride % 2
        if stride < 1 or kernel_size < 1 or padding < 0 or not 0 <= output_padding < stride:
            raise ValueError(
                "stride and kernel_size must be at least 1, padding at least 0, output_padding at least 0 "
                f"and below stride, got {stride}, {kernel_size}, {padding}, {output_padding}"
            )
        self.stride, self.kernel_size, self.padding, self.output_padding = (
            stride,
            kernel_size,
            padding,
            output_padding,
        )
        # Not in the state_dict: it follows from the arguments.
        self.register_buffer("kernel", bilinear_kernel(kernel_size)[None], persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point() and not input.is_complex():
            raise RuntimeError(f"input must be of a floating or complex dtype, got {input.dtype}")
        factors = Factors(self.kernel, self.kernel)
        return upsample_separable(input, factors, self.stride, self.padding, self.output_padding, None)

    def extra_repr(self) -> str:
        return (
            f"stride={self.stride}, kernel_size={self.kernel_size}, padding={self.padding}, "
            f"output_padding={self.output_padding}"
        )


class UpsampleConv2d(Unscriptable, torch.nn.Module):
    """Upsample (nearest or bilinear), then convolve: the learnable upsampling that leaves no checkerboard.

    The convolution pads by `kernel_size // 2`, so that an odd kernel gives exactly `scale_factor` times the
    input.

    Args:
        in_channels, out_channels, kernel_size, bias: the convolution's.
        scale_factor: of the upsampling.
        mode: "nearest" or "bilinear" (align_corners=False).

    Shapes: [N, C_in, H, W] to [N, C_out, H * scale_factor, W * scale_factor].

    Raises:
        ValueError: another mode, or an even kernel size.

    Source: Odena, Dumoulin and Olah, "Deconvolution and Checkerboard Artifacts" (2016).

    Example:
        >>> import torch
        >>> UpsampleConv2d(8, 4)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 4, 10, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        scale_factor: int = 2,
        mode: str = "nearest",
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if mode not in ("nearest", "bilinear"):
            raise ValueError(f"mode must be 'nearest' or 'bilinear', got {mode!r}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.scale_factor, self.mode = scale_factor, mode
        self.conv = torch.nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        align_corners = None if self.mode == "nearest" else False
        up = torch.nn.functional.interpolate(
            input, scale_factor=self.scale_factor, mode=self.mode, align_corners=align_corners
        )
        return self.conv(up)

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}, mode={self.mode}"
