"""Points in the order of a Hilbert curve through their features, so that a tile of neighbors is small there.

Skilling, "Programming the Hilbert curve" (2004). One 64-bit key a point, and one sort an image.
"""

import torch
import triton
import triton.language as tl

from .._launch import Launch, launch_for, layout_key
from .._tiles import Tile

# The edge of the curve's cells in standard deviations, unless the features span more cells than a key tells
# apart.
_CELL = 0.25


@triton.jit
def _with_element(x, AT: tl.constexpr, value, D: tl.constexpr):
    changed = ()
    for k in tl.static_range(D):
        if k == AT:
            changed = changed + (value,)
        else:
            changed = changed + (x[k],)
    return changed


@triton.jit
def _hilbert_keys_kernel(
    features_ptr, low_ptr, per_unit_ptr, key_ptr,
    POINTS, N,
    D: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = row < POINTS
    image = row // N
    per_unit = tl.load(per_unit_ptr + image, mask=ok, other=0.0)
    x = ()
    for d in tl.static_range(D):
        feature = tl.load(features_ptr + row * D + d, mask=ok, other=0.0)
        low = tl.load(low_ptr + image * D + d, mask=ok, other=0.0)
        cell = tl.minimum(tl.maximum((feature - low) * per_unit, 0.0), (1 << BITS) - 1.0)
        # Of NaN any key will do, but one that fits.
        x = x + (cell.to(tl.int32) & ((1 << BITS) - 1),)

    # Undo the excess work of the curve's rotations, from the highest bit down.
    for step in tl.static_range(BITS - 1):
        for i in tl.static_range(D):
            chosen = (x[i] & (1 << (BITS - 1 - step))) != 0
            first = tl.where(chosen, x[0] ^ ((1 << (BITS - 1 - step)) - 1), x[0])
            if i > 0:
                exchanged = tl.where(chosen, 0, (first ^ x[i]) & ((1 << (BITS - 1 - step)) - 1))
                x = _with_element(x, i, x[i] ^ exchanged, D)
                first = first ^ exchanged
            x = _with_element(x, 0, first, D)
    # Gray code.
    for i in tl.static_range(1, D):
        x = _with_element(x, i, x[i] ^ x[i - 1], D)
    parity = tl.zeros_like(x[0])
    for step in tl.static_range(BITS - 1):
        turned = (x[D - 1] & (1 << (BITS - 1 - step))) != 0
        parity = tl.where(turned, parity ^ ((1 << (BITS - 1 - step)) - 1), parity)
    key = tl.zeros((BLOCK,), tl.int64)
    for step in tl.static_range(BITS):
        for i in tl.static_range(D):
            bit = ((x[i] ^ parity) >> (BITS - 1 - step)) & 1
            key = (key << 1) | bit.to(tl.int64)
    tl.store(key_ptr + row, key, mask=ok)


def hilbert_keys(features: torch.Tensor) -> torch.Tensor:
    """int64 [B, N]: each point's place on the curve. features: fp32 [B, N, D], dense, D at most 8."""
    batch, points, dim = features.shape
    bits = min(10, 62 // dim)
    low, high = features.amin(1), features.amax(1)
    per_unit = ((1 << bits) - 1) / (high - low).amax(1).clamp_(min=_CELL * ((1 << bits) - 1))
    keys = torch.empty((batch, points), dtype=torch.int64, device=features.device)

    def make() -> Launch:
        constants = {"D": dim, "BITS": bits, "BLOCK": 256}
        scalars = (batch * points, points)
        grid = (triton.cdiv(batch * points, 256),)
        return Launch(_hilbert_keys_kernel, grid, scalars, constants, Tile(256, 1, 1, 4, 1))

    launch_for(("hilbert_keys", features.device, layout_key(features)), make)(features, low, per_unit, keys)
    return keys
