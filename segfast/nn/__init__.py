"""Drop-in `torch.nn` modules."""

from . import init
from .conv_transpose2d import ConvTranspose2d
from .upsample import BilinearUpsample, UpsampleConv2d

__all__ = ["BilinearUpsample", "ConvTranspose2d", "UpsampleConv2d", "init"]
