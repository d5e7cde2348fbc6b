"""The short form of the report, for `segfast demo`: forward rows, a fraction of a second each.

Needs neither pytest nor a GPU.
"""

from pathlib import Path

import torch

from benchmarks.cases import CASES, MODELS, is_crf
from benchmarks.environment import environment
from benchmarks.rows import make_row
from benchmarks.suite import candidates, make_trial, measure_trial, timing_device, write_outputs

SECONDS = 0.3  # of timing, each case


def quick_report(folder: Path, device: torch.device) -> Path:
    """Measure the written families and U-Net beside their peers; write the report into `folder`.

    On a GPU in the papers' sizes, on a CPU small. Takes about 20 seconds. Returns the report's path.
    """
    threads, device = torch.get_num_threads(), timing_device(device)
    columns, rows = environment(device), []
    cases = [case for case in CASES if "quick" in case.uses]
    if device.type == "cuda":
        # What a full-size CRF is held to takes seconds.
        cases = [case for case in cases if not is_crf(case)]
    cases += [case for case in MODELS if case["model"] == "unet"]
    for case in cases:
        trial = make_trial(case if device.type == "cuda" else case.cpu(), device)
        found = measure_trial(trial, candidates(trial), budget_s=SECONDS, min_rounds=5)
        rows += [make_row("quick", trial.case, result, {}, columns, False) for result in found]
    torch.set_num_threads(threads)
    print(write_outputs(rows, folder))
    return folder / "report.html"
