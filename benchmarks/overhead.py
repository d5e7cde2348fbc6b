"""What a call of segfast costs on the host beyond the plain ATen op, on tiny tensors, in microseconds.

`python -m benchmarks.overhead` prints JSON. Our kernels' launches are recorded instead of made: so it works
on CPU tensors under `TRITON_INTERPRET=1`; without that, the way from "auto" to ATen is measured.
"""

import itertools
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import segfast
from segfast.kernels import interpreting, record_launches

ROUNDS, CALLS = 150, 40


def lowest(
    runs: dict[str, Callable[[], object]], between: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Microseconds of a call of each, the lowest of many short blocks: as if nothing else ran."""
    best = dict.fromkeys(runs, float("inf"))
    for _, (name, run) in itertools.product(range(ROUNDS), runs.items()):
        between()
        run()
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            run()
        best[name] = min(best[name], (time.perf_counter_ns() - start) / (1e3 * CALLS))
    return best


def measure() -> dict[str, float]:
    """`aten`, `segfast` and their difference `over`, each also `_grad`: the weight requires a gradient."""
    torch.set_num_threads(1)
    x, weight = (
        t.contiguous(memory_format=torch.channels_last)
        for t in (torch.randn(1, 8, 2, 2), torch.randn(8, 8, 2, 2))
    )
    bias = torch.randn(8)
    learnt = weight.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    ours = segfast.functional.conv_transpose2d

    def call(function: Callable[..., object], w: torch.Tensor) -> Callable[[], object]:
        return lambda: function(x, w, bias, 2)

    segfast.backend("triton" if interpreting() else "auto")
    found = {}
    with record_launches() as launches:
        for suffix, w in (("", weight), ("_grad", learnt)):
            runs = {"aten": call(F.conv_transpose2d, w), "segfast": call(ours, w)}
            if not suffix:
                with torch.no_grad():
                    times = lowest(runs, launches.clear)
            else:
                times = lowest(runs, launches.clear)
            found |= {name + suffix: value for name, value in times.items()}
            found["over" + suffix] = times["segfast"] - times["aten"]
        found["launches"] = float(len(launches))
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
