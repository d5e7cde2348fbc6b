"""The cases that prove the conv2d kernels right on a GPU."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Proof as Evidence
from .._epilogue import apply_epilogue
from .._operands import load_kernels, pair
from .concat import CONCAT
from .functional import OPERATIONS
from .geometry import cropped
from .operators import CONV2D
from .parallel import PARALLEL

# (batch, C_in, C_out, height, width, kernel, stride, padding, dilation, groups, split): odd sizes that leave
# no tile full, and each of the kernels' forms.
_PROOFS = {
    "k3": (2, 72, 136, 13, 11, 3, 1, 1, 1, 1, 1),
    "k1 split": (1, 264, 72, 9, 7, 1, 1, 0, 1, 1, 3),
    "k3 d2 split": (1, 136, 40, 15, 17, 3, 1, 2, 2, 1, 4),
    "k3 s2": (2, 64, 72, 17, 21, 3, 2, 1, 1, 1, 1),
    "k7 s2 RGB": (2, 3, 64, 33, 35, 7, 2, 3, 1, 1, 1),
    "k3 d12 zones": (1, 72, 72, 19, 21, 3, 1, 12, 12, 1, 1),
    "k3 d18 zones split": (1, 72, 40, 33, 31, 3, 1, 18, 18, 1, 3),
    "k3 pad 20": (1, 64, 72, 3, 5, 3, 1, 20, 1, 1, 1),
    "k5 s3 d2 groups": (2, 48, 24, 23, 19, 5, 3, 3, 2, 3, 1),
    "k3 21 channels": (1, 21, 21, 14, 19, 3, 1, 1, 1, 1, 1),
}


def _drawer(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    return draw


def proofs(device: torch.device, dtype: torch.dtype) -> Iterator[Evidence]:
    """Evidence for `segfast.ops._prove`: forwards with full epilogues, both gradients, lists, pyramids."""
    for case, sizes in _PROOFS.items():
        yield from convolution_evidence(device, dtype, case, *sizes)
    yield _images(device, dtype)
    for split in (1, 3):
        yield _aspp(device, dtype, split)


def _split(operation: str, split: int) -> contextlib.AbstractContextManager:
    """Tiles whose depth is cut into `split` parts; the operation's own if it is not."""
    if split == 1:
        return contextlib.nullcontext()
    kernels = load_kernels()
    return kernels.override_tile(operation, kernels.Tile(64, 32, 32, 4, 3, split_k=split))


def _gradients(grad, input, weight, stride, padding, dilation, groups) -> tuple[Tensor, Tensor]:
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0, 0), groups, (True, True, False)
    )
    return grad_input, grad_weight


