"""Whole networks against their plain torch.nn twins."""

import pytest
import torch

from benchmarks.cases import MODELS
from benchmarks.suite import make_trial

# On a CPU both batches are the same case, and training that of one network.
ON_GPU = torch.cuda.is_available()
FORWARD = [case for case in MODELS if ON_GPU or case["n"] == 8]
TRAINED = [case.replace(direction="train") for case in FORWARD if ON_GPU or case["model"] == "unet"]


@pytest.mark.parametrize("case", FORWARD + TRAINED, ids=lambda case: f"{case.name}-{case.direction}")
def test_models(compare, case):
    size = case if compare.device.type == "cuda" else case.cpu()
    try:
        trial = make_trial(size, compare.device)
    except LookupError as error:
        pytest.skip(str(error))
    compare(case, trial)
