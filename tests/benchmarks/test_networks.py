"""The whole networks' benchmark: weights that are of use, what a first call is, the table of its rows."""

import dataclasses
import json
import math
import re

import pytest
import torch
from torch import nn

import segfast
from benchmarks import network_trial, record, rows
from benchmarks.network_report import HEADERS, main, network_tables
from benchmarks.network_trial import BF16_TOLERANCE, NetworkTrial, largest_error
from benchmarks.networks import NETWORKS, TINY, Network, network_case, network_cases
from benchmarks.suite import candidates, measure_trial
from benchmarks.timing import Candidate, Measurement, Skipped, Timing, relative_error
from segfast.models import create

CPU = torch.device("cpu")
SELFIE = network_case("segfast_selfie_segmenter", TINY)


@pytest.fixture(scope="module")
def trial():
    return NetworkTrial(SELFIE, CPU)


def _row(
    case="smp_pan_resnet34_256_1t", candidate="eager_nchw", ms=100.0, status="ok", date="2026-01-01", **more
):
    name, side, threads = case.rsplit("_", 2)
    timing = Timing(*[math.nan] * 3, 1e3 * ms, 1e3 * ms, 1e3 * ms, 9)
    measured = Measurement(candidate, candidate.startswith("segfast"), status, "", 0.0, timing, cold_ms=2e3)
    columns = dict.fromkeys(rows.VERSIONS, "") | {"gpu": "cpu", "cpu": "A", "isa": "AVX2", "threads": "1"}
    columns |= {"date": date, "torch": "2.13", "commit": "abc", **more}
    return rows.make_row("pytest", network_case(name, int(side), threads[:-1]), measured, {}, columns, False)


def test_every_case_is_named_once():
    cases = list(network_cases(cores=4))
    assert len({case.name for case in cases}) == len(cases) == 4 * len(NETWORKS)
    assert len(list(network_cases(cores=1))) == len(list(network_cases(4, on_gpu=True))) == 2 * len(NETWORKS)


def test_weights_come_from_the_seed_alone(trial):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = NetworkTrial(SELFIE, CPU)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(again.images, trial.images)
    assert torch.equal(again.expected, trial.expected)


def test_zero_scores_and_dead_norms_are_drawn(monkeypatch):
    def build():
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)]
        nn.init.zeros_(layers[1].weight)
        nn.init.zeros_(layers[3].weight)
        return nn.Sequential(*layers)

    monkeypatch.setitem(NETWORKS, SELFIE["model"], Network("tiny", "tiny", build))
    found = NetworkTrial(SELFIE, CPU)
    norm = found.network[1]
    assert norm.weight.min() >= 0.5
    assert norm.momentum == 0.1
    assert not found.network.training
    assert not torch.equal(norm.running_mean, torch.zeros(8))
    assert found.expected.std() > 0.01


def test_a_network_of_no_use_is_refused(monkeypatch):
    monkeypatch.setitem(NETWORKS, SELFIE["model"], Network("zero", "zero", lambda: _Times(0.0)))
    with pytest.raises(ValueError, match=r"largest score of segfast_selfie_segmenter is 0\.0"):
        NetworkTrial(SELFIE, CPU)


class _Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, input):
        return self.factor * input


def test_a_missing_package_is_a_reason_to_skip(monkeypatch):
    def build():
        import package_that_nobody_has  # noqa: F401

    monkeypatch.setitem(NETWORKS, SELFIE["model"], Network("x", "network X", build))
    with pytest.raises(LookupError, match=r"network X cannot be built here: .*package_that_nobody_has"):
        NetworkTrial(SELFIE, CPU)


def test_freezing_is_on_for_one_call_of_a_copy(trial, monkeypatch):
    from torch._inductor import config

    seen = []

    def stub(network, **options):
        def call(images):
            seen.append((config.freezing, torch.is_grad_enabled(), network is trial.network))
            return network(images)

        return call

    monkeypatch.setattr(torch, "compile", stub)
    before = config.freezing
    compiled = next(c for c in candidates(trial, compiled=True) if c.name == "compile_freezing")
    for _ in range(2):
        assert largest_error(compiled.run(), trial.expected) < 1e-5
    assert seen == [(True, False, False), (before, False, False), (before, False, False)]
    assert config.freezing == before


