"""conv2d's three registered operators and their autograd: see `Convolution`."""

from .._convolution import Convolution
from .._layout import row_weight
from .._operands import load_kernels
from .geometry import check_conv2d


class _Conv2d(Convolution):
    name = "conv2d"
    check = staticmethod(check_conv2d)
    fit_weight = staticmethod(row_weight)

    def launch(self, input, *args):
        launch = load_kernels().conv2d_forward((input,), *args)
        return lambda x, w, b, s, t, r, out: launch((x,), w, b, s, t, r, out)


CONV2D = _Conv2d()
