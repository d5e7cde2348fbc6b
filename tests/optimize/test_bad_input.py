"""Bad input of `optimize`, and of the commands that call it: one clear message, and the model as it was."""

import errno
import json
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import segfast
from segfast import cli
from segfast._optimize import fuse, measure, optimize, outcome
from segfast.ops import _choice_files, _proofs, _prove_apart
from segfast.ops._choice import Choice, choices
from segfast.ops._prove import ProofRow
from tests.forget import forget
from tests.ops.test_gpu import CALL
from tests.optimize.measured_network import image, net, ran

pytestmark = pytest.mark.measures


def listen(*_):
    """A hook."""


def hooked() -> nn.Module:
    """A network in train mode with hooks, one frozen weight and one in channels_last."""
    model = net().train()
    model.up.register_forward_hook(listen)
    model.classifier.register_forward_pre_hook(listen)
    model.conv.weight.requires_grad_(False)
    model.stem[0].weight.data = model.stem[0].weight.data.contiguous(memory_format=torch.channels_last)
    return model


def look(model: nn.Module) -> dict[str, Any]:
    """All there is to a model: classes, modes, attributes, hooks, and parameters with values and layout."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | tuple | None)}
        hooks = {k: list(v.values()) for k, v in vars(module).items() if k.endswith("_hooks") and v}
        found[name] = (type(module), sorted(vars(module)), plain, hooks)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        values = None if t.is_meta else t.detach().clone().contiguous().view(-1).tolist()
        found[f"tensor {name}"] = (id(t), values, t.stride(), t.requires_grad, t.grad, t.device)
    return found


@pytest.fixture
def unchanged():
    """`unchanged(model)`: checked, at the end, to look as it does now."""
    watched = []
    yield lambda model: watched.append((model, look(model))) or model
    for model, before in watched:
        assert look(model) == before


class Fails(nn.Module):
    """A network that is listed as any other, and then raises an error of its own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.net, self.error = hooked(), error

    def forward(self, x):
        if not x.is_meta and not torch.compiler.is_compiling():
            raise self.error
        return self.net(x)


@pytest.mark.parametrize("inplace", [False, True])
class TestTheModelStays:
    @pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), "60", None])
    def test_budget(self, budget, inplace, unchanged):
        with pytest.raises(ValueError, match="budget must be a positive number of seconds, got"):
            segfast.optimize(unchanged(hooked()), image(), budget=budget, inplace=inplace)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "bfloat16"])
    def test_dtype(self, dtype, inplace, unchanged):
        with pytest.raises(ValueError, match=r"dtype must be None or torch.bfloat16, got"):
            segfast.optimize(unchanged(hooked()), image(), dtype=dtype, inplace=inplace)

    def test_dtype_without_examples(self, inplace, unchanged):
        with pytest.raises(ValueError, match="dtype needs example_inputs"):
            segfast.optimize(unchanged(hooked()), dtype=torch.bfloat16, inplace=inplace)

    def test_two_devices(self, inplace, unchanged):
        model = hooked()
        model.classifier.to("meta")
        with pytest.raises(ValueError, match="model must be on one device to be measured, got cpu, meta"):
            segfast.optimize(unchanged(model), image(), inplace=inplace)

    @pytest.mark.parametrize(
        ("example", "error", "said"),
        [
            (torch.zeros(1, 4, 32, 32), RuntimeError, "to have 3 channels, but got 4"),
            (torch.zeros(1, 3, 32, 32, dtype=torch.float64), RuntimeError, "expected scalar type Double"),
            (torch.zeros(3, 32, 32), ValueError, "expected 4D input"),
            ((), TypeError, "missing 1 required positional argument"),
            ({"y": torch.zeros(1, 3, 32, 32)}, TypeError, "unexpected keyword argument 'y'"),
            ([torch.zeros(1, 3, 32, 32)], TypeError, "example_inputs must be a tensor or a tuple or dict"),
        ],
        ids=["channels", "dtype", "batch", "too few", "unknown", "a list"],
    )
    def test_an_example_it_cannot_run_on(self, example, error, said, inplace, unchanged):
        with pytest.raises(error, match=said):
            segfast.optimize(unchanged(hooked()), example, inplace=inplace)

    @pytest.mark.parametrize("of", ["ours", "theirs"])
    def test_a_network_of_one_kind_of_layer(self, of, inplace, unchanged):
        make = {"ours": segfast.nn.ConvBNAct, "theirs": nn.Conv2d}[of]
        model = unchanged(nn.Sequential(make(3, 8, 3), make(8, 8, 3)))
        with pytest.raises(RuntimeError, match="channels"):
            segfast.optimize(model, torch.zeros(1, 4, 16, 16), inplace=inplace)

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("its own"), ValueError("its own"), KeyError("its own"), KeyboardInterrupt("its own")],
    )
    def test_an_error_of_its_own(self, error, inplace, unchanged):
        with pytest.raises(type(error), match="its own"):
            segfast.optimize(unchanged(Fails(error)), image(), inplace=inplace)

    @pytest.mark.parametrize("where", ["difference", "lay_out", "all_channels_last", "gain"])
    def test_whatever_goes_wrong_on_the_way(self, where, inplace, unchanged, wins, model_takes, monkeypatch):
        wins("onednn")
        model_takes(3, 2, 1)

        def fails(*args, **kwargs):
            raise MemoryError("no more of it")

        monkeypatch.setattr(fuse if where == "difference" else optimize, where, fails)
        monkeypatch.setattr(optimize, "choose", lambda *args: 0)
        if where == "difference":
            monkeypatch.setattr(measure, "MEASURES", False)  # else outputs are compared by `gain`
        if where == "all_channels_last":
            monkeypatch.setattr(optimize, "is_measured_on_gpu", lambda *args: True)
        with pytest.raises(MemoryError, match="no more of it"):
            segfast.optimize(unchanged(hooked()), image(), inplace=inplace)