def convolution_evidence(
    device, dtype, case, batch, c_in, c_out, height, width, kernel, stride, padding, dilation, groups, split
) -> Iterator[Evidence]:
    draw = _drawer(dtype)
    geometry = (pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"), groups)
    input, weight = draw(batch, c_in, height, width), draw(c_out, c_in // groups, kernel, kernel)
    vectors = [draw(c_out) for _ in range(3)]

    def run(tensors, activation=None):
        input, weight, bias, scale, shift, residual = tensors
        return apply_epilogue(
            F.conv2d(input, weight, bias, *geometry), scale, shift, residual, activation, 0.0
        )

    tensors = [input, weight, *vectors]
    tensors.append(draw(*run([*tensors, None]).shape))
    reference = run([t.double() for t in tensors], "relu")
    magnitude = run([t.double().abs() for t in tensors])
    on_device = [t.to(device) for t in tensors]
    aten = run(on_device, "relu")
    depth = c_in // groups * kernel * kernel
    tf32 = load_kernels().multiplies_in_tf32(dtype)

    def fused():
        with _split(OPERATIONS[0], split):
            return CONV2D.forward(*on_device, *geometry, "relu", 0.0)

    yield Evidence(OPERATIONS[0], case, fused, reference, aten, magnitude, depth, tf32)

    grad, (x, w) = draw(*reference.shape), on_device[:2]
    wide = _gradients(grad.double(), input.double(), weight.double(), *geometry)
    plain = _gradients(grad.to(device), x, w, *geometry)
    sizes = _gradients(grad.double().abs(), input.double().abs(), weight.double().abs(), *geometry)

    def to_input():
        with _split(OPERATIONS[1], split if stride == 1 else 1):
            return CONV2D.grad_input(grad.to(device), w, height, width, *geometry)

    depth = c_out // groups * kernel * kernel
    yield Evidence(OPERATIONS[1], case, to_input, wide[0], plain[0], sizes[0], depth, tf32)

    # A tap meets no more pixels than the input has.
    terms = batch * min(reference[0, 0].numel(), height * width)

    def to_weight():
        return CONV2D.grad_weight(grad.to(device), x, w, *geometry)

    yield Evidence(OPERATIONS[2], case, to_weight, wide[1], plain[1], sizes[1], terms, tf32)


def _images(device: torch.device, dtype: torch.dtype) -> Evidence:
    """Four images of several sizes as one input."""
    draw = _drawer(dtype)
    images = [draw(2, channels, *size) for channels, size in
              ((40, (15, 14)), (72, (9, 12)), (24, (9, 11)), (64, (13, 11)))]  # fmt: skip
    weight, bias = draw(72, 200, 3, 3), draw(72)

    def run(images, weight, bias, activation):
        y = F.conv2d(torch.cat(cropped(images), 1), weight, bias, padding=1)
        return apply_epilogue(y, None, None, None, activation, 0.0)

    reference = run([t.double() for t in images], weight.double(), bias.double(), "relu")
    magnitude = run([t.double().abs() for t in images], weight.double().abs(), bias.double().abs(), None)
    (first, *others), w, b = [t.to(device) for t in images], weight.to(device), bias.to(device)
    aten = run([first, *others], w, b, "relu")
    one = (1, 1)

    def concat():
        return CONCAT(first, others, w, b, None, None, None, one, one, one, "relu", 0.0)

    tf32 = load_kernels().multiplies_in_tf32(dtype)
    return Evidence(OPERATIONS[0], "four images", concat, reference, aten, magnitude, 9 * 200, tf32)


def _aspp(device: torch.device, dtype: torch.dtype, split: int) -> Evidence:
    """A 1x1 convolution and three dilated ones in one launch."""
    draw, dilations = _drawer(dtype), (1, 6, 12, 18)
    input = draw(1, 72, 33, 31)
    weights = [draw(72, 72, *(1, 1) if d == 1 else (3, 3)) for d in dilations]
    scale, shift = draw(4 * 72), draw(4 * 72)

    def run(input, weights, scale, shift, activation):
        branches = [
            F.conv2d(input, w, None, 1, d * (w.shape[2] // 2), d)
            for w, d in zip(weights, dilations, strict=True)
        ]
        return apply_epilogue(torch.cat(branches, 1), scale, shift, None, activation, 0.0)

    reference = run(input.double(), [w.double() for w in weights], scale.double(), shift.double(), "relu")
    sizes = [t.double().abs() for t in (input, *weights, scale, shift)]
    magnitude = run(sizes[0], sizes[1:5], sizes[5], sizes[6], None)
    x, k, t = input.to(device), scale.to(device), shift.to(device)
    on_device = [w.to(device) for w in weights]
    aten = run(x, on_device, k, t, "relu")

    def parallel():
        with _split(OPERATIONS[3], split):
            return PARALLEL(x, on_device, k, t, [n for d in dilations for n in (d, d)], "relu", 0.0)

    tf32 = load_kernels().multiplies_in_tf32(dtype)
    return Evidence(
        OPERATIONS[3], f"pyramid, split {split}", parallel, reference, aten, magnitude, 9 * 72, tf32
    )
