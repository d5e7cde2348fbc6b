"""The README's example runs, and its commands exist; docs/optimize.md's run, and it says what is so."""

import argparse
import inspect
import re
import subprocess
from pathlib import Path

import pytest
import torch

import segfast
from segfast._optimize import gain as gains
from segfast._optimize import measure
from segfast.cli import COMMANDS
from segfast.commands import tune
from segfast.ops import _apart, _choice
from segfast.ops._call import CANDIDATES
from segfast.ops._choice import ATEN
from segfast.ops._choice_files import path
from segfast.ops._cudnn import CALLS
from segfast.ops._gpu import PARTS, TRITON
from segfast.ops._gpu_call import FEW

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
OPTIMIZE = (ROOT / "docs" / "optimize.md").read_text()


@pytest.fixture
def faster(monkeypatch, tmp_path):
    """Every model is found to be twice as fast."""
    monkeypatch.chdir(tmp_path)

    def gain(model, plain, inputs, dtype, train, fused):
        name, error = (None, 0.0) if dtype is None else ("bfloat16", 0.01)
        return gains.Gain(2, 1, "channels_last", 1, True, name, error)

    monkeypatch.setattr("segfast._optimize.optimize.gain", gain)


@pytest.mark.measures
def test_the_example_runs(faster, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("2.00 times as fast on this CPU")
    assert "1 of 2 layers replaced. 1 fused with others." in printed
    assert "conv_transpose2d: aten (the tensors are on a CPU)" in printed


@pytest.mark.measures
def test_the_examples_on_optimize_run(faster, cache, tmp_path, capsys):
    space, printed = {}, []
    for code in re.findall(r"```python\n(.*?)```", OPTIMIZE, re.DOTALL):
        exec(compile(code, "optimize.md", "exec"), space)
        printed.append(capsys.readouterr().out)
    first, autotuned, shipped, half = printed
    assert "\n2.00 times as fast on this CPU with" in first and "\nconv_transpose2d: " in first
    assert autotuned == shipped == ""
    assert "in bfloat16, where outputs changed by 0.01 of the largest value" in half
    assert (tmp_path / "choices.json").exists() and path().parent == cache / "choices"
    assert {call.input[2:] for call in _choice.choices().measured} == {(256, 256), (480, 640)}
    assert segfast.report(space["fast"]).gain.dtype == "bfloat16"


def test_the_page_on_optimize_lists_the_candidates():
    named = {}
    for section in re.split(r"^## ", OPTIMIZE, flags=re.MULTILINE):
        named[section.partition("\n")[0]] = re.findall(r"^ +\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(named["On a CPU"]) == sorted({name for some in CANDIDATES.values() for name in some})
    assert sorted(named["On a GPU"]) == sorted({ATEN, TRITON, PARTS, *CALLS})
    assert "four of each kernel" in OPTIMIZE and FEW == 4


def test_the_page_on_optimize_gives_the_numbers_that_are_so():
    page = " ".join(OPTIMIZE.split())
    assert "at least 1 % faster" in page and gains._WORTH_IT == 0.99
    assert "no more than three quarters of what its calls" in page and gains._DECIDED == 0.75
    assert "save less than 15 us" in page and measure._SEQUENCE_US == 15
    assert "at most 4 times smaller or larger" in page and _choice.FARTHEST == 4
    budget = inspect.signature(segfast.optimize).parameters["budget"].default
    assert "`budget=` (60 seconds)" in page and budget == 60
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    assert "with ten minutes and all tiles" in page and parser.get_default("budget") == 600
    assert "level INFO" in page and _apart.log.name == "segfast"


@pytest.mark.measures
def test_a_write_through_data_is_not_seen_and_another_is(faster):
    """As the page on optimize warns; where this changes, the warning goes."""
    up = segfast.optimize(torch.nn.ConvTranspose2d(32, 2, 2, stride=2), torch.randn(1, 32, 8, 8))
    x = torch.randn(1, 32, 8, 8)
    for call in list(_choice.choices().measured):
        _choice.choices().add(call, _choice.Choice("matmul", {}))
    with torch.no_grad():
        before = up(x)
        up.weight.data.mul_(2)
        assert torch.equal(up(x), before)
        up.weight.mul_(1)
        assert not torch.equal(up(x), before)


def test_every_command_it_names_exists():
    page = (ROOT / "docs" / "commands.md").read_text()
    named = set(re.findall(r"`segfast ([a-z][a-z-]*)", page))
    assert named == set(COMMANDS)
    assert set(re.findall(r"`segfast ([a-z][a-z-]*)", README)) <= named
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  make ([\w-]+)", listed, re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", README + page)) <= targets | {"help"}


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_tables_of_networks_are_those_of_the_committed_rows():
    """The page is what `python -m benchmarks.network_report` prints, README a part of it."""
    from benchmarks.network_report import network_tables
    from benchmarks.networks import FAMILY
    from benchmarks.report import markdown_tables
    from benchmarks.rows import read_rows

    files = sorted((ROOT / "benchmarks" / "results").glob(f"*/{FAMILY}.csv"))
    tables = network_tables([row for file in files for row in read_rows(file)])
    assert markdown_tables(tables).strip() in (ROOT / "docs" / "networks.md").read_text()
    ((_, _, lines),) = tables
    compile_s, optimize_s = ([float(line[place]) for line in lines if line[place]] for place in (-3, -2))
    took = f"`optimize` took {min(optimize_s):.0f} to {max(optimize_s):.0f} seconds, `torch.compile` "
    assert took + f"{min(compile_s):.0f} to {max(compile_s):.0f};" in " ".join(README.split())
    least = min(line[6] for line in lines if line[6][:1].isdigit())
    assert f"The least that segfast reached is {least}." in README
    expected = []
    for name, size, threads, eager, _, *ratios in (line[:-3] for line in lines):
        if name == "geometric mean":
            name = f"{name}, {size}, {'one thread' if threads == '1' else 'two threads'}"
        elif (size, threads) != ("512x512", "2") or not name.startswith(("torchvision", "smp")):
            continue
        ratios.pop(2)  # of the backend of torch.compile, which has a page of its own
        expected.append(f"| {' | '.join([name, eager, *ratios])} |")
    table = README.partition("| network, 512x512")[2].partition("\n\n")[0].splitlines()[2:]
    assert sorted(table) == sorted(expected)
