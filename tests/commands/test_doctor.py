"""`segfast doctor`, without a GPU and on a pretended one."""

import json
import re

import pytest
import torch
import triton

import segfast
from segfast import cli
from segfast.commands import doctor
from segfast.kernels import source_digest
from segfast.ops import _choice_files, _proofs
from segfast.ops._choice import Choice
from segfast.ops._choice_files import machine, path
from tests.forget import forget
from tests.ops.test_gpu import CALL

OPERATION = "conv_transpose2d_forward"


def lines(text):
    return {line.split("  ")[0].strip(): line for line in text.splitlines() if line.strip()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_exits_2(cache, capsys):
    assert cli.main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "No GPU: " in out and "On a CPU `segfast.optimize` measures" in out
    assert not cache.exists()


def test_versions_settings_and_folders(cache, capsys, monkeypatch):
    monkeypatch.setenv("SEGFAST_BACKEND", "auto")
    (cache / "choices").mkdir(parents=True)
    (cache / "choices" / "nvidia-h200-1.json").write_text("{}")
    cli.main(["doctor"])
    out = capsys.readouterr().out
    for part in (
        torch.__version__,
        triton.__version__,
        "SEGFAST_BACKEND   auto",
        str(cache),
        "(nvidia-h200-1.json)",
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
    monkeypatch.setattr(doctor, "_DRIVER_FILE", file)
    assert doctor._driver() == version
    file.unlink()
    assert doctor._driver() == "none found"


def test_an_unproven_gpu(pretended_gpu, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H200" in out and "sm_90 (compute capability 9.0)" in out and "141.0 GiB" in out
    assert pretended_gpu in out
    assert lines(out)[OPERATION].split()[1:] == ["not", "proven"] * 3
    assert len(re.findall(r"calls measured +0 ", out)) == 2  # of the CPU and of the GPU
    assert "`segfast.optimize` proves and measures" in out and "`segfast prove`" in out


def test_a_proven_and_measured_gpu(pretended_gpu, capsys):
    proof = {"passed": True, "source": source_digest(OPERATION), "triton": triton.__version__}
    stale, wrong = (
        proof | {"source": "of other code"},
        proof | {"passed": False, "source": source_digest("conv2d_forward")},
    )
    proofs = {
        f"{OPERATION}.bfloat16": proof,
        f"{OPERATION}.float32": stale,
        "conv2d_forward.float16": wrong,
    }
    _proofs.file().parent.mkdir(parents=True)
    _proofs.file().write_text(
        json.dumps({pretended_gpu: proofs, "nvidia-other": {f"{OPERATION}.float16": proof}})
    )
    _choice_files.write({CALL: Choice("aten", {}), CALL._replace(gradients=True): Choice("aten", {})})
    forget()
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    shown = lines(out)
    assert shown["operation"].split()[1:] == ["float16", "bfloat16", "float32"]
    assert shown[OPERATION].split()[1:] == ["not", "proven", "proven", "not", "proven"]
    assert shown["conv2d_forward"].split()[1:] == ["WRONG", *["not", "proven"] * 2]
    file = path(_choice_files.gpu_machine(pretended_gpu))
    assert re.findall(r"calls measured +(\d+) \((.*)\)", out) == [("0", str(path())), ("2", str(file))]


def test_a_gpu_too_old(pretended_gpu, capsys):
    properties = torch.cuda.get_device_properties(0)
    properties.major, properties.minor = 7, 5
    assert cli.main(["doctor"]) == 0
    assert "they need compute capability 8.0" in capsys.readouterr().out


def test_a_gpu_that_is_not_there(pretended_gpu, capsys):
    assert cli.main(["doctor", "--device", "cuda:3"]) == 2
    assert "--device cuda:3: there are 1 CUDA GPUs" in capsys.readouterr().err
