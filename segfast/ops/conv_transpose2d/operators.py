"""conv_transpose2d's three registered operators and their autograd: see `Convolution`."""

import torch.nn.functional as F

from .._convolution import Convolution, aten_backward
from .._geometry import missing_output_padding
from .._operands import load_kernels
from .geometry import check_conv_transpose2d


class _ConvTranspose2d(Convolution):
    """Weights are [C_in, C_out/groups, kH, kW]; the gradients do not ask for an output padding."""

    name = "conv_transpose2d"
    options = (
        "SymInt[2] stride, SymInt[2] padding, SymInt[2] output_padding, SymInt groups, SymInt[2] dilation"
    )
    geometry = "SymInt[2] stride, SymInt[2] padding, SymInt groups, SymInt[2] dilation"
    transposed = True
    check = staticmethod(check_conv_transpose2d)
    aten = staticmethod(F.conv_transpose2d)

    def launch(self, *args):
        *tensors, out, stride, padding, _, groups, dilation, activation, slope = args
        options = (stride, padding, dilation, groups, (0, 0), activation, slope)
        launch = load_kernels().conv_transpose2d_forward(*tensors, None, out, *options)
        # In the place of None is the skip of `up_concat`.
        return lambda x, w, b, s, t, r, out: launch(x, w, b, s, t, r, None, out)

    def ordered(self, geometry):
        stride, padding, groups, dilation = geometry
        return (stride, padding, dilation, groups)

    def geometry_of(self, options):
        stride, padding, _, groups, dilation = options
        return (stride, padding, groups, dilation)

    def options_of(self, geometry, input, weight, output):
        stride, padding, groups, dilation = geometry
        sizes = (output.shape[2:], input.shape[2:], weight.shape[2:])
        extra = missing_output_padding(*sizes, stride, padding, dilation)
        return (stride, padding, extra, groups, dilation)

    def input_shape(self, grad, weight, height, width, *geometry):
        return (grad.shape[0], weight.shape[0], height, width)

    def aten_grad_input(self, grad, weight, shape, stride, padding, groups, dilation):
        # The output's size names the input's only up to the stride: what conv2d returns beyond it is cut off.
        return F.conv2d(grad, weight, None, stride, padding, dilation, groups)[:, :, : shape[2], : shape[3]]

    def aten_grad_weight(self, grad, input, weight, stride, padding, groups, dilation):
        sizes = (grad.shape[2:], input.shape[2:], weight.shape[2:])
        extra = missing_output_padding(*sizes, stride, padding, dilation)
        options = (stride, padding, dilation, groups, extra)
        return aten_backward(grad, input, weight, *options, mask=(False, True, False))[1]


CONV_TRANSPOSE2D = _ConvTranspose2d()
