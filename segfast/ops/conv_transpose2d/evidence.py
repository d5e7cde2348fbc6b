"""The cases that prove the transposed-convolution kernels right on a GPU."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from .._epilogue import apply_epilogue
from .._operands import load_kernels, pair
from .._prove import Evidence
from .functional import OPERATIONS, conv_transpose2d
from .operators import GRAD_INPUT, GRAD_WEIGHT
from .up_concat import up_concat

# (batch, C_in, C_out, height, width, kernel, stride, padding, output_padding, groups, dilation): odd sizes
# that leave no tile full, and each of the forward kernels' forms.
_PROOFS = {
    "k2s2": (2, 40, 24, 13, 11, 2, 2, 0, 0, 1, 1),
    "k2s2 output_padding": (1, 72, 136, 9, 7, 2, 2, 0, 1, 1, 1),
    "k4s2p1": (2, 64, 128, 9, 17, 4, 2, 1, 0, 1, 1),
    "k16s8 21 classes": (1, 21, 21, 7, 5, 16, 8, 4, 0, 1, 1),
    "k3s2 groups dilation": (2, 24, 48, 8, 9, 3, 2, 1, 1, 3, 2),
}


def proofs(device: torch.device, dtype: torch.dtype):
    """Evidence for `segfast.ops._prove`: forward with a full epilogue, and both gradients."""
    tf32 = load_kernels().multiplies_in_tf32(dtype)
    for case, (
        batch,
        c_in,
        c_out,
        height,
        width,
        kernel,
        stride,
        padding,
        extra,
        groups,
        dilation,
    ) in _PROOFS.items():
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, generator=generator):
            return torch.randn(shape, generator=generator).to(dtype)

        input = draw(batch, c_in, height, width).contiguous(memory_format=torch.channels_last)
        weight = draw(c_in, c_out // groups, kernel, kernel).contiguous(memory_format=torch.channels_last)
        scale, shift, bias = draw(c_out), draw(c_out), draw(c_out)
        geometry = (stride, padding, extra, groups, dilation)
        wide_input, wide_weight, wide_bias = (t.double() for t in (input, weight, bias))
        wide_input.requires_grad_()
        wide_weight.requires_grad_()
        conv = F.conv_transpose2d(wide_input, wide_weight, wide_bias, *geometry)
        residual, grad = draw(*conv.shape), draw(*conv.shape)
        reference = apply_epilogue(conv, scale.double(), shift.double(), residual.double(), "relu", 0.0)
        magnitude = F.conv_transpose2d(
            input.double().abs(), weight.double().abs(), bias.double().abs(), *geometry
        )
        magnitude = magnitude * scale.double().abs()[:, None, None]
        x, w, b, k, s, r = (t.to(device) for t in (input, weight, bias, scale, shift, residual))
        aten = apply_epilogue(F.conv_transpose2d(x, w, b, *geometry), k, s, r, "relu", 0.0)
        fused = partial(conv_transpose2d, x, w, b, *geometry, scale=k, shift=s, residual=r, activation="relu")
        taps = (-(-kernel // stride)) ** 2
        yield Evidence(
            OPERATIONS[0], case, fused, reference.detach(), aten, magnitude, taps * c_in // groups, tf32
        )

        options = (pair(stride, "stride"), pair(padding, "padding"), groups, pair(dilation, "dilation"))
        device_grad = grad.to(device)
        to_input, to_weight = torch.autograd.grad(conv, (wide_input, wide_weight), grad.double())
        aten_input, aten_weight = _aten_gradients(device_grad, x, w, extra, *options)
        sizes = (grad.double().abs(), input.double().abs(), weight.double().abs())
        size_input, size_weight = _aten_gradients(*sizes, extra, *options)
        on_kernels = partial(GRAD_INPUT, device_grad, w, height, width, *options)
        depth = c_out // groups * kernel * kernel
        yield Evidence(OPERATIONS[1], case, on_kernels, to_input, aten_input, size_input, depth, tf32)
        on_kernels = partial(GRAD_WEIGHT, device_grad, x, w, *options)
        yield Evidence(
            OPERATIONS[2], case, on_kernels, to_weight, aten_weight, size_weight, batch * height * width, tf32
        )
    yield from _up_concat_evidence(device, dtype)


def _up_concat_evidence(device: torch.device, dtype: torch.dtype) -> Iterator[Evidence]:
    """The same forward kernel with its copy of a cropped skip, which must be exact."""
    generator = torch.Generator().manual_seed(1)
    x, skip, weight = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((2, 24, 9, 7), (2, 40, 25, 15), (24, 48, 2, 2))
    )
    up = F.conv_transpose2d(x.double(), weight.double(), stride=2, output_padding=(0, 1))
    size = F.conv_transpose2d(x.double().abs(), weight.double().abs(), stride=2, output_padding=(0, 1))
    cropped = skip.double()[:, :, 3:21]
    on_device = [t.to(device) for t in (x, skip, weight)]
    aten_up = F.conv_transpose2d(on_device[0], on_device[2], stride=2, output_padding=(0, 1))
    aten = torch.cat([on_device[1][:, :, 3:21], aten_up], 1)
    reference = torch.cat([cropped, up], 1)
    tf32 = load_kernels().multiplies_in_tf32(dtype)
    run = partial(up_concat, on_device[0], on_device[1], on_device[2])
    yield Evidence(OPERATIONS[0], "up_concat crop", run, reference, aten, size, 24, tf32)

    def differs() -> torch.Tensor:
        return (run()[:, :40].cpu() != skip[:, :, 3:21]).float()

    nowhere = torch.zeros(cropped.shape)
    yield Evidence(OPERATIONS[0], "up_concat copy", differs, nowhere.double(), nowhere, nowhere.double(), 1)


def _aten_gradients(grad, input, weight, output_padding, stride, padding, groups, dilation):
    return torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        True,
        pair(output_padding, "output_padding"),
        groups,
        (True, True, False),
    )[:2]
