"""The results of `optimize` for a model are remembered, and hold only for that model as it was."""

import copy
import itertools
import json
import multiprocessing
import os

import pytest
import torch
from torch import nn

import segfast
from segfast._optimize import gain as gains
from segfast._optimize import measure, outcome
from segfast._optimize.eligible import RECORD
from segfast.ops import _choice, _measure
from segfast.ops._choice import ATEN, Choice, choices
from tests.optimize.measured_network import Net, image, net, ran

pytestmark = pytest.mark.measures


@pytest.fixture
def timed(wins, model_takes, monkeypatch):
    """True if a call of `optimize` timed the model."""
    wins("onednn")
    model_takes(3, 2, 1)
    milliseconds, calls = gains._milliseconds, []
    monkeypatch.setattr(gains, "_milliseconds", lambda *a: calls.append(a) or milliseconds(*a))

    def optimized(model, x, **options):
        calls.clear()
        _choice.forget_choices()
        return segfast.optimize(model, x, **options), bool(calls)

    return optimized


@pytest.fixture
def known(timed):
    """The same, of a model that is known."""
    assert timed(net(), image())[1]
    return timed


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_time_the_model_is_not_even_run(inplace, known, monkeypatch):
    first, _ = known(net(), torch.zeros(1, 3, 32, 32))
    with monkeypatch.context() as patch:
        patch.setattr(measure, "call", None)
        patch.setattr(gains, "call", None)
        again, was_timed = known(net(), image(), inplace=inplace)
    assert not was_timed
    gain = segfast.report(again).gain
    assert gain == segfast.report(first).gain and gain.measured_on
    assert f"(measured on {gain.measured_on})" in str(segfast.report(again))
    assert "onednn: 1000 us (aten 2000" in str(segfast.report(again))
    x = image()
    assert ran(again, x) == ["onednn"] * 4
    with torch.no_grad():
        y = again(x)
        torch.testing.assert_close(y, net()(x), rtol=1e-4, atol=1e-5)
    assert y.is_contiguous()  # as before


def test_that_nothing_is_faster_is_remembered_too(timed, model_takes):
    model_takes(3, 2, 2.5)
    assert timed(net(), image())[1]
    fast, was_timed = timed(net(), image())
    assert not was_timed
    assert type(fast.conv) is nn.Conv2d
    assert fast.conv.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert fast(image()).is_contiguous()
    assert "left as it was, but for channels_last weights" in str(segfast.report(fast))


class Doubled(Net):
    """The same modules with the same weights, and another forward."""

    def forward(self, x):
        return 2 * super().forward(x)


def weights(model):
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] += 1e-3
    return model


def buffers(model):
    model.stem[1].running_mean[0] += 1e-3
    return model


def eps(model):
    model.stem[1].eps *= 2
    return model


def forward(model):
    # By its name too.
    model.__class__ = type("Net", (Doubled,), {"__module__": Net.__module__, "__qualname__": "Net"})
    return model


def hooked(model):
    model.up.register_forward_hook(lambda module, args, output: output + 1)
    return model


def activation(model):
    model.stem[2] = nn.ReLU6()
    return model


@pytest.mark.parametrize("change", [weights, buffers, eps, forward, hooked, activation])
def test_of_another_model_nothing_is_known(change, known):
    assert not known(net(), image())[1]
    model = change(net())
    fast, was_timed = known(copy.deepcopy(model), image())
    assert was_timed
    with torch.no_grad():
        x = image()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 3, 64, 32),
        torch.zeros(2, 3, 32, 32),
        torch.zeros(1, 3, 32, 32).to(memory_format=torch.channels_last),
    ],
)
def test_of_other_images_nothing_is_known(x, known):
    assert known(net(), x)[1]


def test_with_other_threads_nothing_is_known(known):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert known(net(), image())[1]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("what", ["machine", "_digest_of_package"])
def test_on_another_machine_or_with_another_version_nothing_is_known(what, known, monkeypatch):
    monkeypatch.setattr(outcome, what, lambda: "another")
    assert known(net(), image())[1]


def test_with_other_layers_replaced_nothing_is_known(known):
    assert known(net(), image(), filter_fn=lambda name, module: name != "up")[1]
    assert known(net(), image(), dtype=torch.bfloat16)[1]


