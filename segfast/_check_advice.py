"""The commands and arguments that may make a checked model faster still, in a sentence each."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ._check import CheckResult


def advice(found: "CheckResult") -> str:
    """Sentences on what to try next; empty where nothing is known to gain more."""
    return " ".join(_on_gpu(found) if found.device.type == "cuda" else _on_cpu(found))


def cpu_has_bfloat16() -> bool:
    """True where this CPU multiplies in bfloat16 by instructions of its own: AMX or AVX512-BF16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _on_gpu(found: "CheckResult") -> list[str]:
    reasons = [decision.reason for decision in found.decisions]
    alone = found.report.fused and not found.decisions  # as where nothing is known of the GPU
    if alone or any(" not proven on this GPU" in reason for reason in reasons):
        return ["`segfast doctor --prove`, then `segfast tune`, let more kernels run on this GPU."]
    if any(" was not measured for this shape" in reason for reason in reasons):
        return ["`segfast tune` measures on this GPU where more kernels are faster."]
    return []


def _on_cpu(found: "CheckResult") -> list[str]:
    if found.train:
        why = "On a CPU it is measured for inference alone what runs a layer: try it without --train."
        return [] if found.worth_it else [why]
    sentences = []
    gain = found.report.gain
    if gain is not None and gain.unmeasured:
        sentences.append(f"{gain.unmeasured} calls are not measured yet; run again, it goes on with them.")
    if found.compute is None and found.dtype == torch.float32 and cpu_has_bfloat16():
        which = "`--compute bfloat16`, segfast.optimize's dtype=torch.bfloat16,"
        sentences.append(f"{which} may gain {'more' if found.worth_it else 'something'} on this CPU.")
    faster = found.in_channels_last
    if not found.worth_it and faster is not None:
        which = "`model.to(memory_format=torch.channels_last)` alone"
        sentences.append(f"{which} is {faster:.2f}x as fast as the layout given.")
    return sentences
