"""Proof that the kernels are right on the GPU at hand: every operation and dtype on odd shapes against fp64.

The interpreter and the offline compiler see no race, no misalignment and no bf16 fault; so under "auto" a
kernel runs only on an architecture where this has passed. What is run are the families' cases (`_case.py`).
"""

import importlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import backend
from ._case import Proof, proofs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class ProofRow(NamedTuple):
    """The result of one case."""

    operation: str
    dtype: str
    case: str
    error: float
    allowed: float
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "WRONG"
        figures = f"{self.error:9.2e} <= {self.allowed:9.2e}"
        return f"{self.operation:36} {self.dtype:9} {self.case:28} {figures}  {verdict} {self.note}".rstrip()


def error_and_allowance(
    actual: Tensor, reference: Tensor, aten: Tensor, magnitude: Tensor, depth: int, tf32: bool = False
) -> tuple[float, float]:
    """max|actual - reference| and what it may be.

    Twice ATen's error in the same dtype, plus one rounding of the largest result, plus what fp32 accumulation
    in another order costs: 2 max|aten - ref| + eps(dtype) max|ref| + 2**-24 sqrt(depth) max(magnitude).

    With `tf32`, whose operands are off by up to 2**-11 each, moreover 2**-8 max(magnitude) / sqrt(depth), or
    2**-10 max(magnitude) if that is less: a sum's terms, off by up to 2**-10 each, cancel as random ones do,
    and the largest of many sums has some four standard deviations.
    """
    reference = reference.cpu()
    if reference.numel() == 0:
        return 0.0, 0.0
    error = (actual.detach().cpu().double() - reference).abs().max().item()
    allowed = (
        2 * (aten.detach().cpu().double() - reference).abs().max().item()
        + torch.finfo(actual.dtype).eps * reference.abs().max().item()
        + (2**-24 * depth**0.5 + tf32 * min(2**-8 / depth**0.5, 2**-10)) * magnitude.cpu().abs().max().item()
    )
    return error, allowed


def judge(item: Proof) -> tuple[float, float]:
    """`error_and_allowance` of a case, whose kernels run now."""
    return error_and_allowance(item.actual(), *item[3:])


def prove(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    most: int | None = None,
    families: Sequence[str] | None = None,
    judged: Collection[tuple[str, str, str]] = (),
    begin: Callable[[str, str, str], None] = lambda *key: None,
) -> Iterator[ProofRow]:
    """Run every family's cases on `device`, row by row. An exception in a case is its failed row.

    Args:
        most: for a dry run in the interpreter: so many of each family and dtype, which prove nothing.
        families: all of them if None.
        judged: (operation, dtype, case) of those that are not to be run.
        begin: called with the same three before a case's kernels run.

    Raises:
        DeviceLost: after the row of a case that left the device unusable for this process.
    """
    from . import FAMILIES  # which imports this module

    for family in FAMILIES if families is None else families:
        module = importlib.import_module(f"{__package__}.{family}")
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            with backend("triton"):
                found = itertools.islice(proofs(family, device, dtype), most)
                while True:
                    try:
                        item = next(found, None)
                    except Exception as raised:
                        # A generator that raised is finished: the cases it still had are not proven.
                        for operation in module.OPERATIONS:
                            yield _failed(operation, name, "raised", raised)
                        _check_device(device)
                        break
                    if item is None:
                        break
                    if (item.operation, name, item.case) in judged:
                        continue
                    begin(item.operation, name, item.case)
                    try:
                        # Brings the result to the CPU: a fault in the kernels shows here and not later.
                        error, allowed = judge(item)
                    except Exception as raised:
                        yield _failed(item.operation, name, item.case, raised)
                        _check_device(device)
                    else:
                        yield ProofRow(item.operation, name, item.case, error, allowed, error <= allowed)


class DeviceLost(RuntimeError):
    """A kernel's fault has left the device unusable for this process."""


def _failed(operation: str, dtype: str, case: str, raised: Exception) -> ProofRow:
    return ProofRow(operation, dtype, case, float("nan"), 0.0, False, repr(raised)[:200])


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(str(error)) from error
