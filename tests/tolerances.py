"""The error rule: twice what ATen in the same dtype is off by.

Plus what rounding and summation order cost.
"""

from segfast.ops._prove import error_and_allowance


def assert_close_to_reference(actual, reference, aten, magnitude, depth, what=""):
    """Hold `actual` to `segfast.ops._prove.error_and_allowance`; the arguments are its own."""
    assert actual.shape == reference.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    )
    assert actual.dtype == aten.dtype, f"{what}: dtype {actual.dtype}, expected {aten.dtype}"
    error, allowed = error_and_allowance(actual, reference, aten, magnitude, depth)
    # Not `error > allowed`: NaN must fail.
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
