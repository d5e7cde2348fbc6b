"""Sums of split-K partial results, in a fixed order."""

import torch
import triton
import triton.language as tl

from ._launch import Launch, launch_for, layout_key
from ._tiles import Tile


@triton.jit
def _reduce_partials_kernel(partials_ptr, out_ptr, numel, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = offsets < numel
    total = tl.zeros((BLOCK,), tl.float32)
    pointers = partials_ptr + offsets
    for _ in tl.range(0, SPLIT):
        total += tl.load(pointers, mask=ok, other=0.0)
        pointers += numel
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=ok)


def reduce_partials(partials: torch.Tensor, out: torch.Tensor) -> None:
    """out = partials.sum(0): partials [SPLIT, ...] fp32, out dense in memory, in the order of partials[0]."""
    key = ("reduce_partials", out.device, layout_key(partials, out))

    def make() -> Launch:
        constants = {"SPLIT": partials.shape[0], "BLOCK": 1024}
        return Launch(
            _reduce_partials_kernel,
            (triton.cdiv(out.numel(), 1024),),
            (out.numel(),),
            constants,
            Tile(1, 1024, 1, 4, 2),
        )

    launch_for(key, make)(partials, out)
