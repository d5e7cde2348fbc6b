"""`segfast tune` measures a model's calls, `segfast prove` proves every kernel; the cache remembers both."""

import json

import pytest
import torch

import segfast
from segfast import cli
from segfast._optimize import measure
from segfast.commands import tune as tune_module
from segfast.ops import FAMILIES, _choice, _choice_files, _gpu_call, _proofs, _prove_apart
from segfast.ops._choice import ATEN, choices
from segfast.ops._prove import ProofRow

MODEL = """
from torch import nn

net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
"""


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A tiny network's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODEL)
    return "mine.py:net"


def tune(model, *arguments):
    return cli.main(["tune", model, "--size", "16x20", "--device", "cpu", *arguments])


@pytest.mark.measures
class TestTune:
    def test_it_prints_what_was_chosen_and_gained(self, model, wins, model_takes, capsys):
        wins("onednn")
        model_takes(3, 2, 1)
        assert tune(model, "--batch", "2") == 0
        out = capsys.readouterr().out
        assert "2.00 times as fast on this CPU" in out and "onednn: 1000 us (aten 2000" in out
        calls = sorted(choices().measured, key=lambda call: call.weight)
        assert [(call.input, call.weight) for call in calls] == [
            ((2, 8, 14, 18), (3, 8, 1, 1)),
            ((2, 2, 16, 20), (8, 2, 3, 3)),
        ]

    def test_what_it_measured_is_what_runs(self, model, wins, model_takes, cache):
        wins("onednn")
        model_takes(3, 2, 1)
        assert tune(model) == 0
        _choice.forget_choices()
        assert {choice.name for choice in choices().measured.values()} == {"onednn"}
        assert list((cache / "choices").glob("*.json")) == [_choice_files.path()]

    def test_what_was_measured_before_is_measured_again(self, model, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)
        tune(model)
        wins(ATEN)
        tune(model)
        assert {choice.name for choice in choices().measured.values()} == {ATEN}

    def test_what_it_asks_of_optimize(self, model, monkeypatch):
        asked = []

        def optimize(net, images, **options):
            asked.append((images.shape, images.dtype, net[0].weight.dtype, options, measure._most))
            return segfast.optimize(net)

        monkeypatch.setattr(tune_module, "optimize", optimize)
        monkeypatch.setattr(tune_module, "input_channels", lambda net: 5)
        tune(model)
        options = {"inplace": True, "budget": 600.0, "train": False}
        assert asked.pop() == ((1, 5, 16, 20), torch.float32, torch.float32, options, _gpu_call.ALL)
        tune(model, "--train", "--batch", "3", "--channels", "2", "--dtype", "bf16", "--budget", "7")
        options = {"inplace": True, "budget": 7.0, "train": True}
        assert asked.pop() == ((3, 2, 16, 20), torch.bfloat16, torch.bfloat16, options, _gpu_call.ALL)
        assert measure._most == _gpu_call.FEW


OPERATION = "conv_transpose2d_forward"


class TestProve:
    @pytest.fixture
    def proven(self, monkeypatch, pretended_gpu):
        """The results of the kernels' cases, and the families and dtypes that were asked for."""
        rows = [ProofRow(OPERATION, "float16", f"k{k} s2", 1e-4, 1e-3, True) for k in (2, 3)]
        asked = []

        def prove_apart(device, dtypes, families):
            asked.append((*families, *dtypes))
            return iter(rows if families == (FAMILIES[0],) else ())

        def compile_proofs(device, dtypes, families):
            asked.append((tuple(families), *dtypes))

        monkeypatch.setattr(_proofs, "prove_apart", prove_apart)
        monkeypatch.setattr(_prove_apart, "compile_proofs", compile_proofs)
        return rows, asked

    def test_row_by_row_and_remembered(self, proven, cache, capsys):
        rows, asked = proven
        assert cli.main(["prove"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[:3] == ["compiling ...", *map(str, rows)] and out[3].startswith("2 of 2 right, in ")
        assert out[3].endswith(f"remembered in {cache / 'choices' / 'proven.json'}")
        # All is compiled before anything is proven.
        assert [family for family, *_ in asked] == [tuple(FAMILIES), *FAMILIES]
        assert {tuple(dtypes) for _, *dtypes in asked} == {tuple(_prove_apart.DTYPES)}
        known = json.loads((cache / "choices" / "proven.json").read_text())["nvidia-h200"]
        assert known[f"{OPERATION}.float16"]["passed"] is True
        assert _proofs.proven(OPERATION, torch.float16, torch.device("cuda", 0))

    def test_one_that_is_wrong(self, proven, capsys):
        rows, _ = proven
        rows.append(ProofRow(OPERATION, "float16", "k5 s2", 0.1, 1e-3, False))
        assert cli.main(["prove"]) == 1
        out = capsys.readouterr().out
        assert "WRONG" in out and "2 of 3 right" in out
        assert not _proofs.proven(OPERATION, torch.float16, torch.device("cuda", 0))

    def test_some_families_and_dtypes(self, proven):
        _, asked = proven
        chosen = ["--family", "dense_crf", "--family", "conv2d", "--dtype", "bf16", "--dtype", "fp32"]
        assert cli.main(["prove", *chosen]) == 0
        dtypes = (torch.bfloat16, torch.float32)
        families = ("dense_crf", "conv2d")
        assert asked == [(families, *dtypes), *[(family, *dtypes) for family in families]]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    @pytest.mark.parametrize("arguments", [[], ["--device", "cuda"], ["--dtype", "bf16"]])
    def test_without_a_gpu_it_says_so(self, cache, capsys, arguments):
        assert cli.main(["prove", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1 and "GPU" in captured.err
        assert not cache.exists()
