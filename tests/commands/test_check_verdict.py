"""`segfast check`'s last line: whether it was worth it, in one sentence, and what may gain more.

Also where `optimize` measured the whole model itself.
"""

import dataclasses
import math

import pytest
import torch
from torch import nn

from segfast import cli
from segfast._optimize.gain import Gain
from segfast._optimize.optimize import Report, Row
from segfast._timing import Timing
from segfast.commands import _check_advice
from segfast.commands._check_advice import advice
from segfast.commands._difference import Difference
from segfast.commands.check import CheckResult, check_model
from segfast.ops._backend import Explanation

QUICK = {"budget_s": 0.01}
NAN = math.nan


def timing(ms, spread=0.01):
    us = 1e3 * ms
    return Timing(NAN, NAN, NAN, us, us * (1 - spread), us * (1 + spread), 9)


def result(before, after, relative=0.0, gradient=None, replaced=True, **fields):
    found = CheckResult(
        shape=(1, 1, 8, 8),
        dtype=torch.float32,
        device=torch.device("cpu"),
        train=gradient is not None,
        output=Difference(relative, relative, "output"),
        gradient=gradient,
        layout="NCHW",
        layouts={"NCHW": before},
        after=after,
        before_bytes=2**20,
        after_bytes=2**20,
        report=Report((Row("up", "ConvTranspose2d", replaced, "replaced"),)),
        explanations=(),
    )
    return dataclasses.replace(found, **fields)


def reported(**fields):
    return Report((Row("up", "ConvTranspose2d", True, "replaced"),), **fields)


class TestVerdict:
    def test_worth_it(self):
        assert result(timing(2), timing(1)).verdict == "Worth it: 2.00x faster."

    def test_five_percent_is_the_least(self):
        assert result(timing(1.04, 0), timing(1, 0)).verdict.startswith("Not worth it: 1.04x")
        assert result(timing(1.06, 0), timing(1, 0)).worth_it

    def test_a_slowdown_is_not_worth_it(self):
        assert result(timing(1), timing(2)).verdict.startswith("Not worth it: 0.50x")

    def test_a_gain_within_the_spread_is_not_worth_it(self):
        verdict = result(timing(1.2, 0.3), timing(1, 0.3)).verdict
        assert verdict == "Not worth it: 1.20x is within the spread of the runs."

    @pytest.mark.parametrize("relative", [1e-3, math.nan, math.inf])
    def test_fast_and_wrong_is_not_worth_it(self, relative):
        wrong = result(timing(2), timing(1), relative)
        assert not wrong.agrees and not wrong.worth_it and wrong.verdict.startswith("DIFFERENT")
        wrong = result(timing(2), timing(1), 0.0, Difference(1.0, relative, "weight"))
        assert wrong.verdict.startswith("DIFFERENT")

    def test_without_a_layer_of_ours_times_say_nothing(self):
        found = result(timing(2), timing(1), replaced=False)
        assert not found.worth_it
        assert found.verdict == "Not worth it: nothing in the model is segfast's, before or after."

    def test_rounding_agrees(self):
        assert result(timing(2), timing(1), 1e-5).worth_it

    def test_what_optimize_left_as_it_was_is_told_once(self):
        left = Report((), gain=Gain(2.04, 3, "channels_last", 1, kept=False))
        ran = (Explanation("conv_transpose2d", "aten", "the tensors are on a CPU"),)  # a layer of ours in it
        # Its own times are then those of the model as it was, in two layouts.
        for ms in (0.5, 2):
            found = result(timing(1), timing(ms), report=left, explanations=ran)
            assert not found.worth_it
            assert found.verdict == (
                "Not worth it: 2.0 ms a call before (channels_last), 3.0 ms optimized, so the model was left "
                "as it was."
            )
            assert str(found).lower().count("not worth it") == 1 and "Not faster" not in str(found)

    def test_a_gain_that_optimize_measured_is_no_second_verdict(self):
        kept = reported(gain=Gain(2, 1, "as given", 1, kept=True))
        page = str(result(timing(3), timing(1), report=kept))
        assert "Worth it: 3.00x faster." in page and "times as fast on this CPU" not in page

    def test_the_rounding_of_the_dtype_computed_in_is_allowed(self):
        assert not result(timing(2), timing(1), 0.01).agrees
        found = result(timing(2), timing(1), 0.01, computed=torch.bfloat16)
        assert found.worth_it and "float32 computed in bfloat16" in str(found)
        found = result(timing(2), timing(1), 0.2, computed=torch.bfloat16)
        assert found.verdict.startswith("DIFFERENT: bfloat16's rounding")


@pytest.fixture
def bfloat16(monkeypatch):
    """`bfloat16(there)`: the CPU multiplies in it, or not."""
    return lambda there: monkeypatch.setattr(_check_advice, "cpu_has_bfloat16", lambda: there)


