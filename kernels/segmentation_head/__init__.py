"""Losses and labels of upsampled logits; the full-size logits exist in registers only.

z[n, c, oh, ow] = (1 - b) ((1 - a) x[n, c, h, w] + a x[n, c, h, w + 1]) + b (... h + 1 ...), with a and b, the
fractions of the source position, ATen's. A cell is the square between four low-resolution pixels. The outputs
that lie in it share its corners, so a thread owns a stretch of a cell's row of outputs, loads the corners of
a block of classes once and interpolates all of them from registers; nothing is exchanged between threads in
the loop over the classes. Neighboring threads own neighboring cells: planes that are contiguous along their
width ("NCHW") load whole cache lines. Arithmetic is fp32. No atomics: every result is written once.
"""

from .argmax import upsample_argmax
from .dice_sums import softmax_expectation, upsample_dice_sums
from .forward import upsample_softmax_forward
from .grad_logits import upsample_grad_logits

__all__ = [
    "softmax_expectation",
    "upsample_argmax",
    "upsample_dice_sums",
    "upsample_grad_logits",
    "upsample_softmax_forward",
]
