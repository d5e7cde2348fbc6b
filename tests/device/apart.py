"""On the simulated device, a process of `_prove_apart` or of `_measure_apart`: `apart.py MODULE ARG...`.

Run by `python -m ttsem.sanitize`, with what conftest.py fills in, and a clock that does not look at the time.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import pytest

from segfast.kernels._device import without_inline_ptx
from segfast.ops import _gpu_measure
from tests.device import clock, conftest

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as monkeypatch, without_inline_ptx():
        conftest.complete_simulation(monkeypatch)
        monkeypatch.setattr(_gpu_measure, "interleave", clock.ours_first)
        module = importlib.import_module(sys.argv[1])
        sys.exit(module.main(*sys.argv[2:]))