class TestAdvice:
    """The page's last line says what may gain more."""

    def test_nothing_more_is_known(self, bfloat16):
        bfloat16(False)
        found = result(timing(2), timing(1))
        assert advice(found) == "" and str(found).endswith("\nWorth it: 2.00x faster.")

    @pytest.mark.parametrize(("ms", "what"), [(1, "more"), (2, "something")])
    def test_bfloat16_where_the_cpu_has_it(self, bfloat16, ms, what):
        bfloat16(True)
        found = result(timing(2), timing(ms))
        assert str(found).endswith(
            f"{found.verdict} `--compute bfloat16`, segfast.optimize's dtype=torch.bfloat16, may gain {what} "
            "on this CPU."
        )

    @pytest.mark.parametrize(
        "fields", [{"compute": torch.bfloat16}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}], ids=str
    )
    def test_no_bfloat16_where_it_was_tried_or_serves_nothing(self, bfloat16, fields):
        bfloat16(True)
        assert advice(result(timing(2), timing(1), **fields)) == ""

    def test_calls_that_were_not_measured(self, bfloat16):
        bfloat16(False)
        unmeasured = reported(gain=Gain(2, 1, "as given", 1, kept=True, unmeasured=3))
        said = advice(result(timing(2), timing(1), report=unmeasured))
        assert said == "3 calls are not measured yet; run again, it goes on with them."

    @pytest.mark.parametrize(
        ("given", "after", "spread", "told"),
        [
            ("NCHW", 1, 0.01, True),
            ("channels_last", 1, 0.01, False),
            ("NCHW", 0.5, 0.01, False),
            ("NCHW", 1, 0.3, False),
        ],
        ids=["slower as given", "given so already", "optimize gains", "within the spread"],
    )
    def test_a_layout_that_is_faster_by_itself(self, bfloat16, given, after, spread, told):
        bfloat16(False)
        layouts = {"NCHW": timing(1.5, spread), "channels_last": timing(1, spread)}
        found = result(timing(1), timing(after), layout="channels_last", layouts=layouts, given=given)
        expected = "`model.to(memory_format=torch.channels_last)` alone is 1.50x as fast as the layout given."
        assert advice(found) == (expected if told else "")

    def test_training_on_a_cpu(self, bfloat16):
        bfloat16(True)
        agreed = Difference(0.0, 0.0, "weight")
        assert "try it without --train" in advice(result(timing(1), timing(1), gradient=agreed))
        assert advice(result(timing(2), timing(1), gradient=agreed)) == ""
        # Without it `optimize` has found nothing faster either.
        left = Report((), gain=Gain(2, 3, "as given", 1, kept=False))
        assert advice(result(timing(1), timing(1), gradient=agreed, report=left)) == ""

    @pytest.mark.parametrize("train", [False, True])
    def test_on_a_gpu(self, monkeypatch, train):
        device, agreed = torch.device("cuda"), Difference(0.0, 0.0, "weight")

        def advised(gain, has_bfloat16=False):
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
            report, gradient = reported(gain=gain), agreed if train else None
            return advice(result(timing(2), timing(1), report=report, device=device, gradient=gradient))

        gain = Gain(2, 1, "as given", 1, kept=True, gpu="NVIDIA H200", train=train)
        more = f"`segfast tune{' --train' if train else ''}` tries more tiles of each kernel."
        assert advised(gain) == more
        assert advised(None) == ""
        unmeasured = "3 calls are not measured yet; run again, it goes on with them."
        assert advised(dataclasses.replace(gain, unmeasured=3)) == f"{unmeasured} {more}"
        said = advised(gain, True)
        assert said.endswith(more) and ("may gain more on this GPU." in said) is not train


@pytest.fixture
def whole_model(monkeypatch, wins):
    """`whole_model(kept, ...)`: whether `optimize` finds the model faster, for each time it is asked."""
    wins("aten")
    asked = []

    def answer(*kept):
        answers = iter(kept)

        def gain(model, plain, inputs, dtype, train, fused):
            asked.append(dtype)
            name, error = (None, 0.0) if dtype is None else ("bfloat16", 0.01)
            return Gain(2, 3, "as given", 1, next(answers), name, error)

        monkeypatch.setattr("segfast._optimize.optimize.gain", gain)
        return asked

    return answer


@pytest.mark.measures
class TestMeasured:
    """Where `optimize` measures calls, and the model before and after."""

    def net(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, 2)
        ).eval()

    def test_a_model_left_as_it_was(self, whole_model):
        whole_model(False)
        found = check_model(self.net(), torch.randn(1, 3, 16, 16), **QUICK)
        assert found.agrees and found.output.absolute == 0 and not found.worth_it
        assert "so the model was left as it was" in found.verdict
        assert str(found).count("left as it was") == 1

    def test_computed_in_bfloat16(self, whole_model):
        asked = whole_model(True)
        found = check_model(self.net(), torch.randn(1, 3, 16, 16), compute=torch.bfloat16, **QUICK)
        assert asked == [torch.bfloat16] and found.computed == torch.bfloat16
        assert found.agrees and found.output.relative > 1e-4

    def test_asked_for_bfloat16_that_is_slower(self, whole_model):
        asked = whole_model(False, True)
        found = check_model(self.net(), torch.randn(1, 3, 16, 16), compute=torch.bfloat16, **QUICK)
        assert asked == [torch.bfloat16, None] and found.computed is None
        assert found.agrees and found.output.relative < 1e-4
        page = str(found)
        assert "Not faster in bfloat16, so not computed in it: 2.0 ms before, as given, 3.0 ms in" in page
        assert "left as it was" not in page and "--compute" not in page

    def test_the_command(self, whole_model, tmp_path, capsys):
        whole_model(True)
        (tmp_path / "mine.py").write_text("from torch import nn\nnet = nn.Conv2d(3, 4, 3)\n")
        arguments = [f"{tmp_path}/mine.py:net", "--size", "8x8", "--compute", "bf16", "--seconds", "0.01"]
        assert cli.main(["check", *arguments]) == 0
        assert "float32 computed in bfloat16" in capsys.readouterr().out
