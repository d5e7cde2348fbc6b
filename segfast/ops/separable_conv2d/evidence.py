"""The cases that prove the depthwise and separable kernels right on a GPU."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Proof as Evidence
from .._epilogue import apply_epilogue
from .._operands import load_kernels, pair
from .functional import OPERATIONS, depthwise_conv2d, separable_conv2d
from .operators import DEPTHWISE_CONV2D

# (batch, C, filters a channel, height, width, kernel, stride, padding, dilation): odd sizes that leave no
# tile full, several tiles in every direction, and each of the kernels' forms.
_DEPTHWISE = {
    "k3": (2, 72, 1, 11, 21, 3, 1, 1, 1),
    "k3 s2": (2, 40, 1, 17, 21, 3, 2, 1, 1),
    "k3 d3 21 channels": (1, 21, 1, 14, 19, 3, 1, 3, 3),
    "k5": (1, 40, 1, 9, 19, 5, 1, 2, 1),
    "k5 s2": (1, 40, 1, 10, 19, 5, 2, 2, 1),
    "k7": (1, 40, 1, 9, 11, 7, 1, 3, 1),
    "k9 s3, taps": (1, 24, 1, 13, 14, 9, 3, 4, 1),
    "two filters a channel, taps": (2, 24, 2, 9, 11, 3, 2, 2, 2),
}
# (batch, C, C_out, height, width, stride, form), then kernel, dilation and filters a channel if not 3, 1, 1.
_SEPARABLE = {
    "fused": (2, 136, 72, 13, 17, 1, "fused"),
    "fused s2": (1, 72, 264, 21, 17, 2, "fused"),
    "fused k5 d2, two filters a channel": (1, 40, 72, 13, 17, 1, "fused", 5, 2, 2),
    "two kernels": (2, 136, 72, 13, 17, 1, "two kernels"),
}


def proofs(device: torch.device, dtype: torch.dtype):
    """Evidence for `segfast.ops._prove`: forwards with full epilogues, both gradients, both fused forms."""
    for case, sizes in _DEPTHWISE.items():
        yield from depthwise_evidence(device, dtype, case, *sizes)
    for case, layer in _SEPARABLE.items():
        yield separable_evidence(device, dtype, case, *layer)


def _drawer(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    return draw


def _gradients(grad, input, weight, stride, padding, dilation) -> tuple[Tensor, Tensor]:
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0, 0), input.shape[1],
        (True, True, False),
    )  # fmt: skip
    return grad_input, grad_weight


def depthwise_evidence(device, dtype, case, batch, channels, filters, height, width, kernel, *steps):
    """The forward, its statistics and both gradients of one case, sizes as in `_DEPTHWISE`."""
    draw = _drawer(dtype)
    stride, padding, dilation = (pair(n, "step") for n in steps)
    geometry = (stride, padding, dilation)
    input, weight = draw(batch, channels, height, width), draw(channels * filters, 1, kernel, kernel)
    bias, scale, shift = (draw(channels * filters) for _ in range(3))

    def run(input, weight, bias, scale, shift, activation):
        conv = F.conv2d(input, weight, bias, *geometry, channels)
        return apply_epilogue(conv, scale, shift, None, activation, 0.0)

    tensors = (input, weight, bias, scale, shift)
    reference = run(*(t.double() for t in tensors), "relu6")
    magnitude = run(*(t.double().abs() for t in tensors), None)
    on_device = [t.to(device) for t in tensors]
    aten = run(*on_device, "relu6")
    x, w, b, s, t = on_device
    options = {"scale": s, "shift": t, "activation": "relu6"}

    def fused():
        return depthwise_conv2d(x, w, b, *geometry, **options, return_statistics=True)

    taps, pixels = kernel * kernel, reference[0, 0].numel()
    yield Evidence(OPERATIONS[0], case, lambda: fused()[0], reference, aten, magnitude, taps)
    sums = [torch.stack([y.double().sum((2, 3)), y.double().square().sum((2, 3))]) for y in (reference, aten)]
    yield Evidence(OPERATIONS[0], f"{case}, sums", lambda: torch.stack(fused()[1:]), *sums, sums[0], pixels)

    grad = draw(*reference.shape)
    wide = _gradients(grad.double(), input.double(), weight.double(), *geometry)
    plain = _gradients(grad.to(device), x, w, *geometry)
    sizes = _gradients(grad.double().abs(), input.double().abs(), weight.double().abs(), *geometry)
    grad = grad.to(device)
    on_kernels = partial(DEPTHWISE_CONV2D.grad_input_operator, grad, w, channels, height, width, *geometry)
    yield Evidence(OPERATIONS[1], case, on_kernels, wide[0], plain[0], sizes[0], taps * filters)
    on_kernels = partial(DEPTHWISE_CONV2D.grad_weight_operator, grad, x, w, *geometry)
    yield Evidence(OPERATIONS[2], case, on_kernels, wide[1], plain[1], sizes[1], batch * pixels)


def separable_evidence(
    device,
    dtype,
    case,
    batch,
    channels,
    channels_out,
    height,
    width,
    step,
    form,
    kernel=3,
    dilation=1,
    filters=1,
):
    """The forward of one case in one form, sizes as in `_SEPARABLE`; `filters` a channel."""
    kernels = load_kernels()
    draw = _drawer(dtype)
    geometry = (pair(step, "stride"), pair(dilation * (kernel // 2), "padding"), pair(dilation, "dilation"))
    between = channels * filters
    input, first = draw(batch, channels, height, width), draw(between, 1, kernel, kernel)
    second = draw(channels_out, between, 1, 1)
    vectors = [draw(between) for _ in range(3)] + [draw(channels_out) for _ in range(3)]

    def run(input, first, second, b1, s1, t1, b2, s2, t2, residual, activations):
        d = F.conv2d(input, first, b1, *geometry, channels)
        d = apply_epilogue(d, s1, t1, None, activations[0], 0.0)
        return apply_epilogue(F.conv2d(d, second, b2), s2, t2, residual, activations[1], 0.0)

    tensors = [input, first, second, *vectors]
    tensors.append(draw(*run(*tensors, None, (None, None)).shape))
    reference = run(*(t.double() for t in tensors), ("relu6", "relu"))
    magnitude = run(*(t.double().abs() for t in tensors), (None, None))
    x, wd, w, b1, s1, t1, b2, s2, t2, r = (t.to(device) for t in tensors)
    aten = run(x, wd, w, b1, s1, t1, b2, s2, t2, r, ("relu6", "relu"))

    def on_kernels():
        with kernels.override_tile("separable_conv2d_forward", config_of(form, x, channels_out)):
            return separable_conv2d(
            x, wd, w, b1, b2, *geometry, depthwise_scale=s1, depthwise_shift=t1,
            depthwise_activation="relu6", scale=s2, shift=t2, residual=r, activation="relu",
        )  # fmt: skip

    tf32 = kernels.multiplies_in_tf32(dtype)
    return Evidence(
        OPERATIONS[3], case, on_kernels, reference, aten, magnitude, kernel * kernel * between, tf32
    )


def config_of(form: str, x: Tensor, channels_out: int):
    """The first tile of that form that fits the device."""
    from segfast.kernels import _device, _tiles  # which needs triton

    problem = _tiles.Problem(
        "separable_conv2d_forward", x.shape[1], channels_out, 9, 1, x.dtype, x.numel() // x.shape[1],
        rows=x.numel() // x.shape[1], columns=channels_out, depth=x.shape[1],
    )  # fmt: skip
    found = _tiles.candidates(problem, _device.architecture(x.device), _device.shared_memory_limit(x.device))
    return next(tile for tile in found if tile.form == form)
