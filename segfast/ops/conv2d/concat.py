"""conv2d of several images as if they were concatenated, without the concatenation: a U-Net's decoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._convolution import convolution_flops
from .._epilogue import check_epilogue, epilogue_backward, keeps_output
from .._layout import channels_innermost, fit_epilogue, in_format, output_format, packed_weight
from .._operands import empty, load_kernels
from .._operator import Differentiable, Operator, launch_again, launch_first, needs_autograd
from .geometry import check_conv2d, check_images, cropped
from .operators import CONV2D

# Images that one launch reads where they lie.
MOST_IMAGES = 4


def _result_shape(inputs, weight, bias, scale, shift, residual, stride, padding, dilation):
    check_images(inputs)
    first = cropped(inputs)[0]
    channels = sum([t.shape[1] for t in inputs])
    shape = check_conv2d(first, weight, bias, stride, padding, dilation, 1, channels)
    check_epilogue(shape, first.device, scale, shift, residual)
    return shape


def _format(inputs: Sequence[Tensor], weight: Tensor) -> torch.memory_format:
    formats = [output_format(t, weight) for t in inputs]
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


def _fake(first, others, weight, *rest):
    inputs = [first, *others]
    return empty(_result_shape(inputs, weight, *rest[:-2]), first, _format(inputs, weight))


def _kernels(
    first, others, weight, bias, scale, shift, residual, stride, padding, dilation, activation, negative_slope
):  # fmt: skip
    kernels = load_kernels()
    # An image without channels would end the list for the kernel.
    inputs = [t for t in (first, *others) if t.shape[1] > 0] or [first]
    vectors = (bias, scale, shift, residual)
    options = (stride, padding, dilation, 1, activation, negative_slope)
    views = cropped(inputs)
    # The views too: whether they are aligned does not follow from the images' being so.
    layouts = kernels.layout_key(weight, *vectors, *inputs, *views)
    key = ("conv2d_concat", layouts, first.device, options, kernels.dot_precision(first.dtype))
    result = launch_again(key, (views, weight, *vectors))
    if result is not None:
        return result
    shape = _result_shape(inputs, weight, *vectors, stride, padding, dilation)
    images = [channels_innermost(t) for t in inputs]
    fitted = (packed_weight(weight), *fit_epilogue(*vectors))
    return launch_first(
        key,
        shape,
        _format(inputs, weight),
        (*inputs, weight, *vectors),
        (*images, *fitted),
        lambda out: kernels.conv2d_forward(cropped(images), *fitted, out, *options),
    )


def _reference(first, others, weight, *rest):
    inputs = [first, *others]
    _result_shape(inputs, weight, *rest[:-2])
    joined = torch.cat(cropped(inputs), 1)
    *operands, stride, padding, dilation, activation, negative_slope = rest
    options = (stride, padding, dilation, 1, activation, negative_slope)
    return in_format(CONV2D.operator.reference(joined, weight, *operands, *options), _format(inputs, weight))


CONCAT = Operator(
    "conv2d_concat(Tensor first, Tensor[] others, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "Tensor? residual, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, str? activation, "
    "float negative_slope) -> Tensor",
    kernels=_kernels,
    reference=_reference,
    fake=_fake,
    flops=lambda first, others, weight, *_, out_shape, **__: convolution_flops(out_shape, weight),
)


class _Concat(Differentiable):
    # The images come last: autograd sees tensors among the arguments, not inside a list.
    @staticmethod
    def forward(weight, bias, scale, shift, residual, options, first, *others):
        return CONCAT(first, list(others), weight, bias, scale, shift, residual, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, bias, scale, shift, residual, ctx.options, *images = inputs
        kept = output if keeps_output(*ctx.options[3:]) else None
        ctx.save_for_backward(weight, bias, scale, shift, residual, kept, *images)

    @staticmethod
    def backward(ctx, grad):
        weight, bias, scale, shift, residual, output, *images = ctx.saved_tensors
        stride, padding, dilation, activation, negative_slope = ctx.options
        geometry = (stride, padding, dilation, 1)

        def recompute(*epilogue):
            return forward(images, weight, *epilogue, stride, padding, dilation, None, 0.0)

        needs = ctx.needs_input_grad
        grads = epilogue_backward(
            grad, output, recompute, bias, scale, shift, residual, activation, negative_slope, needs[1:5]
        )
        views = cropped(images)
        starts = [0]
        for view in views:
            starts.append(starts[-1] + view.shape[1])
        to_images: list[Tensor | None] = [None] * len(images)
        if any(needs[6:]):
            joined = CONV2D.grad_input(grads.conv, weight, *views[0].shape[2:], *geometry)
            to_images = [
                _uncropped(joined[:, start : start + image.shape[1]], image) if needed else None
                for needed, start, image in zip(needs[6:], starts[:-1], images, strict=True)
            ]
        to_weight = None
        if needs[0]:
            parts = [
                CONV2D.grad_weight(grads.conv, view, weight[:, start : start + view.shape[1]], *geometry)
                for view, start in zip(views, starts[:-1], strict=True)
            ]
            to_weight = torch.cat(parts, 1)
        return (to_weight, *grads[1:], None, *to_images)


def _uncropped(grad: Tensor, image: Tensor) -> Tensor:
    """The gradient of an image from that of its center: zero around it."""
    height, width = grad.shape[2:]
    if image.shape[2:] == grad.shape[2:]:
        return grad
    top, left = (image.shape[2] - height) // 2, (image.shape[3] - width) // 2
    return F.pad(grad, (left, image.shape[3] - width - left, top, image.shape[2] - height - top))


def forward(images, weight, bias, scale, shift, residual, *options) -> Tensor:
    """The operator, through autograd where it is needed; `options` end in activation and slope."""
    if needs_autograd(weight, bias, scale, shift, residual, *images):
        return _Concat.call(weight, bias, scale, shift, residual, options, *images)
    return CONCAT(images[0], list(images[1:]), weight, bias, scale, shift, residual, *options)
