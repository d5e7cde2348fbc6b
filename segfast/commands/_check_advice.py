"""The commands and arguments that may make a checked model faster still, in a sentence each."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .check import CheckResult


def advice(found: "CheckResult") -> str:
    """Sentences on what to try next; empty where nothing is known to gain more."""
    on_gpu = found.device.type == "cuda"
    if found.train and not on_gpu:
        why = "On a CPU it is measured for inference alone what runs a layer: try it without --train."
        return "" if found.worth_it or found.left_as_it_was else why
    sentences = []
    gain = found.report.gain
    if gain is not None and gain.unmeasured:
        sentences.append(f"{gain.unmeasured} calls are not measured yet; run again, it goes on with them.")
    if found.compute is None and not found.train and found.dtype == torch.float32 and _has_bfloat16(on_gpu):
        which = "`--compute bfloat16`, segfast.optimize's dtype=torch.bfloat16,"
        where = "GPU" if on_gpu else "CPU"
        sentences.append(f"{which} may gain {'more' if found.worth_it else 'something'} on this {where}.")
    if on_gpu and gain is not None:
        train = " --train" if found.train else ""
        sentences.append(f"`segfast tune{train}` tries more tiles of each kernel.")
    faster = found.in_channels_last
    if not found.worth_it and faster is not None:
        which = "`model.to(memory_format=torch.channels_last)` alone"
        sentences.append(f"{which} is {faster:.2f}x as fast as the layout given.")
    return " ".join(sentences)


def _has_bfloat16(on_gpu: bool) -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_has_bfloat16()


def cpu_has_bfloat16() -> bool:
    """True where this CPU multiplies in bfloat16 by instructions of its own: AMX or AVX512-BF16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
