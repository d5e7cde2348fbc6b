"""The error rule: a kernel may be off by twice what ATen in the same dtype is, plus what rounding and summation order cost."""

import torch


def assert_close_to_reference(actual, reference, aten, magnitude, depth, what=""):
    """|actual - reference| <= 2 |aten - reference| + eps(dtype) max|reference| + 2**-24 sqrt(depth) max(magnitude).

    Args:
        actual: the kernel's result.
        reference: the same in fp64.
        aten: ATen's result in the kernel's dtype.
        magnitude: the operation on absolute values, in fp64 (`|x| conv |w|`): the scale of cancelling terms.
        depth: terms summed for one output.
    """
    assert actual.shape == reference.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    assert actual.dtype == aten.dtype, f"{what}: dtype {actual.dtype}, expected {aten.dtype}"
    if reference.numel() == 0:
        return
    error = (actual.double() - reference).abs().max().item()
    allowed = (
        2 * (aten.double() - reference).abs().max().item()
        + torch.finfo(actual.dtype).eps * reference.abs().max().item()
        + 2**-24 * depth**0.5 * magnitude.abs().max().item()
    )
    # `not <=` rather than `>`: NaN must fail.
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
