"""Whole networks of torchvision, smp and segfast: `segfast.optimize` beside eager, torch.compile and bf16.

With --benchmark each network is measured at both sizes, on a CPU with one thread and with all. That takes
hours; every network's rows are appended to out/benchmark/measured.csv as they come, and `-k` picks some:
`python -m pytest --benchmark benchmarks/test_bench_networks.py -k "smp_unet and 256_1t"`. Where
SEGFAST_BENCH_COMPILE is 1, torch.compile is measured at the larger size too, where it is 0 nowhere.
Without --benchmark a few networks are compared, on small images, and nothing is compiled.
"""

import pytest
import torch

from benchmarks.crf_peers import core_count
from benchmarks.network_trial import NetworkTrial, compile_wanted
from benchmarks.networks import TINY, network_case, network_cases
from benchmarks.suite import candidates

SECONDS = 20.0  # of timing, each case
COMPARED = ("torchvision_lraspp_mobilenet_v3_large", "smp_unet_resnet34", "segfast_selfie_segmenter")


def pytest_generate_tests(metafunc):
    if metafunc.config.getoption("--benchmark"):
        found = list(network_cases(core_count(), torch.cuda.is_available()))
    else:
        found = [network_case(name, TINY) for name in COMPARED]
    metafunc.parametrize("case", found, ids=lambda case: case.name)


@pytest.fixture
def threads(case):
    """So many as the case says."""
    before = torch.get_num_threads()
    torch.set_num_threads(core_count() if case["threads"] == "all" else 1)
    yield
    torch.set_num_threads(before)


def test_networks(compare, threads, case):
    """Every candidate must give the network's scores before any is timed; no test fails for a time."""
    try:
        trial = NetworkTrial(case, compare.device)
    except LookupError as error:
        pytest.skip(str(error))
    compiled = compare.proper and compile_wanted(case)
    compare(case, trial, candidates(trial, compiled=compiled), seconds=SECONDS)
