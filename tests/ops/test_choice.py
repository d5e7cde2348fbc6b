"""Candidates are verified and timed; the fastest right one is remembered and runs where its call returns."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as TF

import segfast
from segfast.ops import _choice, _cpu, _measure, _prepared_weights
from segfast.ops._call import CANDIDATES, Call
from segfast.ops._choice import ATEN, Choice, choices
from tests.ops.test_choice_candidates import CALLS, CONV2D


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves while a candidate runs, by what the test says of it."""

    class Clock:
        def __init__(self) -> None:
            self.seconds = 0.0
            self.costs: dict[str, float] = {}

        def __call__(self) -> float:
            return self.seconds

    clock = Clock()
    monkeypatch.setattr(_measure, "clock", clock)
    for operation, candidates in CANDIDATES.items():
        timed = {name: _timed(clock, name, candidate) for name, candidate in candidates.items()}
        monkeypatch.setitem(CANDIDATES, operation, timed)
    return clock


def _timed(clock, name, candidate):
    def run(*args):
        clock.seconds += clock.costs.get(name, 1.0)
        return candidate.run(*args)

    return candidate._replace(run=run)


class TestMeasuring:
    def test_the_fastest_is_chosen(self, clock):
        clock.costs = {"onednn": 3.0, ATEN: 2.0, "matmul": 1.0}
        choice = _measure.measure(CALLS["1x1"])
        assert choice.name == "matmul"
        assert choice.us == pytest.approx({"onednn": 3e6, ATEN: 2e6, "matmul": 1e6})

    def test_a_wrong_one_is_refused_however_fast(self, clock, monkeypatch):
        clock.costs = {"wrong": 1e-3, "onednn": 2.0}
        wrong = CANDIDATES["conv2d"][ATEN]
        slightly = _timed(clock, "wrong", wrong._replace(run=lambda *args: wrong.run(*args) * 1.0001))
        monkeypatch.setitem(CANDIDATES, "conv2d", {**CANDIDATES["conv2d"], "wrong": slightly})
        choice = _measure.measure(CONV2D)
        assert choice.name != "wrong"
        assert "wrong" not in choice.us

    @pytest.mark.parametrize("row", [0, 5, 11])
    def test_a_wrong_row_at_an_edge_or_in_the_middle_is_seen(self, row, clock, monkeypatch):
        aten = CANDIDATES["conv2d"][ATEN]

        def spoiled(*args):
            y = aten.run(*args).clone()
            y[:, :, row, 3] += 0.01
            return y

        monkeypatch.setitem(CANDIDATES["conv2d"], "wrong", aten._replace(run=spoiled))
        assert "wrong" not in _measure.measure(CONV2D).us

    @pytest.mark.parametrize("spoil", [lambda y: y * float("nan"), lambda y: y[:, :1], lambda y: y.double()])
    def test_so_is_one_of_another_shape_dtype_or_value(self, spoil, clock, monkeypatch):
        aten = CANDIDATES["conv2d"][ATEN]
        run = lambda *args: spoil(aten.run(*args))  # noqa: E731
        monkeypatch.setitem(CANDIDATES["conv2d"], "wrong", aten._replace(run=run))
        assert "wrong" not in _measure.measure(CONV2D).us

    def test_so_is_one_that_fails(self, clock, monkeypatch):
        def fail(*args):
            raise RuntimeError("could not create a primitive")

        failing = CANDIDATES["conv2d"][ATEN]._replace(run=fail)
        monkeypatch.setitem(CANDIDATES["conv2d"], "failing", failing)
        assert "failing" not in _measure.measure(CONV2D).us

    @pytest.mark.parametrize("seconds, matmul, again", [(1.0, 1.05, 2), (1.0, 1.3, 1), (0.02, 1.3, 2)])
    def test_a_call_that_takes_long_runs_few_times(self, seconds, matmul, again, clock, monkeypatch):
        """A hopeless candidate runs once, to be verified; the others twice, but for very long ones."""
        costs = {"onednn": 3.0, ATEN: 1.0, "matmul": matmul}
        clock.costs = {name: seconds * cost for name, cost in costs.items()}
        monkeypatch.setattr(_measure, "_ENOUGH_S", seconds)
        ran = []
        for name, candidate in CANDIDATES["conv2d"].items():
            run = lambda *args, name=name, run=candidate.run: ran.append(name) or run(*args)  # noqa: E731
            monkeypatch.setitem(CANDIDATES["conv2d"], name, candidate._replace(run=run))
        assert _measure.measure(CALLS["1x1"]).name == ATEN
        assert ran.count("onednn") == 1
        assert ran.count("matmul") == ran.count(ATEN) == again

    def test_a_first_call_of_a_short_one_does_not_count(self, clock, monkeypatch):
        """It takes long by what is made ready for the calls after it."""
        clock.costs = dict.fromkeys(CANDIDATES["conv2d"], 3e-3)
        matmul, made_ready = CANDIDATES["conv2d"]["matmul"], []

        def run(*args):
            clock.seconds += 0.0 if made_ready else 4e-3
            clock.seconds -= 1e-3
            made_ready.append(True)
            return matmul.run(*args)

        monkeypatch.setitem(CANDIDATES["conv2d"], "matmul", matmul._replace(run=run))
        assert _measure.measure(CALLS["1x1"]).us["matmul"] == pytest.approx(2e3)

    @pytest.mark.parametrize(
        "aten, matmul, name", [(8.0, 5.0, ATEN), (18.0, 5.0, "matmul"), (4.0, 5.0, ATEN)]
    )
    def test_what_saves_less_than_asking_for_it_takes_is_not_chosen(self, aten, matmul, name, monkeypatch):
        us = {ATEN: aten, "matmul": matmul, "onednn": 99.0}
        monkeypatch.setattr(_measure, "_times", lambda runs, input: us)
        assert _measure.measure(CALLS["1x1"]) == Choice(name, us)

    def test_random_state_threads_and_default_dtype_stay(self, cache):
        before, threads = torch.get_rng_state(), torch.get_num_threads()
        torch.set_default_dtype(torch.float64)
        try:
            _measure.measure(CONV2D)
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == threads

    def test_most_multiplications_first_and_none_after_the_budget(self, cache, monkeypatch):
        seen = []
        now = iter(range(100))
        monkeypatch.setattr(_measure, "measure", lambda call: seen.append(call) or Choice(ATEN, {}))
        monkeypatch.setattr(_measure.time, "perf_counter", lambda: next(now))
        found = _measure.measure_and_keep([CONV2D, CALLS["1x1"], CALLS["large"]], budget_s=2.5)
        assert list(found) == seen == [CALLS["large"], CONV2D]

    @pytest.mark.parametrize("numbers, parts", [(72 * 6, 1), (72 * 2, 3), (80, 3), (100, 3), (72, 6)])
    def test_of_very_large_filters_a_part_is_measured(self, numbers, parts, clock, monkeypatch):
        clock.costs = {"onednn": 1.0, ATEN: 2.0}
        monkeypatch.setattr(_measure, "_LARGE_WEIGHT", numbers)
        choice, weights = _measure.measure(CONV2D), set()
        assert choice.name == "onednn" and choice.us[ATEN] == pytest.approx(2e6 * parts)
        for call in (CONV2D, CALLS["transposed"], CALLS["depthwise"]):
            monkeypatch.setattr(_measure, "_random_operands", lambda call: weights.add(call.weight) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                _measure.measure(call)
        whole = {CALLS["transposed"].weight, CALLS["depthwise"].weight}
        assert weights == {(6 // parts, 8, 3, 3)} | whole

    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    def test_aten_is_always_one(self, call, clock):
        assert ATEN in _measure.measure(call).us or _measure.measure(call).name == ATEN


DEEP = CONV2D._replace(input=(1, 4096, 4, 4), weight=(8, 4096, 3, 3))
EXACT_CALLS = {
    **CALLS,
    "deep": DEEP,
    "transposed with gaps": CALLS["transposed"]._replace(
        weight=(8, 6, 1, 2), stride=(3, 4), padding=(0, 1), output_padding=(2, 0)
    ),
}


class TestVerifying:
    """The reference: ATen on operands whose sums are exact in fp32, checked in fp64 itself."""

    @pytest.mark.parametrize("call", EXACT_CALLS.values(), ids=EXACT_CALLS)
    def test_sums_are_exact_in_fp32(self, call):
        """Those of all terms, and of the first so many."""
        call = call._replace(activation=None)
        operands = _measure._random_operands(call)
        rows = slice(0, call.output()[2])
        for share in (1, 2, 3):
            input = operands.input.clone()
            input[:, input.shape[1] // share :] = 0
            some = _measure._in_fp64(call, operands._replace(input=input), rows)
            assert torch.equal(some.float().double(), some)
        # In bfloat16 they are not, so that what computes in it is refused.
        assert call.dtype == torch.bfloat16 or not torch.equal(operands.input.bfloat16(), operands.input)

    @pytest.mark.parametrize("which", ["plain", "strided", "grouped", "depthwise", "transposed", "deep"])
    def test_results_are_of_the_size_of_the_input(self, which):
        call = EXACT_CALLS[which]._replace(activation=None, bias=False, residual=False)
        operands = _measure._random_operands(call)
        rows = slice(0, call.output()[2])
        y = _measure._convolution_in_fp64(call, operands.input, operands.weight, rows)
        assert 0.5 < operands.input.std() < 2
        assert 0.3 < y.std() < 3

    @pytest.mark.parametrize("call", EXACT_CALLS.values(), ids=EXACT_CALLS)
    def test_rows_in_fp64_are_those_of_the_whole(self, call):
        operands = _measure._random_operands(call)
        x, weight = operands.input.double(), operands.weight.double()
        if call.transposed:
            geometry = (call.stride, call.padding, call.output_padding, call.groups, call.dilation)
            whole = TF.conv_transpose2d(x, weight, None, *geometry)
        else:
            whole = TF.conv2d(x, weight, None, call.stride, call.padding, call.dilation, call.groups)
        height = call.output()[2]
        for rows in [slice(i, min(i + 2, height)) for i in range(height)]:
            some = _measure._convolution_in_fp64(call, operands.input, operands.weight, rows)
            torch.testing.assert_close(some, whole[:, :, rows], rtol=0, atol=0)

    @pytest.mark.parametrize("call", EXACT_CALLS.values(), ids=EXACT_CALLS)
    def test_some_channels_are_those_of_the_whole(self, call, monkeypatch):
        monkeypatch.setattr(_measure, "_CHANNELS", 2)
        operands = _measure._random_operands(call)
        rows = slice(0, call.output()[2])
        whole = _measure._in_fp64(call, operands, rows)
        few, its, part = _measure._of_some_channels(call, operands, whole)
        of_each = whole.shape[1] // call.groups if call.groups > 1 else 1
        assert part.shape[1] == min(2 * of_each, whole.shape[1])
        torch.testing.assert_close(_measure._in_fp64(few, its, rows), part, rtol=0, atol=0)

    @pytest.mark.parametrize("call", [CONV2D, DEEP], ids=["plain", "deep"])
    def test_one_that_computes_in_bfloat16_is_refused(self, call, clock, monkeypatch):
        aten = CANDIDATES["conv2d"][ATEN]
        run = lambda call, x, *others: aten.run(call, x.bfloat16().float(), *others)  # noqa: E731
        monkeypatch.setitem(CANDIDATES["conv2d"], "wrong", aten._replace(run=run))
        us = _measure.measure(call).us
        assert "wrong" not in us
        assert len(us) > 1

    @pytest.mark.parametrize("which", ["plain", "transposed", "depthwise", "bfloat16"])
    def test_where_aten_is_not_exact_nothing_is_compared_with_it(self, which, clock, monkeypatch):
        call = CALLS[which]
        candidates = CANDIDATES[call.operation]
        aten = candidates[ATEN]
        monkeypatch.setitem(
            candidates, ATEN, aten._replace(run=lambda *args: aten.run(*args) * (1 + 2.0**-9))
        )
        assert _measure.measure(call) == Choice(ATEN, {})


class TestDispatch:
    def _remember(self, call: Call, name: str) -> None:
        choices().add(call._replace(threads=torch.get_num_threads()), Choice(name, {}))

    def _ran(self, function, *args, **kwargs) -> str:
        return segfast.explain(function, *args, **kwargs)[0].backend

    def _args(self):
        x = torch.randn(CONV2D.input).contiguous(memory_format=torch.channels_last)
        return x, torch.randn(CONV2D.weight), torch.randn(6)

    def _conv2d(self, x, w, b):
        return segfast.functional.conv2d(x, w, b, padding=1, activation="relu")

    def test_a_choice_runs(self):
        args = self._args()
        assert self._ran(self._conv2d, *args) == "aten"
        self._remember(CONV2D, "onednn")
        assert self._ran(self._conv2d, *args) == "onednn"
        torch.testing.assert_close(self._conv2d(*args), TF.relu(TF.conv2d(*args, padding=1)))

    def test_not_for_another_dtype_option_or_number_of_threads(self):
        x, w, b = self._args()
        self._remember(CONV2D, "onednn")
        with torch.no_grad():
            assert self._ran(self._conv2d, x.double(), w.double(), b.double()) == "aten"
            assert self._ran(lambda: segfast.functional.conv2d(x, w, b, padding=1)) == "aten"
        _choice.forget_choices()
        choices().add(CONV2D._replace(threads=torch.get_num_threads() + 1), Choice("onednn", {}))
        assert self._ran(self._conv2d, x, w, b) == "aten"

    def test_not_where_a_gradient_is_needed_or_somebody_listens(self, monkeypatch):
        x, w, b = self._args()
        self._remember(CONV2D, "onednn")
        ran = []
        candidate = CANDIDATES["conv2d"]["onednn"]
        run = lambda *args: ran.append(1) or candidate.run(*args)  # noqa: E731
        monkeypatch.setitem(CANDIDATES["conv2d"], "onednn", candidate._replace(run=run))
        self._conv2d(x, w, b)
        assert len(ran) == 1
        w.requires_grad_()
        self._conv2d(x, w, b).sum().backward()
        assert w.grad is not None
        w.requires_grad_(False)
        with torch.no_grad():
            self._conv2d(x, w, b)
            assert len(ran) == 2
            torch.func.vmap(lambda t: self._conv2d(t, w, b))(x[None])
            torch.jit.trace(lambda t: self._conv2d(t, w, b), x, check_trace=False)
            with segfast.backend("aten"):
                self._conv2d(x, w, b)
        assert len(ran) == 2

    def test_the_nearest_size_of_the_same_call(self):
        _, w, b = self._args()
        self._remember(CONV2D, "onednn")
        near, far = torch.randn(1, 8, 20, 20), torch.randn(1, 8, 40, 40)
        to = lambda t: t.contiguous(memory_format=torch.channels_last)  # noqa: E731
        assert self._ran(self._conv2d, to(near), w, b) == "onednn"
        assert self._ran(self._conv2d, to(far), w, b) == "aten"
        torch.testing.assert_close(self._conv2d(to(near), w, b), TF.relu(TF.conv2d(near, w, b, padding=1)))
        with pytest.raises(RuntimeError):  # torch's own message, for an image smaller than the kernel
            segfast.functional.conv2d(to(torch.randn(1, 8, 1, 9)), w, b, activation="relu")

    def test_a_weight_that_was_written_to_is_prepared_anew(self):
        x, w, b = self._args()
        self._remember(CONV2D, "onednn")
        for write in (lambda: w.mul_(2), lambda: w.copy_(torch.randn_like(w)), lambda: w[0].zero_()):
            self._conv2d(x, w, b)
            write()
            torch.testing.assert_close(self._conv2d(x, w, b), TF.relu(TF.conv2d(x, w, b, padding=1)))
        w.data = torch.randn_like(w)
        torch.testing.assert_close(self._conv2d(x, w, b), TF.relu(TF.conv2d(x, w, b, padding=1)))

    def test_what_was_prepared_goes_with_its_weight(self):
        x, w, b = self._args()
        self._remember(CONV2D, "onednn")
        before = len(_prepared_weights._kept)
        self._conv2d(x, w, b)
        assert len(_prepared_weights._kept) == before + 1
        del w
        assert len(_prepared_weights._kept) == before

    def test_in_inference_mode_and_on_threads(self):
        args = self._args()
        self._remember(CONV2D, "onednn")
        expected = TF.relu(TF.conv2d(*args, padding=1))
        with torch.inference_mode():
            torch.testing.assert_close(self._conv2d(*args), expected)
            inference = [t.clone() for t in args]
            torch.testing.assert_close(self._conv2d(*inference), expected)
        results: list[Tensor] = []
        threads = [threading.Thread(target=lambda: results.append(self._conv2d(*args))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            torch.testing.assert_close(result, expected)
        assert len(results) == 4

    def test_autocast_keeps_fp32_weights_prepared_in_bf16(self):
        call = CONV2D._replace(dtype=torch.bfloat16)
        if not CANDIDATES["conv2d"]["onednn"].serves(call):
            pytest.skip("oneDNN does not multiply bfloat16 on this CPU")
        x, w, b = self._args()
        self._remember(call, "onednn")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self._conv2d(x, w, b)
            assert self._ran(self._conv2d, x, w, b) == "onednn"
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), TF.relu(TF.conv2d(x, w, b, padding=1)), rtol=0.02, atol=0.1)


class TestAutotune:
    @pytest.mark.measures
    def test_it_measures_at_first_sight_and_remembers(self, cache, clock, monkeypatch):
        clock.costs = {"onednn": 0.5}
        x, w = torch.randn(1, 8, 9, 9), torch.randn(6, 8, 3, 3)
        measured = []
        measure = _measure.measure
        monkeypatch.setattr(_measure, "measure", lambda call: measured.append(call) or measure(call))
        with segfast.autotune():
            segfast.functional.conv2d(x, w)
            y = segfast.functional.conv2d(x, w)
        assert len(measured) == 1
        torch.testing.assert_close(y, TF.conv2d(x, w))
        _choice.forget_choices()
        assert [choice.name for choice in choices().measured.values()] == ["onednn"]
        segfast.functional.conv2d(x, torch.randn(6, 8, 5, 5))
        assert len(measured) == 1

    @pytest.mark.parametrize("looks_on", ["compile", "export", "trace", "vmap", "gradients"])
    def test_nothing_is_measured_where_somebody_looks_on(self, looks_on, cache, monkeypatch):
        monkeypatch.setattr(_measure, "measure", None)
        x, w = torch.randn(1, 8, 9, 9), torch.randn(6, 8, 3, 3)
        plain = torch.nn.Module()
        plain.forward = lambda t: segfast.functional.conv2d(t, w)
        with segfast.autotune(), torch.set_grad_enabled(looks_on == "gradients"):
            if looks_on == "compile":
                torch.compile(plain.forward, backend="eager", fullgraph=True)(x)
            elif looks_on == "export":
                torch.export.export(plain, (x,))
            elif looks_on == "trace":
                torch.jit.trace(plain.forward, x, check_trace=False)
            elif looks_on == "vmap":
                torch.func.vmap(plain.forward)(x[None])
            else:
                plain.forward(x.requires_grad_()).sum().backward()
        assert not choices().measured

    def test_a_variable_asks_for_it_in_a_whole_program(self, cache):
        code = (
            "import torch, segfast\n"
            "from segfast.ops import _choice, _measure\n"
            "_measure.measure = lambda call: _choice.Choice('aten', {})\n"
            "with torch.no_grad():\n"
            "    segfast.functional.conv2d(torch.randn(1, 8, 9, 9), torch.randn(6, 8, 3, 3))\n"
            "print(len(_choice.choices().measured), _choice.measures_unseen())\n"
        )
        for value, printed in (("1", "1 True"), ("0", "0 False"), (None, "0 False")):
            environment = {k: v for k, v in os.environ.items() if k != "SEGFAST_AUTOTUNE"}
            environment |= {"SEGFAST_CACHE": str(cache / str(value))}
            environment |= {} if value is None else {"SEGFAST_AUTOTUNE": value}
            run = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
            )
            assert run.stdout.strip() == printed

    @pytest.mark.measures
    def test_what_torch_refuses_torch_refuses(self, cache):
        with segfast.autotune(), pytest.raises(RuntimeError, match="channels"):
            segfast.functional.conv2d(torch.randn(1, 7, 9, 9), torch.randn(6, 8, 3, 3))
        assert not choices().measured


def test_collecting_lists_the_calls_and_their_weights():
    x, w = torch.randn(1, 8, 9, 9), torch.randn(6, 8, 3, 3)
    with torch.no_grad(), _choice.collect() as collected:
        for _ in range(2):
            segfast.functional.conv2d(x, w)
    assert list(collected.counts.values()) == [2]
    (call,) = collected.counts
    assert collected.by_weight() == {id(w): [call, call]}
    assert _cpu.CANDIDATES is CANDIDATES


def test_calls_that_are_only_listed_are_not_computed():
    x, w = torch.randn(1, 8, 9, 9), torch.randn(6, 8, 3, 3)
    with torch.no_grad(), _choice.collect(zeros=True) as collected:
        y = segfast.functional.conv2d(x, w)
        choices().add(next(iter(collected.counts)), Choice("onednn", {}))
        known = segfast.functional.conv2d(x, w)
    assert list(collected.counts.values()) == [2]
    assert y.shape == (1, 6, 7, 7)
    assert not y.any()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(known, y)
    assert _prepared_weights._kept[id(w)].made  # for the next call