def no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=["a file", "below a file", "read-only", "full"])
def unwritable(request, cache, tmp_path, monkeypatch):
    """A cache that cannot be written, of a kind that root meets too; `tmp_path` is made before."""
    if request.param == "read-only":

        def mkdir(path, *args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(type(cache), "mkdir", mkdir)
    elif request.param == "full":
        for module in (_choice_files, outcome, _proofs):
            monkeypatch.setattr(module, "temporary_beside", no_space)
    else:
        cache.write_text("a file")
        below = cache / "further" if request.param == "below a file" else cache
        monkeypatch.setenv("SEGFAST_CACHE", str(below))
    return cache


@pytest.fixture
def one_warning(unwritable):
    """Checks, at the end, that what happened was told once and no traceback with it."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
    said = [str(each.message) for each in warned if "segfast" in str(each.message)]
    assert len(said) == 1 and "cannot be written (" in said[0] and "forgotten at exit" in said[0], said


def rows(passed):
    return [
        ProofRow(name, "bfloat16", "3x3", 0.0, 1.0, passed)
        for name in ("conv2d_forward", "parallel_conv2d_forward")
    ]


class TestUnwritableCaches:
    def test_optimize_goes_on(self, one_warning, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)
        for _ in range(2):
            fast = segfast.optimize(net(), image())
            assert ran(fast, image()) == ["onednn"] * 4

    def test_autotune_goes_on(self, one_warning, wins):
        wins("onednn")
        with torch.no_grad(), segfast.autotune():
            for size in (8, 40):
                segfast.functional.conv2d(torch.randn(1, 3, size, size), torch.randn(4, 3, 3, 3))
        assert {choice.name for choice in choices().measured.values()} == {"onednn"}

    def test_shipped_choices_are_taken(self, one_warning, tmp_path, pretended_gpu):
        for call in (CALL, CALL._replace(gradients=True)):
            _choice_files.remember(call, Choice("aten", {}))
        content = _choice_files.choices_row(_choice_files.gpu_machine(pretended_gpu), choices().measured)
        shipped = tmp_path / "model.json"
        shipped.write_text(json.dumps([content], default=_choice_files.plain))
        forget()
        assert segfast.load_choices(shipped) == 2 and len(choices().measured) == 2

    def test_proofs_hold_for_the_process(self, one_warning, pretended_gpu):
        for passed in (False, True):
            _proofs.write(rows(passed), torch.device("cuda", 0))
            assert _proofs.proven("conv2d_forward", torch.bfloat16, torch.device("cuda", 0)) is passed
        _choice_files.write({CALL: Choice("aten", {})})  # which is of the same folder

    def test_prove_says_that_it_is_forgotten(self, one_warning, pretended_gpu, monkeypatch, capsys):
        monkeypatch.setattr(_proofs, "prove_apart", lambda *args, **kwargs: iter(rows(True)))
        monkeypatch.setattr(_prove_apart, "compile_proofs", lambda *args: None)
        assert cli.main(["prove", "--family", "conv2d", "--dtype", "bf16"]) == 0
        out = capsys.readouterr().out
        assert (
            "2 of 2 right" in out
            and "forgotten, as this cannot be written: " in out
            and "remembered" not in out
        )

    @pytest.mark.parametrize("command", [["tune"], ["check", "--seconds", "0.01"]], ids=str)
    def test_commands_go_on(self, command, one_warning, wins, model_takes, tmp_path, monkeypatch, capsys):
        wins("onednn")
        model_takes(3, 2, 1)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine.py").write_text("from torch import nn\nnet = nn.Conv2d(3, 4, 3)\n")
        name, *options = command
        assert cli.main([name, "mine.py:net", "--size", "16x16", "--device", "cpu", *options]) == 0
        captured = capsys.readouterr()
        assert "onednn" in captured.out and captured.err == ""
