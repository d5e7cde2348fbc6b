"""`segfast doctor`, without a GPU and on a pretended one."""

import json
import re
import types

import pytest
import torch
import triton

import segfast
from segfast import _doctor, cli
from segfast.kernels import _configs, _device
from segfast.ops import FAMILIES, _prove, _prove_apart
from segfast.ops._backend import forget_decisions
from segfast.ops._choice_files import machine, path

OPERATION = "conv_transpose2d_forward"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty user's cache."""
    monkeypatch.setenv("SEGFAST_CACHE", str(tmp_path / "cache"))
    forget_decisions()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget_decisions()


@pytest.fixture
def gpu(monkeypatch, cache):
    """What torch says of an H200, where there is none."""
    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_device, "_query", lambda index: ("sm_90", "nvidia-h200", 232448))
    monkeypatch.setattr(_device, "_index", lambda device: 0)
    return properties


def lines(text):
    return {line.split("  ")[0].strip(): line for line in text.splitlines() if line.strip()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("arguments", [[], ["--prove"]])
def test_without_a_gpu_it_says_so_and_exits_2(cache, capsys, arguments):
    assert cli.main(["doctor", *arguments]) == 2
    out = capsys.readouterr().out
    assert "No GPU: " in out and "On a CPU `segfast.optimize` measures" in out
    assert not cache.exists()


def test_versions_settings_and_folders(cache, capsys, monkeypatch):
    monkeypatch.setenv("SEGFAST_BACKEND", "auto")
    cache.mkdir()
    (cache / "nvidia-h200.json").write_text("{}")
    cli.main(["doctor"])
    out = capsys.readouterr().out
    for part in (
        torch.__version__,
        triton.__version__,
        "SEGFAST_BACKEND   auto",
        str(cache),
        "nvidia-h200.json",
    ):
        assert part in out, part


def test_what_is_measured_on_the_cpu(cache, capsys):
    counts = []
    for _ in range(2):
        cli.main(["doctor"])
        printed = capsys.readouterr().out
        assert re.search(r"model +(.*)", printed)[1] == machine()["cpu"]
        counts.append(re.search(r"calls measured +(\d+) \((.*)\)", printed).groups())
        with torch.no_grad(), segfast.autotune():
            segfast.functional.conv2d(torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3))
    assert counts == [("0", str(path())), ("1", str(path()))]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
            "535.129.03",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        ("something else", "unknown"),
    ],
)
def test_the_drivers_version(monkeypatch, tmp_path, text, version):
    file = tmp_path / "version"
    file.write_text(text)
    monkeypatch.setattr(_doctor, "_DRIVER_FILE", file)
    assert _doctor._driver() == version
    file.unlink()
    assert _doctor._driver() == "none found"


def test_an_unproven_gpu(gpu, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_configs, "_FOLDER", tmp_path)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out and "sm_90 (compute capability 9.0)" in out and "141.0 GiB" in out
    assert lines(out)[OPERATION].split()[1:] == ["not", "proven"] * 3 + ["0"]
    assert "doctor --prove" in out and "segfast tune" in out


def test_a_proven_and_measured_gpu(gpu, cache, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_configs, "_FOLDER", tmp_path)
    cache.mkdir()
    proof = {"source": _configs.source_digest(OPERATION), "triton": triton.__version__}
    stale = proof | {"source": "of other code"}
    proofs = {f"{OPERATION}.bfloat16": proof, f"{OPERATION}.float32": stale}
    (cache / "proven.json").write_text(
        json.dumps({"sm_90": proofs, "sm_80": {f"{OPERATION}.float16": proof}})
    )
    measured = {OPERATION: {"ci8-co8-t4-g1-bfloat16-p10": {}, "ci8-co8-t4-g1-bfloat16-p12": {}}}
    (cache / "nvidia-h200.json").write_text(json.dumps({"architecture": "sm_90", "operations": measured}))
    forget_decisions()
    assert cli.main(["doctor"]) == 0
    shown = lines(capsys.readouterr().out)
    header, row = shown["operation"].split(), shown[OPERATION].split()
    assert header[1:4] == ["float16", "bfloat16", "float32"]
    assert row[1:] == ["not", "proven", "proven", "not", "proven", "2"]


def test_a_gpu_too_old(gpu, capsys):
    gpu.major, gpu.minor = 7, 5
    assert cli.main(["doctor"]) == 0
    assert "they need compute capability 8.0" in capsys.readouterr().out


def test_a_gpu_that_is_not_there(gpu, capsys):
    assert cli.main(["doctor", "--device", "cuda:3"]) == 2
    assert "--device cuda:3: there are 1 CUDA GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [False, True])
def test_prove_records_what_is_right(gpu, cache, capsys, monkeypatch, wrong):
    rows = [
        _prove.ProofRow(OPERATION, "float16", "k2 s2", 1e-4, 1e-3, True),
        _prove.ProofRow(OPERATION, "float32", "k2 s2", 1e-7, 1e-6, True),
        _prove.ProofRow(OPERATION, "float32", "k3 s2", 1e-1 if wrong else 1e-7, 1e-6, not wrong),
    ]
    monkeypatch.setattr(
        _prove_apart, "prove_apart", lambda device, families: iter(rows if families == FAMILIES[:1] else ())
    )
    cli.main(["doctor"])  # reads that nothing is proven yet
    assert cli.main(["doctor", "--prove"]) == (1 if wrong else 0)
    out = capsys.readouterr().out
    assert f"{2 if wrong else 3} of 3 right" in out and str(cache / "proven.json") in out
    float32 = ["not", "proven"] if wrong else ["proven"]
    row = next(line for line in reversed(out.splitlines()) if line.startswith(OPERATION))
    assert row.split()[1:] == ["proven", "not", "proven", *float32, "0"]
    recorded = json.loads((cache / "proven.json").read_text())["sm_90"]
    assert (f"{OPERATION}.float32" in recorded) is not wrong and f"{OPERATION}.float16" in recorded