def test_the_first_call_builds_and_the_callers_network_stays(trial, monkeypatch):
    built = []
    optimize = segfast.optimize

    def counted(network, images):
        assert images.is_contiguous()
        built.append(network)
        return optimize(network, images)

    monkeypatch.setattr(segfast, "optimize", counted)
    strides = [parameter.stride() for parameter in trial.network.parameters()]
    found = {c.name: c for c in candidates(trial)}
    assert built == []
    for _ in range(2):
        for name in ("segfast", "eager_nhwc"):
            found[name].run()
    assert built == [trial.network]
    assert strides == [parameter.stride() for parameter in trial.network.parameters()]
    assert torch.equal(found["eager_nchw"].run(), trial.expected)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_where_the_cpu_has_it(trial, monkeypatch, has_bf16):
    monkeypatch.setattr(network_trial, "no_bf16", lambda device: "" if has_bf16 else "this CPU has none")
    found = {c.name: c for c in candidates(trial)}
    skipped = {name: c.note for name, c in found.items() if isinstance(c, Skipped)}
    if has_bf16:
        assert skipped == {}
        for name in ("eager_bf16", "segfast_bf16"):
            assert (found[name].dtype, found[name].ours) == ("bfloat16", name == "segfast_bf16")
            assert 1e-4 < largest_error(found[name].run(), trial.expected) < BF16_TOLERANCE
        # The caller of optimize gets what the network gave before.
        assert found["segfast_bf16"].run().dtype == torch.float32
    else:
        assert skipped == dict.fromkeys(("eager_bf16", "segfast_bf16"), "this CPU has none")


def test_where_values_move_errors_count_as_a_whole(monkeypatch):
    """Of SegNet roundings choose other pixels: right in bf16 all the same, and wrong is still wrong."""
    name, case = "segfast_segnet_vgg16", network_case("segfast_segnet_vgg16", TINY)

    def build():
        return create("segnet_vgg16", width_mult=0.25, num_classes=3)

    monkeypatch.setitem(NETWORKS, name, dataclasses.replace(NETWORKS[name], build=build))
    monkeypatch.setattr(network_trial, "no_bf16", lambda device: "")
    trial = NetworkTrial(case, CPU)
    found = [c for c in candidates(trial) if c.name in ("eager_nhwc", "eager_bf16")]
    run = found[0].run
    found.append(dataclasses.replace(found[0], name="moved", run=lambda: run().roll(1, 2)))
    assert largest_error(found[1].run(), trial.expected) > BF16_TOLERANCE
    measured = measure_trial(trial, found, budget_s=0.0, min_rounds=1, log=lambda text: None)
    assert [m.status for m in measured] == ["ok", "ok", "wrong"]


def test_choices_are_of_ours_alone(trial, monkeypatch):
    """The layers of segfast's own networks take what was chosen for the optimized one, unless told."""
    seen = {}
    for candidate in candidates(trial):
        network = _Backends()
        monkeypatch.setattr(network_trial, "_channels_last", lambda value, network=network: network)
        monkeypatch.setattr(segfast, "optimize", lambda *args, network=network, **options: network)
        if candidate.name not in ("eager_nchw", "eager_bf16") and isinstance(candidate, Candidate):
            candidate.run()
            seen[candidate.name] = network.seen
    assert seen.pop("eager_nhwc") == ["aten"]
    assert "segfast" in seen
    assert all(names == ["auto"] for names in seen.values())


