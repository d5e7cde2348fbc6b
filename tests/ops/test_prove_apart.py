"""The proofs in processes of their own: what becomes of a kernel that faults, and of the others."""

import logging
import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from segfast.kernels import pretend_architecture, record_launches
from segfast.ops import FAMILIES, _case, _prove_apart, backend
from segfast.ops._prove_apart import prove_apart

ROOT = Path(__file__).resolve().parents[2]
# A family whose operations are right, wrong, raise, end their process, and lose their device.
STAND_IN = """
import os, sys, types

def proofs(device, dtype):
    import torch
    from segfast.ops import _prove

    lost = []

    def check(device):
        if lost:
            raise _prove.DeviceLost("an illegal memory access was encountered")

    _prove._check_device = check
    one = torch.ones(2)

    def raises():
        raise ValueError("no such tile")

    def faults():
        lost.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    calls = {
        "right": lambda: one, "wrong": lambda: 2 * one, "raises": raises,
        "dies": lambda: os._exit(7), "faults": faults, "after": lambda: one,
    }
    for operation, call in calls.items():
        for case in ("a", "b"):
            yield _prove.Proof(operation, case, call, one.double(), one, one.double(), 1)

module = types.ModuleType("segfast.ops.stand_in")
module.OPERATIONS = ("right", "wrong", "raises", "dies", "faults", "after")
sys.modules["segfast.ops.stand_in"] = module
cases = types.ModuleType("segfast.ops.stand_in.cases")
cases.CASES = [types.SimpleNamespace(uses=("prove",), proofs=proofs)]
sys.modules["segfast.ops.stand_in.cases"] = cases
"""


ENDED = "the process ended with code 1: ModuleNotFoundError: No module named 'segfast.ops.stand_in'"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    for name in ("segfast.ops.stand_in", "segfast.ops.stand_in.cases"):
        monkeypatch.setitem(sys.modules, name, None)
    exec(STAND_IN)
    return "stand_in"


def test_a_fault_costs_its_own_case(stand_in, capfd):
    rows = list(prove_apart(torch.device("cpu"), (torch.float32, torch.float16), None, (stand_in,)))
    verdicts = {(row.operation, row.dtype, row.case): row.passed for row in rows}
    assert len(verdicts) == len(rows) == 24  # each once
    assert {operation for (operation, _, _), passed in verdicts.items() if passed} == {"right", "after"}
    assert capfd.readouterr() == ("", "")
    notes = {row.operation: row.note for row in rows if not row.passed}
    assert "no such tile" in notes["raises"] and "illegal memory" in notes["faults"]
    assert notes["dies"] == "the process ended with code 7" and notes["wrong"] == ""


def test_rows_come_while_the_process_runs(stand_in, monkeypatch):
    started = []
    lines = _prove_apart._lines

    def counted(*args):
        started.append(args)
        yield from lines(*args)

    monkeypatch.setattr(_prove_apart, "_lines", counted)
    rows = prove_apart(torch.device("cpu"), (torch.float32,), None, (stand_in,))
    assert next(rows).operation == "right" and len(started) == 1
    # Left half way, it leaves no process behind.
    rows.close()


def test_a_process_that_does_not_even_begin_proves_nothing(stand_in, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "segfast")
    (tmp_path / "sitecustomize.py").write_text("")
    rows = list(prove_apart(torch.device("cpu"), (torch.float32,), None, (stand_in,)))
    assert len(rows) == 6 and not any(row.passed for row in rows)
    assert all(math.isnan(row.error) and row.note.startswith(ENDED) for row in rows)
    assert capfd.readouterr() == ("", "") and "Traceback" in caplog.text


def test_a_process_that_takes_too_long_is_ended_and_says_so(stand_in, monkeypatch):
    class AtOnce:
        def __init__(self, seconds, function):
            self.start = function

        def cancel(self):
            pass

    monkeypatch.setattr(_prove_apart, "threading", types.SimpleNamespace(Timer=AtOnce))
    rows = list(prove_apart(torch.device("cpu"), (torch.float32,), None, (stand_in,)))
    assert len(rows) == 6 and {row.note for row in rows} == {"it took too long"}


@pytest.mark.interpreter
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_cases_can_be_recorded(family):
    """To be compiled beforehand. Nothing may rest on results, which are not written then."""
    recorded = 0
    with pretend_architecture("sm_90"), backend("triton"), record_launches() as launches:
        for item in _case.proofs(family, torch.device("cpu"), torch.float16):
            if family == "dense_crf" and recorded >= 8:
                break
            item.actual()
            recorded += 1
    assert recorded > 3 and len(launches) >= recorded
