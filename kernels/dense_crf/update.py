"""One mean-field update of every pixel: energies, the messages of up to two kernels, their compatibilities.

q = softmax(-unary - sum of compatibility(message)) over the labels, for a block of pixels at a time. A
message is read where its filter left it: in raster order, in the exact filter's order, or as vertices of the
lattice, whose interpolation happens here. q is written as the next filters want it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._device import bounded, fp32_precision
from .._launch import Launch, launch_for, layout_key
from .._tiles import Problem, Tile, choose_tile, register_candidates
from .pack import is_split


class Message(NamedTuple):
    """A filter's message and its compatibility: fp32, in one of three forms.

    "raster": values [B, N, L]. "gathered": values [rows, CV] of labels packed as `exact_pack` does, row index
    [B, N] for each pixel. "lattice": values [vertices, L], index and weights [B, N, D + 1]. `after` [B, N]
    scales the messages. A number w as the compatibility adds w message to the logits, a vector [L] subtracts
    its product with the message, a matrix [L, L] subtracts message @ matrix.T; contiguous, fp32.
    """

    kind: str
    values: torch.Tensor
    index: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    after: torch.Tensor | None = None
    compatibility: float | torch.Tensor = 1.0


class Packed(NamedTuple):
    """q as the exact filter takes it: row index [B, N] of values fp16 [rows, CV] is before [B, N] times q.

    In two halves if `is_split`, as `exact_pack` packs them.
    """

    values: torch.Tensor
    index: torch.Tensor
    before: torch.Tensor | None = None


@triton.jit
def _message(
    values_ptr, index_ptr, weights_ptr, after_ptr, row, row_ok, c,
    KIND: tl.constexpr, VERTICES: tl.constexpr, COLUMNS: tl.constexpr, READ: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    # Columns c of the messages to the pixels `row`. Of the COLUMNS of a row of values the first READ count,
    # and as many from SECOND on, if there are second halves.
    ok = row_ok[:, None] & (c < READ)[None, :]
    if KIND == "lattice":
        total = tl.zeros((row.shape[0], c.shape[0]), tl.float32)
        for k in tl.static_range(VERTICES):
            vertex = tl.load(index_ptr + row * VERTICES + k, mask=row_ok, other=0).to(tl.int64)
            weight = tl.load(weights_ptr + row * VERTICES + k, mask=row_ok, other=0.0)
            values = tl.load(values_ptr + (vertex * COLUMNS)[:, None] + c[None, :], mask=ok, other=0.0)
            total += weight[:, None] * values
    else:
        if KIND == "gathered":
            at = tl.load(index_ptr + row, mask=row_ok, other=0).to(tl.int64)
        else:
            at = row
        place = values_ptr + (at * COLUMNS)[:, None] + c[None, :]
        total = tl.load(place, mask=ok, other=0.0)
        if SECOND > 0:
            total += tl.load(place + SECOND, mask=ok, other=0.0)
    if after_ptr is not None:
        total *= tl.load(after_ptr + row, mask=row_ok, other=0.0)[:, None]
    return total


@triton.jit
def _subtract_energy(
    logits, values_ptr, index_ptr, weights_ptr, after_ptr, compatibility_ptr, potts, row, row_ok, c,
    KIND: tl.constexpr, VERTICES: tl.constexpr, COLUMNS: tl.constexpr, READ: tl.constexpr,
    SECOND: tl.constexpr, COMPATIBILITY: tl.constexpr, LABELS: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if COMPATIBILITY == "matrix":
        # Some labels of the message at a time: each is read once, and little of the matrix is on the way.
        for start in tl.range(0, LABELS, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            message = _message(values_ptr, index_ptr, weights_ptr, after_ptr, row, row_ok, k,
                               KIND, VERTICES, COLUMNS, READ, SECOND)  # fmt: skip
            ok = (k < LABELS)[:, None] & (c < LABELS)[None, :]
            energies = tl.load(compatibility_ptr + k[:, None] + (c * LABELS)[None, :], mask=ok, other=0.0)
            logits = tl.dot(-message, energies, logits, input_precision=PRECISION)
    elif KIND != "":
        message = _message(values_ptr, index_ptr, weights_ptr, after_ptr, row, row_ok, c,
                           KIND, VERTICES, COLUMNS, READ, SECOND)  # fmt: skip
        if COMPATIBILITY == "vector":
            energies = tl.load(compatibility_ptr + c, mask=c < LABELS, other=0.0)
            logits -= energies[None, :] * message
        else:
            logits += potts * message
    return logits


@triton.jit
def _mean_field_update_kernel(
    unary_ptr,
    values0_ptr, index0_ptr, weights0_ptr, after0_ptr, compatibility0_ptr,
    values1_ptr, index1_ptr, weights1_ptr, after1_ptr, compatibility1_ptr,
    q_ptr, packed_ptr, packed_index_ptr, before_ptr, output_ptr,
    pixels, width, blocks, potts0, potts1,
    stride_un, stride_uc, stride_uh, stride_uw, stride_on, stride_oc, stride_oh, stride_ow,
    KIND0: tl.constexpr, VERTICES0: tl.constexpr, COLUMNS0: tl.constexpr, READ0: tl.constexpr,
    SECOND0: tl.constexpr, COMPATIBILITY0: tl.constexpr,
    KIND1: tl.constexpr, VERTICES1: tl.constexpr, COLUMNS1: tl.constexpr, READ1: tl.constexpr,
    SECOND1: tl.constexpr, COMPATIBILITY1: tl.constexpr,
    LABELS: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    image = (pid // blocks).to(tl.int64)
    pixel = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_ok = pixel < pixels
    y = (pixel // width).to(tl.int64)
    x = (pixel % width).to(tl.int64)
    row = image * pixels + pixel
    c = tl.arange(0, BLOCK_C)
    is_label = (c < LABELS)[None, :]
    ok = pixel_ok[:, None] & is_label
    wide_c = c.to(tl.int64)

    place = unary_ptr + image * stride_un + y * stride_uh + x * stride_uw
    logits = -tl.load(place[:, None] + (wide_c * stride_uc)[None, :], mask=ok, other=0.0).to(tl.float32)
    logits = _subtract_energy(
        logits, values0_ptr, index0_ptr, weights0_ptr, after0_ptr, compatibility0_ptr, potts0, row, pixel_ok,
        c, KIND0, VERTICES0, COLUMNS0, READ0, SECOND0, COMPATIBILITY0, LABELS, BLOCK_K, PRECISION,
    )  # fmt: skip
    logits = _subtract_energy(
        logits, values1_ptr, index1_ptr, weights1_ptr, after1_ptr, compatibility1_ptr, potts1, row, pixel_ok,
        c, KIND1, VERTICES1, COLUMNS1, READ1, SECOND1, COMPATIBILITY1, LABELS, BLOCK_K, PRECISION,
    )  # fmt: skip

    # As torch.softmax: where every logit is -inf, one is +inf or NaN, the pixel's probabilities are NaN.
    logits = tl.where(is_label, logits, float("-inf"))
    q = tl.exp(logits - tl.max(logits, 1)[:, None])
    q = q / tl.sum(q, 1)[:, None]
    if q_ptr is not None:
        tl.store(q_ptr + (row * LABELS)[:, None] + c[None, :], q, mask=ok)
    if output_ptr is not None:
        place = output_ptr + image * stride_on + y * stride_oh + x * stride_ow
        tl.store(place[:, None] + (wide_c * stride_oc)[None, :], q.to(output_ptr.dtype.element_ty), mask=ok)
    if packed_ptr is not None:
        at = tl.load(packed_index_ptr + row, mask=pixel_ok, other=0).to(tl.int64)
        if before_ptr is not None:
            q *= tl.load(before_ptr + row, mask=pixel_ok, other=0.0)[:, None]
        # The columns between the labels and the filter's are zero, of NaN pixels too.
        q = tl.where(is_label, q, 0.0)
        high = q.to(tl.float16)
        place = packed_ptr + (at * PACKED)[:, None] + c[None, :]
        if SPLIT:
            half = (c < PACKED // 2)[None, :] & pixel_ok[:, None]
            tl.store(place, high, mask=half)
            tl.store(place + PACKED // 2, (q - high.to(tl.float32)).to(tl.float16), mask=half)
        else:
            tl.store(place, high, mask=pixel_ok[:, None])


def _candidates(problem: Problem, arch: str) -> list[Tile]:
    """Pixels x labels at a time, and of a matrix the labels of a step; a dot takes 16 of each at least."""
    labels = problem.columns
    matrix = problem.variant.endswith("-matrix")
    least, depth = (16, min(32, labels)) if matrix else (1, 1)
    # The lattice's vertices are gathered all at once.
    sizes = [(1024, 4), (2048, 8), (2048, 4)] if "lattice" in problem.variant else [(2048, 4), (1024, 4)]
    sizes += [(4096, 4), (4096, 8)]
    found = [Tile(max(least, size // labels), labels, depth, warps, 1) for size, warps in sizes]
    return list(dict.fromkeys(found))


register_candidates("mean_field_update", _candidates)


def mean_field_update(
    unary: torch.Tensor,
    messages: tuple[Message, ...] = (),
    *,
    q: torch.Tensor | None = None,
    packed: Packed | None = None,
    output: torch.Tensor | None = None,
) -> None:
    """q = softmax(-unary - sum of the messages' energies), written to those of the three that are given.

    unary [B, L, H, W] of any strides, L <= 256; up to two messages. q fp32 [B, N, L] contiguous, N = H W.
    packed: see `Packed`; of its rows those of pixels are written whole, padding columns zero. output as
    unary in shape and dtype, of any strides.
    """
    none = Message("", unary)
    first, second = (*messages, none, none)[:2]
    index, before = (None, None) if packed is None else packed[1:]
    pointers = (
        unary,
        *_pointers(first),
        *_pointers(second),
        q,
        None if packed is None else packed.values,
        index,
        before,
        output,
    )
    numbers = tuple(_potts(message) for message in (first, second))
    key = ("mean_field_update", unary.device, first.kind, second.kind, numbers, layout_key(*pointers))

    def make() -> Launch:
        batch, labels, height, width = unary.shape
        pixels = height * width
        constants = _constants(first, labels, "0") | _constants(second, labels, "1")
        matrix = "matrix" in (constants["COMPATIBILITY0"], constants["COMPATIBILITY1"])
        columns = triton.next_power_of_2(labels)
        split = is_split(labels)
        if packed is not None:
            columns = max(columns, packed.values.shape[1] // (1 + split))
        if matrix:
            columns = max(columns, 16)
        problem = Problem(
            "mean_field_update", labels, labels, 1, 1, unary.dtype, batch * pixels,
            rows=batch * pixels, columns=columns, depth=labels,
            variant="-lattice" * ("lattice" in (first.kind, second.kind)) + "-matrix" * matrix,
        )  # fmt: skip
        tile = choose_tile(problem, unary.device)
        strides = [_line(t, width) for t in (unary, output)]
        # Where rows follow each other without a gap, an image is one long row: neighbors are seen as such.
        if all(lined for lined, _ in strides):
            width = max(1, pixels)
        blocks = triton.cdiv(pixels, tile.block_m)
        scalars = (pixels, width, blocks, *numbers, *strides[0][1], *strides[1][1])
        constants |= {
            "LABELS": labels,
            "PACKED": 0 if packed is None else packed.values.shape[1],
            "SPLIT": split,
            "PRECISION": fp32_precision(),
            "BLOCK_M": tile.block_m,
            "BLOCK_C": columns,
            "BLOCK_K": tile.block_k,
        }
        launch = Launch(_mean_field_update_kernel, (batch * blocks,), scalars, constants, tile)
        return bounded(launch, unary.device, 255 if matrix else 168)

    launch_for(key, make)(*pointers)


def _pointers(message: Message) -> tuple[torch.Tensor | None, ...]:
    if message.kind == "":
        return (None,) * 5
    matrix = message.compatibility if isinstance(message.compatibility, torch.Tensor) else None
    return message.values, message.index, message.weights, message.after, matrix


def _potts(message: Message) -> float:
    return 0.0 if isinstance(message.compatibility, torch.Tensor) else float(message.compatibility)


def _constants(message: Message, labels: int, which: str) -> dict[str, object]:
    compatibility = message.compatibility
    form = ("number", "vector", "matrix")[
        compatibility.dim() if isinstance(compatibility, torch.Tensor) else 0
    ]
    columns, read, second = labels, labels, 0
    if message.kind == "gathered":
        # Whole groups of columns, which are zero past the labels, so that accesses are wide.
        columns = message.values.shape[1]
        second = columns // 2 if is_split(labels) else 0
        read = min(second or columns, triton.cdiv(labels, 8) * 8)
    return {
        f"KIND{which}": message.kind,
        f"VERTICES{which}": 0 if message.weights is None else message.weights.shape[2],
        f"COLUMNS{which}": columns,
        f"READ{which}": read,
        f"SECOND{which}": second,
        f"COMPATIBILITY{which}": form,
    }


def _line(t: torch.Tensor | None, width: int) -> tuple[bool, tuple[int, ...]]:
    """(True if the pixels of an image [B, L, H, W] are evenly apart, its strides)."""
    if t is None:
        return True, (0, 0, 0, 0)
    return t.shape[2] == 1 or t.stride(2) == width * t.stride(3), t.stride()
