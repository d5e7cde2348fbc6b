"""The roof: measured once on a machine, and what bounds a row by it."""

import json

import pytest
import torch

from segfast._profile import roof
from segfast._profile.assemble import with_roof
from segfast._profile.rows import Roof, Row

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Names of the rates that are measured, 1e9 each."""
    found = []

    def rate(name):
        def measure(device, size, *others):
            found.append(name)
            return 1e9

        return measure

    monkeypatch.setattr(roof, "copy_rate", rate("copy"))
    monkeypatch.setattr(roof, "matmul_rate", rate("product"))
    return found


def test_a_rate_is_the_work_by_the_seconds_of_the_median(monkeypatch):
    monkeypatch.setattr(roof, "seconds", lambda run, device: run() is None or [4.0, 2.0, 1.0])
    assert roof.copy_rate(CPU, 800) == 2 * 800 / 2
    assert roof.copy_rate(CPU, 800, min) == 2 * 800 / 1
    assert roof.matmul_rate(CPU, 10, torch.bfloat16) == 2 * 1000 / 2


def test_each_rate_is_measured_once(measured):
    first = roof.roof_of(CPU, [torch.float32])
    sides = len(roof._SIDES["cpu"])
    assert measured == ["product"] * sides + ["copy"]
    assert first == roof.roof_of(CPU, [torch.float32])
    assert len(measured) == sides + 1
    both = roof.roof_of(CPU, [torch.float32, torch.bfloat16, torch.int64])
    assert measured == ["product"] * sides + ["copy"] + ["product"] * sides
    assert both.flops_per_s == {"float32": 1e9, "bfloat16": 1e9}
    assert (both.threads, both.bytes_per_s) == (torch.get_num_threads(), 1e9)


def test_other_threads_are_another_roof(measured, monkeypatch):
    roof.roof_of(CPU, [torch.float32])
    count = len(measured)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert roof.roof_of(CPU, [torch.float32]).threads == 99
    assert len(measured) == 2 * count


def test_nothing_is_kept_of_a_busy_cpu(measured, monkeypatch):
    monkeypatch.setattr(roof._measure, "quiet_check", lambda: lambda: False)
    roof.roof_of(CPU, [torch.float32])
    assert not (roof.cache_folder() / "roofs.json").exists()


@pytest.mark.parametrize("text", ["no JSON", "[1]", '{"a": {"b": "c"}}', '{"a": 1}'])
def test_a_broken_file_is_a_warning_and_written_anew(measured, text):
    file = roof.cache_folder() / "roofs.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"roofs.json cannot be read .*; it is ignored"):
        roof.roof_of(CPU, [torch.float32])
    assert len(json.loads(file.read_text())) == 1


def test_random_state_and_precision_stay():
    random, precision = torch.get_rng_state(), torch.backends.cuda.matmul.fp32_precision
    roof.roof_of(CPU, [torch.float32])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.cuda.matmul.fp32_precision == precision


ROOF = Roof("device", 1, {"float32": 1e12, "bfloat16": 4e12}, 1e10, 3.0)


@pytest.mark.parametrize(
    ("facts", "bound", "share"),
    [
        # 100 us at the roof of products, 10 us of memory.
        ({"flops": 10**8, "bytes": 10**5, "dtype": "float32"}, "compute", 0.5),
        ({"flops": 10**8, "bytes": 10**5, "dtype": "bfloat16"}, "compute", 0.125),
        ({"flops": 10**8, "bytes": 2 * 10**6, "dtype": "float32"}, "memory", 1.0),
        ({"flops": 0, "bytes": 10**6, "dtype": "float32"}, "memory", 0.5),
        # A dtype without a rate of its own: the first's.
        ({"flops": 10**8, "bytes": 10**5, "dtype": "int64"}, "compute", 0.5),
        ({"flops": 10**6, "bytes": 10**4, "dtype": "float32"}, "launch", None),
        ({"kind": "layout copy", "bytes": 10**6}, "layout copy", 0.5),
        ({"kind": "cast", "bytes": 10**6}, "layout copy", 0.5),
        ({"kind": "cast", "bytes": 10**4}, "layout copy", None),
        ({"kind": "between layers"}, "launch", None),
    ],
)
def test_bounds(facts, bound, share):
    row = Row("", **{"kind": "conv2d", **facts}, direction="forward", start_us=0, us=200, p20_us=1, p80_us=1)
    found = with_roof(row, ROOF)
    assert (found.bound, found.roof_share) == (bound, pytest.approx(share) if share else None)
