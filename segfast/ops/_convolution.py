"""A convolution and its two gradients as registered operators, and autograd among them: for three families.

Forward, gradient of the input and gradient of the weight are bilinear maps, each the gradient of another:
with these three the derivatives of every order are kernels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._epilogue import apply_epilogue, check_epilogue, epilogue_backward, keeps_output
from ._layout import channels_innermost, fit_epilogue, in_format, output_format, packed_weight
from ._operands import Pair, empty, kernel_output, load_kernels
from ._operator import Differentiable, Operator, launch_again, launch_first, needs_autograd


class Convolution:
    """`act(scale * (conv(input, weight) + bias) + shift + residual)`, and its derivatives of every order.

    Registers three operators, called `name`, `name`_grad_input and `name`_grad_weight, with the arguments
    (input, weight, *operands, *options, activation, negative_slope), (grad, weight, *sizes of the input,
    *geometry) and (grad, input, weight, *geometry). `segfast.kernels` launches the gradients by those names.

    A family is a subclass that says what is its own, of all that stands before `__init__`; what it does not
    say is that of a convolution with groups and a weight [C_out, C_in/groups, kH, kW].
    """

    name: str
    operands: tuple[str, ...] = ("bias", "scale", "shift", "residual")
    options = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
    # The gradients' options: no output padding, which the sizes tell.
    geometry = options
    sizes: tuple[str, ...] = ("height", "width")
    transposed = False
    # Whether they do so in TF32 belongs to what a launch is remembered by.
    multiplies_matrices = True

    def check(self, input, weight, bias, *options) -> tuple[int, ...]:
        """The result's shape. Raises torch's kind of error, naming the argument, where there is none."""
        raise NotImplementedError

    def launch(self, *args) -> Callable[..., Any]:
        """Launch the forward's kernel on (*tensors that fit, out, *options, activation, negative_slope).

        Returns a function of (*tensors, out), of others laid out alike, that launches it again.
        """
        raise NotImplementedError

    # The weight as the kernels of the forward and of the input's gradient take it: itself if it fits, else a
    # copy.
    fit_weight: Callable[[Tensor], Tensor] = staticmethod(packed_weight)
    fit_weight_to_gradient: Callable[[Tensor], Tensor] = staticmethod(packed_weight)

    def ordered(self, geometry: Sequence[Any]) -> Sequence[Any]:
        """The gradients' options as their kernels take them: stride, padding, dilation and groups."""
        return geometry

    def new_weight(self, weight: Tensor, allocate: Callable[..., Tensor] = empty) -> Tensor:
        """An unwritten gradient in the weight's own format: what AccumulateGrad and DDP expect."""
        return allocate(weight.shape, weight, output_format(weight, weight))

    def in_weights_format(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """`gradient` itself if it is in the weight's own format, else a copy that is."""
        if gradient.stride() == weight.stride():
            return gradient
        return in_format(gradient, output_format(weight, weight))

    def geometry_of(self, options: Sequence[Any]) -> Sequence[Any]:
        """The gradients' options, of the forward's."""
        return options

    def options_of(self, geometry: Sequence[Any], input, weight, output) -> Sequence[Any]:
        """The forward's options with which `input` comes to the size of `output`."""
        return geometry

    def input_shape(self, grad, weight, height, width, *geometry) -> tuple[int, ...]:
        """The shape of the input whose gradient is asked for."""
        return (grad.shape[0], weight.shape[1] * geometry[3], height, width)

    def aten(self, input, weight, bias, *options) -> Tensor:
        """The convolution alone, in ATen."""
        return F.conv2d(input, weight, bias, *options)

    def aten_grad_input(self, grad, weight, shape, *geometry) -> Tensor:
        """Gradient of an input of `shape`, in ATen."""
        input = grad.new_empty(1).expand(shape)
        return aten_backward(grad, input, weight, *geometry, mask=(True, False, False))[0]

    def aten_grad_weight(self, grad, input, weight, *geometry) -> Tensor:
        """Gradient of the weight, in ATen."""
        return aten_backward(grad, input, weight, *geometry, mask=(False, True, False))[1]

    def __init__(self) -> None:
        self._count = 2 + len(self.operands)
        operands = ", ".join(f"Tensor? {name}" for name in self.operands)
        sizes = ", ".join(f"SymInt {name}" for name in self.sizes)
        self.arguments = (
            f"Tensor input, Tensor weight, {operands}, {self.options}, str? activation, float negative_slope"
        )
        self.operator = Operator(
            f"{self.name}({self.arguments}) -> Tensor",
            kernels=self._kernels,
            reference=self._reference,
            fake=self.empty,
            per_sample=(0, 5) if "residual" in self.operands else (0,),
            flops=lambda input, weight, *_, out_shape, **__: convolution_flops(
                input if self.transposed else out_shape, weight
            ),
        )
        self.grad_input_operator = Operator(
            f"{self.name}_grad_input(Tensor grad, Tensor weight, {sizes}, {self.geometry}) -> Tensor",
            kernels=self._grad_input_kernels,
            reference=self._grad_input_reference,
            fake=lambda grad, weight, *rest: empty(
                self.input_shape(grad, weight, *rest), grad, output_format(grad, weight)
            ),
            per_sample=(0,),
            flops=lambda grad, weight, *_, out_shape, **__: convolution_flops(
                out_shape if self.transposed else grad, weight
            ),
        )
        self.grad_weight_operator = Operator(
            f"{self.name}_grad_weight(Tensor grad, Tensor input, Tensor weight, {self.geometry}) -> Tensor",
            kernels=self._grad_weight_kernels,
            reference=lambda grad, input, weight, *geometry: self.in_weights_format(
                self.aten_grad_weight(grad, input, weight, *geometry), weight
            ),
            fake=lambda grad, input, weight, *_: self.new_weight(weight),
            flops=lambda grad, input, weight, *_, **__: convolution_flops(
                input if self.transposed else grad, weight
            ),
        )
        _CONVOLUTIONS[self.name] = self
        self._forward, self._grad_input, self._grad_weight = _functions(
            self.name, self._count, len(self.sizes)
        )

    def forward(self, *args) -> Tensor:
        """The operator, through autograd where it is needed."""
        if needs_autograd(*args[: self._count]):
            return self._forward.call(*args)
        return self.operator(*args)

    def plain(self, input, weight, *options) -> Tensor:
        """The convolution alone."""
        return self.forward(input, weight, *[None] * len(self.operands), *options, None, 0.0)

    def grad_input(self, *args) -> Tensor:
        """Gradient of the input, differentiable."""
        run = self._grad_input.call if needs_autograd(*args[:2]) else self.grad_input_operator
        return run(*args)

    def grad_weight(self, grad, input, weight, *geometry) -> Tensor:
        """Gradient of the weight, differentiable; `weight` gives the shape and the memory format only."""
        args = (grad, input, weight.detach(), *geometry)
        run = self._grad_weight.call if needs_autograd(grad, input) else self.grad_weight_operator
        return run(*args)

    def backward(self, grad, output, tensors, options, needs) -> tuple[Tensor | None, ...]:
        """Gradients of the forward's tensors, those that `needs` asks for; differentiable.

        `output` is the forward's result where the activation's gradient follows from it, else None; `options`
        are all that follow the tensors.
        """
        input, weight, *operands = tensors
        *options, activation, negative_slope = options
        count = len(operands)

        def recompute(*operands):
            return self.forward(input, weight, *operands[:count], *options, None, 0.0)

        # The residual is the last of four, and not everywhere.
        bias, scale, shift, residual = (*operands, None)[:4]
        needed = (*needs[2 : 2 + count], False)[:4]
        grads = epilogue_backward(
            grad, output, recompute, bias, scale, shift, residual, activation, negative_slope, needed
        )
        geometry = self.geometry_of(options)
        grad_input = grad_weight = None
        if needs[0]:
            sizes = input.shape[-len(self.sizes) :]
            grad_input = self.grad_input(grads.conv, weight, *sizes, *geometry)
        if needs[1]:
            grad_weight = self.grad_weight(grads.conv, input, weight, *geometry)
        return (grad_input, grad_weight, *grads[1 : 1 + count])

    def result_shape(self, *args) -> tuple[int, ...]:
        """The shape of the forward's result. Raises where there is none."""
        (input, weight, bias, *operands), options = args[: self._count], args[self._count : -2]
        shape = self.check(input, weight, bias, *options)
        scale, shift, residual = (*operands, None)[:3]
        check_epilogue(shape, input.device, scale, shift, residual)
        return shape

    def empty(self, *args) -> Tensor:
        """The forward's result, unwritten."""
        return empty(self.result_shape(*args), args[0], output_format(*args[:2]))

    def _kernels(self, *args):
        kernels, count, input = load_kernels(), self._count, args[0]
        tensors, options = args[:count], args[count:]
        precision = kernels.dot_precision(input.dtype) if self.multiplies_matrices else None
        key = (self.name, kernels.layout_key(*tensors), input.device, options, precision)
        result = launch_again(key, tensors)
        if result is not None:
            return result
        shape, (_, weight, *operands) = self.result_shape(*args), tensors
        fitted = (channels_innermost(input), self.fit_weight(weight), *fit_epilogue(*operands))
        memory_format = output_format(input, weight)
        return launch_first(
            key, shape, memory_format, tensors, fitted, lambda out: self.launch(*fitted, out, *options)
        )

    def _reference(self, *args):
        self.result_shape(*args)
        (input, weight, bias, *operands), options = args[: self._count], args[self._count :]
        # Nothing written over, no size asked: this is also the decomposition that a tracer records.
        y = self.aten(input, weight, bias, *options[:-2])
        y = apply_epilogue(y, *(*operands, None)[:3], *options[-2:])
        return in_format(y, output_format(input, weight))

    def _grad_input_kernels(self, grad, weight, *rest):
        shape, memory_format = self.input_shape(grad, weight, *rest), output_format(grad, weight)
        out = kernel_output(shape, grad, memory_format)
        if out.numel() == 0:
            return empty(shape, grad, memory_format)
        launch = getattr(load_kernels(), self.grad_input_operator.name)
        geometry = self.ordered(rest[len(self.sizes) :])
        launch(channels_innermost(grad), self.fit_weight_to_gradient(weight), out, *geometry)
        return out.contiguous(memory_format=memory_format)

    def _grad_input_reference(self, grad, weight, *rest):
        shape = self.input_shape(grad, weight, *rest)
        result = self.aten_grad_input(grad, weight, shape, *rest[len(self.sizes) :])
        return in_format(result, output_format(grad, weight))

    def _grad_weight_kernels(self, grad, input, weight, *geometry):
        out = self.new_weight(weight, kernel_output)
        if grad.numel() == 0:
            return self.in_weights_format(out.zero_(), weight)
        launch = getattr(load_kernels(), self.grad_weight_operator.name)
        launch(channels_innermost(input), channels_innermost(grad), out, *self.ordered(geometry))
        return self.in_weights_format(out, weight)


_CONVOLUTIONS: dict[str, Convolution] = {}


def _functions(name: str, count: int, sizes: int) -> tuple[type[Differentiable], ...]:
    """Autograd of the three operators of the convolution `name`, of `count` tensors and `sizes` sizes.

    torch.compile reads a global dictionary where it would not read the convolution in a closure. Long, as
    the three Functions refer to each other.
    """

    class _Forward(Differentiable):
        @staticmethod
        def forward(*args):
            return _CONVOLUTIONS[name].operator(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.options = inputs[count:]
            kept = output if keeps_output(*inputs[-2:]) else None
            ctx.save_for_backward(*inputs[:count], kept)

        @staticmethod
        def backward(ctx, grad):
            *tensors, output = ctx.saved_tensors
            grads = _CONVOLUTIONS[name].backward(grad, output, tensors, ctx.options, ctx.needs_input_grad)
            return (*grads, *[None] * len(ctx.options))

    class _GradInput(Differentiable):
        @staticmethod
        def forward(*args):
            return _CONVOLUTIONS[name].grad_input_operator(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.geometry = inputs[2 + sizes :]
            ctx.save_for_backward(*inputs[:2])

        @staticmethod
        def backward(ctx, grad_grad):
            grad, weight = ctx.saved_tensors
            to_grad = to_weight = None
            if ctx.needs_input_grad[0]:
                options = _CONVOLUTIONS[name].options_of(ctx.geometry, grad_grad, weight, grad)
                to_grad = _CONVOLUTIONS[name].plain(grad_grad, weight, *options)
            if ctx.needs_input_grad[1]:
                to_weight = _CONVOLUTIONS[name].grad_weight(grad, grad_grad, weight, *ctx.geometry)
            return (to_grad, to_weight, *[None] * (sizes + len(ctx.geometry)))

    class _GradWeight(Differentiable):
        @staticmethod
        def forward(*args):
            return _CONVOLUTIONS[name].grad_weight_operator(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.geometry = inputs[3:]
            ctx.save_for_backward(*inputs[:2])

        @staticmethod
        def backward(ctx, grad_grad):
            grad, input = ctx.saved_tensors
            to_grad = to_input = None
            if ctx.needs_input_grad[0]:
                options = _CONVOLUTIONS[name].options_of(ctx.geometry, input, grad_grad, grad)
                to_grad = _CONVOLUTIONS[name].plain(input, grad_grad, *options)
            if ctx.needs_input_grad[1]:
                to_input = _CONVOLUTIONS[name].grad_input(
                    grad, grad_grad, *input.shape[-sizes:], *ctx.geometry
                )
            return (to_grad, to_input, None, *[None] * len(ctx.geometry))

    return _Forward, _GradInput, _GradWeight


def convolution_flops(image: Sequence[int], weight: Sequence[int]) -> int:
    """FLOPs of a convolution whose filters meet each pixel of an image of this shape."""
    return 2 * image[0] * image[2] * image[3] * math.prod(weight)


def aten_backward(
    grad, input, weight, stride, padding, dilation, groups, output_padding: Pair | None = None, *, mask
) -> tuple[Tensor, Tensor, Tensor]:
    """ATen's gradients of (input, weight, bias), those that `mask` asks for.

    Of a transposed convolution where there is an output padding.
    """
    transposed, extra = output_padding is not None, output_padding or (0, 0)
    return torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, transposed, extra, groups, mask
    )
