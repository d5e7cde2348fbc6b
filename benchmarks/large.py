"""Tensors past 2**31 elements, held to fp64 at both ends; and what the other long checks share with these."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from segfast.functional import (
    conv2d,
    conv_transpose2d,
    depthwise_conv2d,
    separable_conv2d,
    upsample_cross_entropy,
)
from segfast.ops.separable_conv2d.cases import tile_of

Outcome = tuple[str, bool, str]
FORMS = ("fused", "two kernels")  # of separable convolution
_LAUNCHES: dict[str, dict] = {form: {} for form in FORMS}  # each form's launches, kept from call to call


def drawn(device: torch.device, dtype: torch.dtype, *sizes: Sequence[int]) -> list[torch.Tensor]:
    """Random channels_last tensors."""
    return [
        torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for size in sizes
    ]


def in_form(form: str, x: torch.Tensor, outputs: int):
    """Separable convolution to so many channels in one of its forms."""
    from segfast.kernels import override_tile

    return override_tile("separable_conv2d_forward", tile_of(form, x, outputs), _LAUNCHES[form])


def large(device: torch.device, dtype: torch.dtype, height: int, batch: int) -> Iterator[Outcome]:
    """Held to fp64 at both ends: tensors past 2**31 elements with a height of 4100 and a batch of 64."""
    yield from _large_up(device, dtype, height)
    for form in (None, *FORMS):
        yield from _large_depthwise(device, dtype, height, form)
    yield from _large_conv(device, dtype, height)
    yield from _large_head(device, dtype, batch)


def _near(name: str, actual: torch.Tensor, expected: torch.Tensor) -> Outcome:
    error = float((actual.double() - expected).norm() / expected.norm())
    return f"large {name}", error < 1e-2, f"relative error {error:.1e}"


@torch.no_grad()
def _large_up(device: torch.device, dtype: torch.dtype, height: int) -> Iterator[Outcome]:
    """Kernel equals stride: the last rows come from the last input rows."""
    x, weight = drawn(device, dtype, (1, 16, height, 2 * height), (16, 16, 2, 2))
    output = conv_transpose2d(x, weight, None, 2)
    for rows in (slice(0, 8), slice(height - 8, height)):
        expected = F.conv_transpose2d(x[:, :, rows].double(), weight.double(), None, 2)
        part = output[:, :, 2 * rows.start : 2 * rows.stop]
        yield _near(f"conv_transpose2d, rows {rows.start} on", part, expected)


@torch.no_grad()
def _large_depthwise(
    device: torch.device, dtype: torch.dtype, height: int, form: str | None
) -> Iterator[Outcome]:
    """Depthwise alone, or with 1x1 after it in one of its forms: 3x3, whose rows at the edge are whole."""
    channels = 64
    sizes = (1, channels, height, 2 * height), (channels, 1, 3, 3), (channels, channels, 1, 1)
    x, first, second = drawn(device, dtype, *sizes)
    if form is None:
        output = depthwise_conv2d(x, first, None, 1, 1)
    else:
        with in_form(form, x, channels):
            output = separable_conv2d(x, first, second, None, None, 1, 1)
    for start, rows in ((0, slice(0, 8)), (height - 9, slice(height - 8, height))):
        expected = F.conv2d(x[:, :, start : start + 9].double(), first.double(), None, 1, 1, 1, channels)
        expected = expected[:, :, rows.start - start : rows.stop - start]
        if form is not None:
            expected = F.conv2d(expected, second.double())
        name = "depthwise_conv2d" if form is None else f"separable_conv2d, {form}"
        yield _near(f"{name}, rows {rows.start} on", output[:, :, rows], expected)


@torch.no_grad()
def _large_conv(device: torch.device, dtype: torch.dtype, height: int) -> Iterator[Outcome]:
    """3x3, over all pixels at a dilation of 1, over zones at one that reaches past the image."""
    channels = 64
    sizes = (1, channels, height, 2 * height), (channels, channels, 3, 3)
    x, weight = drawn(device, dtype, *sizes)
    for dilation in (1, height):
        output = conv2d(x, weight, None, 1, dilation, dilation)
        for start, rows in ((0, slice(0, 8)), (height - 9, slice(height - 8, height))):
            part = x[:, :, start : start + 9].double()
            # Of the outer taps of a dilation as large as the image only those to the left and right reach it.
            filters = weight.double() if dilation == 1 else weight[:, :, 1:2].double()
            padding = (1, 1) if dilation == 1 else (0, dilation)
            expected = F.conv2d(part, filters, None, 1, padding, dilation)
            expected = expected[:, :, rows.start - start : rows.stop - start]
            name = f"conv2d, dilation {dilation}, rows {rows.start} on"
            yield _near(name, output[:, :, rows], expected)


def _large_head(device: torch.device, dtype: torch.dtype, batch: int) -> Iterator[Outcome]:
    """Logits past 2**31, and their gradient; of each image's loss, which no other image enters."""
    classes, side = (1024, 256) if device.type == "cuda" else (5, 4)
    x = torch.randn(batch, classes, side, side, device=device, dtype=dtype).requires_grad_()
    target = torch.randint(classes, (batch, 2 * side, 2 * side), device=device)
    losses = upsample_cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
    for image in (slice(0, 1), slice(batch - 1, batch)):
        leaf = x.detach()[image].double().requires_grad_()
        full = F.interpolate(leaf, scale_factor=2, mode="bilinear")
        expected = F.cross_entropy(full, target[image], reduction="none")
        (wide,) = torch.autograd.grad(expected, leaf, torch.ones_like(expected))
        yield _near(f"upsample_cross_entropy, image {image.start}", losses.detach()[image], expected.detach())
        yield _near(f"upsample_cross_entropy's gradient, image {image.start}", grad[image], wide)
