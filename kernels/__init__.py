"""Triton kernels and their launchers: device code, sizes, strides, tiles. Imported as `segfast.kernels`.

Needs torch and triton only, and imports nothing of segfast.
"""

if __name__ == "kernels":
    # With the repository's root on sys.path, `import kernels` finds this folder instead of Hugging Face's
    # package of that name, which transformers imports unguarded: hand over to it. Where it is not installed,
    # offer nothing, so that such an import fails as if nothing were here.
    import importlib.util
    import os
    import sys
    from importlib.machinery import PathFinder

    _elsewhere = [p for p in sys.path if not os.path.isdir(os.path.join(p, "kernels", "dense_crf"))]
    _spec = PathFinder.find_spec("kernels", _elsewhere)
    # A folder without `__init__.py`, of any name in the current directory, has no loader of its own.
    if _spec is not None and _spec.origin is not None and _spec.loader is not None:
        # The import system returns what stands under the name once this module has run.
        sys.modules["kernels"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])

    def __getattr__(name: str):
        raise AttributeError(
            f"this folder is segfast's: import segfast.kernels, not kernels (asked for {name!r})"
        )
else:
    from ._batch_norm import batch_norm_apply, batch_norm_statistics
    from ._batch_norm_backward import batch_norm_grad_input, batch_norm_grad_sums
    from ._device import (
        architecture,
        dot_precision,
        gpu_slug,
        interpreting,
        pretend_architecture,
        shared_memory_limit,
    )
    from ._launch import (
        KernelError,
        compile_offline,
        layout_key,
        recall,
        record_launches,
        remember,
        separate_launches,
    )
    from ._tf32 import multiplies_in_tf32
    from ._tiles import (
        Tile,
        candidates,
        choose_tile,
        forget_tiles,
        keep_tile,
        operations,
        override_tile,
        record_problems,
        source_digest,
        whole_digest,
    )
    from .conv2d import conv2d_forward, conv2d_grad_input, conv2d_grad_weight, parallel_conv2d_forward
    from .conv_transpose2d import (
        conv_transpose2d_forward,
        conv_transpose2d_grad_input,
        conv_transpose2d_grad_weight,
    )
    from .dense_crf import (
        ExactPairs,
        Message,
        Packed,
        Permutohedral,
        build_exact,
        build_permutohedral,
        exact_filter,
        exact_grad_features,
        exact_pack,
        exact_unpack,
        is_split,
        mean_field_update,
        packed_width,
        permutohedral_blur,
        permutohedral_slice,
        spatial_gaussian,
    )
    from .packed_pool2d import packed_max_pool2d, packed_max_unpool2d, packed_max_unpool2d_backward
    from .segmentation_head import (
        softmax_expectation,
        upsample_argmax,
        upsample_dice_sums,
        upsample_grad_logits,
        upsample_softmax_forward,
    )
    from .separable_conv2d import (
        depthwise_conv2d_forward,
        depthwise_conv2d_grad_input,
        depthwise_conv2d_grad_weight,
        separable_conv2d_forward,
    )

    __all__ = [
        "ExactPairs",
        "KernelError",
        "Message",
        "Packed",
        "Permutohedral",
        "Tile",
        "architecture",
        "batch_norm_apply",
        "batch_norm_grad_input",
        "batch_norm_grad_sums",
        "batch_norm_statistics",
        "build_exact",
        "build_permutohedral",
        "candidates",
        "choose_tile",
        "compile_offline",
        "conv2d_forward",
        "conv2d_grad_input",
        "conv2d_grad_weight",
        "conv_transpose2d_forward",
        "conv_transpose2d_grad_input",
        "conv_transpose2d_grad_weight",
        "depthwise_conv2d_forward",
        "depthwise_conv2d_grad_input",
        "depthwise_conv2d_grad_weight",
        "dot_precision",
        "exact_filter",
        "exact_grad_features",
        "exact_pack",
        "exact_unpack",
        "forget_tiles",
        "gpu_slug",
        "interpreting",
        "is_split",
        "keep_tile",
        "layout_key",
        "mean_field_update",
        "multiplies_in_tf32",
        "operations",
        "override_tile",
        "packed_max_pool2d",
        "packed_max_unpool2d",
        "packed_max_unpool2d_backward",
        "packed_width",
        "parallel_conv2d_forward",
        "permutohedral_blur",
        "permutohedral_slice",
        "pretend_architecture",
        "recall",
        "record_launches",
        "record_problems",
        "remember",
        "separable_conv2d_forward",
        "separate_launches",
        "shared_memory_limit",
        "softmax_expectation",
        "source_digest",
        "spatial_gaussian",
        "upsample_argmax",
        "upsample_dice_sums",
        "upsample_grad_logits",
        "upsample_softmax_forward",
        "whole_digest",
    ]