def test_with_other_choices_nothing_is_known(known, monkeypatch):
    measured = dict(choices().measured)
    first, *others = measured
    monkeypatch.setattr(_choice, "forget_choices", lambda: None)
    choices().add(first, Choice(ATEN, {}))
    assert known(net(), image())[1]
    assert not known(net(), image())[1]
    _choice._choices = _choice.Choices()
    for call in others:
        choices().add(call, measured[call])
    assert known(net(), image())[1]


def test_tune_measures_anew(known):
    with measure.thoroughly():
        assert known(net(), image())[1]


def test_a_forward_that_asks_for_values_is_measured_each_time(timed):
    class Asks(Net):
        def forward(self, x):
            return super().forward(x) if torch.compiler.is_compiling() or x.sum() < 1e9 else x

    for _ in range(2):
        torch.manual_seed(0)
        assert timed(Asks().eval(), image())[1]


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"key": 1', "\x00"])
def test_a_corrupt_file_is_a_warning(content, known, cache):
    (file,) = (cache / "models").iterdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match="cannot be read"):
        fast, was_timed = known(net(), image())
    assert was_timed
    assert ran(fast, image()) == ["onednn"] * 4
    assert not known(net(), image())[1]


@pytest.mark.parametrize("part", ["calls", "layers", "last", "gain", "weights", "date", "disturbed"])
def test_a_file_that_lacks_a_part_is_one_too(part, known, cache):
    (file,) = (cache / "models").iterdir()
    found = json.loads(file.read_text())
    del found[part]
    file.write_text(json.dumps(found))
    with pytest.warns(UserWarning, match="cannot be read"):
        assert known(net(), image())[1]


def _keep(file, gain):
    kept = outcome.Outcome({})
    kept._file = file
    for _ in range(50):
        kept.keep(nn.Conv2d(1, 1, 1), gain, (), True)


def test_processes_that_write_at_once_leave_a_whole_file(cache):
    file = cache / "models" / "one.json"
    gain = gains.Gain(2, 1, "as given", 1, True)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_keep, args=(file, gain)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert json.loads(file.read_text())["gain"]["before_ms"] == 2
    assert list(file.parent.iterdir()) == [file]


def test_the_files_written_the_longest_ago_go(timed, cache, monkeypatch):
    monkeypatch.setattr(outcome, "_MOST", 2)
    folder, kept = cache / "models", []
    for batch in (1, 2, 3):
        assert timed(net(), torch.zeros(batch, 3, 32, 32))[1]
        (file,) = set(folder.iterdir()) - set(kept)
        os.utime(file, (batch, batch))
        kept.append(file)
    assert set(folder.iterdir()) == set(kept[1:])
    assert timed(net(), torch.zeros(1, 3, 32, 32))[1]
    assert not timed(net(), torch.zeros(3, 3, 32, 32))[1]


@pytest.fixture
def busy(monkeypatch):
    """A quota of the processor, or threads that sleep while they wait, never end and look as this does."""
    monkeypatch.setattr(_measure, "quiet_check", lambda: lambda: False)


def test_on_a_busy_machine_what_was_found_twice_is_remembered(timed, busy):
    fast, was_timed = timed(net(), image())
    assert was_timed and "calls" not in vars(fast)[RECORD]  # only for what is remembered
    assert timed(net(), image())[1]
    fast, was_timed = timed(net(), image())
    assert not was_timed and segfast.report(fast).gain.kept


def test_what_differs_the_second_time_is_not(timed, busy, model_takes):
    for ms in ((3, 2, 1), (2, 3, 1), (3, 2, 2.5)):
        model_takes(*ms)
        assert timed(net(), image())[1]
    assert timed(net(), image())[1]
    assert not timed(net(), image())[1]


def test_of_a_model_timed_while_the_machine_was_busy_nothing_is_remembered(timed, monkeypatch):
    """Though each of its calls was timed in quiet: the first to watch is who times all."""
    answers = itertools.chain([False], itertools.repeat(True))

    def quiet_check():
        was_quiet = next(answers)
        return lambda: was_quiet

    monkeypatch.setattr(_measure, "quiet_check", quiet_check)
    assert timed(net(), image())[1]
    assert timed(net(), image())[1]
    assert not timed(net(), image())[1]


def test_models_of_segfast_are_remembered_too(timed):
    def model():
        torch.manual_seed(0)
        return segfast.models.create("selfie_segmenter", in_channels=3, num_classes=1).eval()

    assert timed(model(), torch.zeros(1, 3, 32, 32))[1]
    assert not timed(model(), torch.zeros(1, 3, 32, 32))[1]
