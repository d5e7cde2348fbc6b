"""The ceilings of the device at hand, measured: copy, matrix product, L2 reads, exp2, clock under load.

On a CPU (a dry run) the same names come from small torch calls, so that the rest has numbers to divide by.
"""

from statistics import median

import torch

from segfast._profile.roof import copy_rate, matmul_rate, seconds

COPY_BYTES = 2 << 30
MATRIX = 8192
L2_BYTES = 16 << 20  # fits the L2 of every GPU since the A100
L2_ROUNDS, EXP_ROUNDS, EXP_UNROLL = 256, 128, 16


def ceilings(device: torch.device) -> dict[str, float]:
    """copy_gbs, bf16_tflops, tf32_tflops, fp32_tflops, l2_gbs, exp2_gops, sm_mhz (CUDA only)."""
    if device.type != "cuda":
        return _cpu()
    found = {"copy_gbs": 1e-9 * copy_rate(device, COPY_BYTES)}
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        for name, dtype, fp32 in (
            ("bf16_tflops", torch.bfloat16, precision),
            ("tf32_tflops", torch.float32, "tf32"),
            ("fp32_tflops", torch.float32, "ieee"),
        ):
            torch.backends.cuda.matmul.fp32_precision = fp32
            found[name] = 1e-12 * matmul_rate(device, MATRIX, dtype)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    found["sm_mhz"] = _clock_mhz()
    found["l2_gbs"] = _l2_read(device)
    found["exp2_gops"] = _exp2(device)
    return found


def _cpu() -> dict[str, float]:
    device = torch.device("cpu")
    matmul = 1e-12 * matmul_rate(device, 128, torch.float32)
    exponents = torch.rand(1 << 16)
    return {
        "copy_gbs": 1e-9 * copy_rate(device, 1 << 24),
        "bf16_tflops": matmul,
        "tf32_tflops": matmul,
        "fp32_tflops": matmul,
        "l2_gbs": 1e-9 * copy_rate(device, 1 << 20),
        "exp2_gops": 1e-9 * exponents.numel() / median(seconds(lambda: torch.exp2(exponents), device)),
    }


def _clock_mhz(cycles: int = 20_000_000) -> float:
    """The multiprocessors' clock, from a kernel that spins for a number of cycles."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * cycles / begin.elapsed_time(end)


def _l2_read(device: torch.device) -> float:
    """GB/s of reads that pass the L1 by, out of a buffer that stays in L2."""
    from benchmarks import _peak_kernels

    block = 4096
    data = torch.randn(L2_BYTES // 4, device=device)
    programs = 8 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs, device=device)

    def run() -> None:
        _peak_kernels.l2_read[(programs,)](
            data, out, data.numel() // block, L2_ROUNDS, BLOCK=block, num_warps=4
        )

    return 1e-9 * programs * L2_ROUNDS * block * 4 / median(seconds(run, device))


def _exp2(device: torch.device) -> float:
    """1e9 exp2 a second, of a kernel that does little else."""
    from benchmarks import _peak_kernels

    block = 1024
    programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    data = torch.rand(programs * block, device=device)

    def run() -> None:
        _peak_kernels.exp2[(programs,)](data, EXP_ROUNDS, BLOCK=block, UNROLL=EXP_UNROLL, num_warps=4)

    return 1e-9 * data.numel() * EXP_ROUNDS * EXP_UNROLL / median(seconds(run, device))
