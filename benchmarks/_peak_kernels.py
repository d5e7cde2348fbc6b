"""Triton kernels that measure a device rather than compute something. Imported only where there is a GPU."""

import triton
import triton.language as tl


@triton.jit
def l2_read(data_ptr, out_ptr, blocks, rounds, BLOCK: tl.constexpr):
    """Each program reads `rounds` blocks of the buffer, a prime stride apart, past the L1."""
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(rounds):
        block = (program * 17 + i * 61) % blocks
        total += tl.load(data_ptr + block * BLOCK + offsets, cache_modifier=".cg")
    tl.store(out_ptr + program, tl.sum(total, 0))


@triton.jit
def exp2(data_ptr, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """x -> exp2(-x), over and over: it converges, and the sign costs no instruction."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(data_ptr + offsets)
    for _ in range(rounds):
        for _ in tl.static_range(UNROLL):
            x = tl.exp2(-x)
    tl.store(data_ptr + offsets, x)
