"""The public functions: the names and argument order of `torch.nn.functional`, plus the fused arguments."""

import torch

from .ops._roi_pool import roi_pool
from .ops.conv2d import conv2d, parallel_conv2d
from .ops.conv_transpose2d import conv_transpose2d, up_concat
from .ops.dense_crf import gaussian_filter, mean_field, skipped_share
from .ops.packed_pool2d import packed_max_pool2d, packed_max_unpool2d
from .ops.segmentation_head import upsample_argmax, upsample_cross_entropy, upsample_dice
from .ops.separable_conv2d import depthwise_conv2d, separable_conv2d

__all__ = [
    "conv2d",
    "conv_transpose2d",
    "depthwise_conv2d",
    "gaussian_filter",
    "mean_field",
    "packed_max_pool2d",
    "packed_max_unpool2d",
    "parallel_conv2d",
    "roi_pool",
    "separable_conv2d",
    "skipped_share",
    "up_concat",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_dice",
]

for _name in __all__:
    # Symbolic tracing keeps the call whole instead of stepping into the choice of backend.
    torch.fx.wrap(_name)
