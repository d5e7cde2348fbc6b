"""A kernel that does not compile or launch: under "auto" ATen computes instead, and one warning says so."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

from ._backend import FAILED, get_backend
from ._operands import load_kernels


def give_up(operation: str, error: RuntimeError) -> None:
    """Leave `operation` to ATen in this process, and warn once; call it in an `except` clause.

    Raises:
        RuntimeError: `error` itself, if it is no kernel's, or if "triton" was asked for by name.
    """
    if get_backend() == "triton" or not isinstance(error, load_kernels().KernelError):
        raise error
    if operation not in FAILED:
        FAILED[operation] = str(error)
        warnings.warn(
            f"segfast: {error}. From here on {operation} is computed by ATen in this process. "
            "Please report this with what `segfast doctor` prints.",
            RuntimeWarning,
            stacklevel=2,
        )


def falls_back(operation: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that asks `use_triton` itself: where a kernel fails, it is called once more."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                give_up(operation, error)
                return function(*args, **kwargs)

        return call

    return decorate