class _Backends(nn.Module):
    """Notes the backend of each call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, input):
        self.seen.append(segfast.get_backend())
        return torch.zeros(1)


@pytest.mark.measures
def test_the_gain_is_a_note(trial, tmp_path, monkeypatch):
    monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path))
    ours = next(c for c in candidates(trial) if c.name == "segfast")
    (found,) = measure_trial(trial, [ours], budget_s=0, min_rounds=1)
    assert re.match("[0-9.]+ times as fast on this CPU|Not faster on this CPU", found.note)


def test_the_gate_is_the_largest_error(trial):
    """One wrong pixel hides in the norm of an image, but not here."""
    reference = trial.expected
    wrong = reference.clone()
    wrong[0, 0, 3, 3] += 1e-3 * reference.abs().max()
    assert largest_error(wrong, reference) == pytest.approx(1e-3, rel=1e-2)
    assert largest_error(wrong[:, :, :50], reference) == math.inf
    assert largest_error(reference * math.nan, reference) == math.inf
    assert relative_error(wrong, reference) < 1e-4
    runs = [Candidate("right", lambda: reference), Candidate("wrong", lambda: wrong)]
    found = measure_trial(trial, runs, budget_s=0, min_rounds=1)
    assert [m.status for m in found] == ["ok", "wrong"]


def test_the_table_compares_within_the_last_run(tmp_path, capsys):
    case, large = "smp_pan_resnet34_256_1t", "segfast_unet_256_1t"
    found = [
        _row(candidate="segfast", ms=1.0),  # an earlier run's
        _row(case, "eager_nchw", 200.0, date="2026-01-02"),
        _row(case, "eager_nhwc", 100.0, date="2026-01-02"),
        _row(case, "compile_freezing", 80.0, date="2026-01-02"),
        _row(case, "segfast", 50.0, date="2026-01-02"),
        _row(case, "segfast_compile", 40.0, date="2026-01-02"),
        _row(case, "segfast_bf16", 1.0, status="wrong", date="2026-01-02"),
        _row(large, "eager_nchw", 10.0),
        _row(large, "segfast", 20.0),
        _row(case, "eager_nchw", 10.0, cpu="B"),
        _row("segfast_unet_512_allt", "segfast", 10.0),  # without a baseline
    ]
    rows.append_rows(tmp_path / "networks.csv", found)
    ((title, headers, lines), (other, _, _)) = network_tables(rows.read_rows(tmp_path / "networks.csv"))
    assert headers == HEADERS
    assert "A, AVX2: torch 2.13, commit abc, 2026-01-01 to 2026-01-02" in title
    assert "B, AVX2" in other
    assert lines == [
        [
            "smp_pan_resnet34",
            "256x256",
            "1",
            "100",
            "NHWC",
            "1.25",
            "2.00",
            "2.50",
            "",
            "wrong",
            "2",
            "2",
            "2",
        ],
        ["segfast_unet", "256x256", "1", "10", "NCHW", "", "0.50", "", "", "", "", "2", ""],
        ["geometric mean", "256x256", "1", "", "", "1.25 of 1", "1.00", "2.50 of 1", "", "", "", "", ""],
    ]
    assert main([str(tmp_path / "networks.csv")]) == 0
    assert "| smp_pan_resnet34 | 256x256 | 1 | 100 |" in capsys.readouterr().out
    assert main([str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_rows_are_kept_as_they_come_and_filed(tmp_path):
    """A named CPU's rows in full size are filed, from measured.csv too; those in small sizes are not."""
    small = _row() | {"size": "cpu"}
    rows.append_rows(tmp_path / rows.MEASURED, [_row(), small])
    rows.append_rows(tmp_path / "rows.csv", [_row(), _row(candidate="segfast")])
    (path,) = record.record(tmp_path, tmp_path / "tree")
    assert path == tmp_path / "tree/benchmarks/results/cpu/networks.csv"
    assert [row["candidate"] for row in rows.read_rows(path)] == ["eager_nchw", "segfast"]
    (tmp_path / "old.csv").write_text("case,us\n")
    with pytest.raises(ValueError, match=r"old\.csv: expected the columns"):
        rows.append_rows(tmp_path / "old.csv", [_row()])


def test_a_row_names_the_candidates_dtype():
    measured = Measurement("eager_bf16", False, "ok", dtype="bfloat16")
    row = rows.make_row("pytest", SELFIE, measured, {}, dict.fromkeys(rows.VERSIONS, ""), False)
    assert row["dtype"] == "bfloat16"
    assert json.dumps(row["gflop"]) == "NaN"
