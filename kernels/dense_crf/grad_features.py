"""The exact filter's gradient in the features.

With L = sum_i g_i (K v)_i it is dL/df_i = -sum_j s_ij k_ij (f_i - f_j), s_ij = g_i v_j + v_i g_j. One
product more than the filter makes s, of [g, v] and [v, g] side by side; the last product's columns are the
features in halves of fp16 and a one, so that both sums come of it: sum_j s_ij k_ij f_j and sum_j s_ij k_ij.
The pairs left out are the filter's.
"""

import torch
import triton
import triton.language as tl

from .._tiles import register_candidates
from .exact import ExactPairs, _kernel_values, _store_sums, _work_unit, filter_candidates, tile_sums
from .pack import exact_pack, exact_unpack
from .sorted_points import SCALE

OPERATION = "gaussian_grad_features"
_MOST_CHANNELS = 64  # at a time: more would spill
_LARGEST = 2.0**15  # of a feature in halves of fp16


@triton.jit
def _gaussian_grad_features_kernel(
    a_ptr, b_ptr, g_ptr, left_ptr, right_ptr, points_ptr, out_ptr, partial_ptr,
    list_ptr, units_ptr, outgrown_ptr,
    N, ROW_TILES, TILES, UNITS, PADDED,
    D: tl.constexpr, DEPTH: tl.constexpr, DIRECT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    wanted, row_tile, begin, end, slot = _work_unit(units_ptr, outgrown_ptr, unit, UNITS, DIRECT)
    if wanted:
        n = tl.arange(0, BLOCK_N)
        c = tl.arange(0, BLOCK_C)
        f = tl.arange(0, BLOCK_F)
        row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        a = tl.load(a_ptr + row[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :])
        left = tl.load(left_ptr + row[:, None] * BLOCK_C + c[None, :])
        first = (row_tile // ROW_TILES) * TILES
        list_ptr += row_tile * TILES
        acc = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        for t in tl.range(begin, end, num_stages=STAGES):
            local = tl.load(list_ptr + t).to(tl.int64)
            start = (first + local) * BLOCK_N
            p = _kernel_values(a, b_ptr, g_ptr, row, start, N - local * BLOCK_N, PADDED, D, DEPTH, DIRECT,
                               BLOCK_N)  # fmt: skip
            right = tl.load(right_ptr + start * BLOCK_C + (n[:, None] * BLOCK_C + c[None, :]))
            p *= tl.dot(left, tl.trans(right))
            points = tl.load(points_ptr + start * BLOCK_F + (n[:, None] * BLOCK_F + f[None, :]))
            acc = tl.dot(p.to(tl.float16), points, acc)
        _store_sums(out_ptr, partial_ptr, row_tile, slot, acc, BLOCK_M, BLOCK_F)


register_candidates(OPERATION, filter_candidates)


def exact_grad_features(pairs: ExactPairs, grad: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """fp32 [B, N, D]: the gradient of sum(grad * (K values)) in the features that `build_exact` was given.

    grad, values: fp32 [B, N, C], dense.
    """
    # Half precision holds values in units of their channel's largest, which a channel of grad is then times,
    # and that in units of the largest of all: channels compare as they do in the sum s.
    tiny = torch.finfo(grad.dtype).tiny
    size = values.abs().amax(1, keepdim=True).clamp_(min=tiny)
    values, grad = values / size, grad * size
    most = grad.abs().amax((1, 2), keepdim=True).clamp_(min=tiny)
    grads, parts = (t.split(_MOST_CHANNELS, 2) for t in (grad / most, values))
    # Columns: the features' first halves, their second halves, ones.
    dim = pairs.dim
    unit = (pairs.g.abs().amax(1, keepdim=True) / _LARGEST).clamp_(min=1.0)
    g = pairs.g / unit
    high = g.half()
    low = (g - high).half()
    width = 16 if 2 * dim < 16 else 32
    points = torch.zeros((pairs.padded, width), dtype=torch.float16, device=grad.device)
    points[:, :dim], points[:, dim : 2 * dim], points[:, 2 * dim] = high.T, low.T, 1.0
    sums = torch.stack([_sums(pairs, *both, points) for both in zip(grads, parts, strict=True)]).sum(0)
    pull = sums[..., :dim] + sums[..., dim : 2 * dim]
    own = g[:, pairs.rows.long().flatten()].T.reshape(pairs.batch, pairs.points, dim)
    return (pull - own * sums[..., 2 * dim : 2 * dim + 1]) * (most / SCALE * unit.view(1, 1, dim))


def _sums(pairs: ExactPairs, grad: torch.Tensor, values: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """fp32 [B, N, 2 D + 1]: sum_j s_ij k_ij points_j."""
    left = exact_pack(pairs, torch.cat([grad, values], 2), split=False)
    right = exact_pack(pairs, torch.cat([values, grad], 2), split=False)
    width = points.shape[1]
    out = tile_sums(
        pairs, OPERATION, _gaussian_grad_features_kernel, width, left, right, points, BLOCK_F=width
    )
    return exact_unpack(pairs, out, 2 * pairs.dim + 1, split=False)
