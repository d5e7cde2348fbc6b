"""The cost on the host of a call beyond the plain ATen op's, on tiny tensors, in microseconds.

`python -m benchmarks.overhead [ROUNDS]` prints JSON. Our kernels' launches are recorded instead of made:
so it works on CPU tensors under `TRITON_INTERPRET=1`; without that, the way from "auto" to ATen is measured.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import segfast
from segfast._timing import quantiles
from segfast.kernels import interpreting, record_launches

ROUNDS, CALLS = 150, 40
Quantiles = tuple[float, float, float]


def blocks(
    runs: dict[str, Callable[[], object]], rounds: int, between: Callable[[], object] = lambda: None
) -> dict[str, Quantiles]:
    """Microseconds of a call of each: median, p20 and p80 of many short blocks, one of each in turn."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(rounds), runs.items()):
        between()
        run()
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            run()
        samples[name].append((time.perf_counter_ns() - start) / (1e3 * CALLS))
    return {name: quantiles(found) for name, found in samples.items()}


def measure(rounds: int = ROUNDS) -> tuple[dict[str, dict[str, Quantiles]], int]:
    """The times of "aten" and "segfast", of `plain` calls and of those whose weight requires a `grad`.

    Second, how many launches of our kernels the last call came with.
    """
    torch.set_num_threads(1)
    x, weight = (
        t.contiguous(memory_format=torch.channels_last)
        for t in (torch.randn(1, 8, 2, 2), torch.randn(8, 8, 2, 2))
    )
    bias = torch.randn(8)
    learned = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    ours = segfast.functional.conv_transpose2d

    def call(function: Callable[..., object], w: torch.Tensor) -> Callable[[], object]:
        return lambda: function(x, w, bias, 2)

    segfast.backend("triton" if interpreting() else "auto")
    found = {}
    with record_launches() as launches:
        for name, w in (("plain", weight), ("grad", learned)):
            runs = {"aten": call(F.conv_transpose2d, w), "segfast": call(ours, w)}
            with torch.set_grad_enabled(name == "grad"):
                found[name] = blocks(runs, rounds, launches.clear)
        return found, len(launches)


if __name__ == "__main__":
    times, launches = measure(*map(int, sys.argv[1:]))
    print(json.dumps({"times": times, "launches": launches}))
