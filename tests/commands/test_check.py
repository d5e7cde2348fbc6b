"""`segfast check` and `check_model`: what it compares, what it says, and what it leaves alone."""

import math
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import segfast
from segfast import _timing, cli
from segfast._errors import UserError
from segfast._timing import interleave
from segfast.commands import check as check_module
from segfast.commands._difference import worst
from segfast.commands._memory import peak_bytes
from segfast.commands.check import check_model

QUICK = {"budget_s": 0.01}
NAN = math.nan


def up(channels=4):
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)


@pytest.mark.parametrize(("slow", "worth_it"), [("aten", True), ("auto", False)])
def test_a_difference_in_time_is_found(monkeypatch, slow, worth_it):
    right, now = segfast.nn.ConvTranspose2d.forward, [0.0]

    def slow_on_one_backend(self, x):
        now[0] += 5e-3 if segfast.get_backend() == slow else 1e-3
        return right(self, x)

    monkeypatch.setattr(_timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(segfast.nn.ConvTranspose2d, "forward", slow_on_one_backend)
    found = check_model(segfast.nn.ConvTranspose2d(4, 4, 2), torch.randn(1, 4, 3, 3), **QUICK)
    assert found.agrees and found.worth_it is worth_it
    assert found.ratio == pytest.approx(5 if worth_it else 1 / 5)


class Watched(nn.Module):
    """A convolution, then an up-convolution; calls `seen` with the layouts of its images and weights."""

    def __init__(self, seen):
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 4, 3), up()
        self.seen = seen

    def forward(self, x):
        self.seen({suggested(t) for t in (x, self.conv.weight, self.up.weight)})
        return self.up(self.conv(x))


def suggested(t):
    last = t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("given", LAYOUTS)
@pytest.mark.parametrize("fast", LAYOUTS)
def test_before_is_in_the_faster_layout_and_the_page_says_which(monkeypatch, fast, given, train):
    """Where a call takes 2 ms, and 3 ms more on ATen in the slow layout."""
    [slow] = [name for name in LAYOUTS if name != fast]
    now, seen = [0.0], []

    def call(layouts):
        seen.append((segfast.get_backend(), layouts))
        now[0] += 5e-3 if seen[-1] == ("aten", {LAYOUTS[slow]}) else 2e-3

    monkeypatch.setattr(_timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    model = Watched(call).to(memory_format=LAYOUTS[given])
    image = torch.randn(2, 4, 6, 5).contiguous(memory_format=LAYOUTS[given])
    strides = [t.stride() for t in (image, *model.parameters())]
    found = check_model(model, image, train=train, **QUICK)
    assert found.agrees and found.layout == fast and not found.worth_it
    assert found.before.wall_us == pytest.approx(2e3) and found.ratio == pytest.approx(1)
    assert found.layouts[slow].wall_us == pytest.approx(5e3)
    page = " ".join(str(found).split())
    assert f"Before is in {fast}, weights and images, the faster of both layouts ({slow}: 5.000 ms)" in page
    # All of it in one or the other; the optimized model gets what the caller has.
    assert {frozenset(layouts) for name, layouts in seen if name == "aten"} == {
        frozenset([layout]) for layout in LAYOUTS.values()
    }
    assert all(layouts == {LAYOUTS[given]} for name, layouts in seen if name == "auto")
    assert [t.stride() for t in (image, *model.parameters())] == strides


def test_a_conversion_of_the_images_is_part_of_the_time(monkeypatch):
    class Conversions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            copies = function in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
            if copies and suggested(result) is not suggested(args[0]):
                found.append(suggested(result))
            return result

    timed = {}
    monkeypatch.setattr(
        check_module,
        "interleave",
        lambda runs, *args, **kwargs: timed.update(runs) or interleave(runs, *args, **kwargs),
    )
    check_model(up(), torch.randn(2, 4, 6, 5), **QUICK)
    converted = {}
    for name, run in timed.items():
        found = []
        with Conversions():
            run()
        converted[name] = found
    assert converted == {"NCHW": [], "channels_last": [torch.channels_last], "after": []}


def test_a_model_without_images_has_one_layout():
    found = check_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4), **QUICK)
    assert list(found.layouts) == [found.layout] and "layout" not in str(found)


def test_the_page_names_everything():
    found = check_model(nn.Sequential(nn.Conv2d(1, 4, 1), up()), torch.randn(1, 1, 9, 7), train=True, **QUICK)
    page = str(found)
    for part in (
        "training step (forward and backward), input [1, 1, 9, 7], float32, CPU",
        "before (ATen)",
        "after (optimized)",
        "wall time, ms",
        "weights and images, the faster of both layouts (",
        "peak memory, MiB",
        "torch's own allocations",
        "largest error of the output: ",
        "largest error of a gradient: ",
        "1 of 1 layers replaced.",
        "the tensors are on a CPU",
        found.verdict,
    ):
        assert part in page, part


def test_a_wrong_layer_is_found(monkeypatch):
    right = segfast.nn.ConvTranspose2d.forward
    monkeypatch.setattr(segfast.nn.ConvTranspose2d, "forward", lambda self, x: 1.01 * right(self, x))
    found = check_model(up(), torch.randn(1, 4, 5, 5), **QUICK)
    assert found.output.relative == pytest.approx(0.01, rel=1e-3) and not found.agrees


def test_a_wrong_gradient_is_found_and_named(monkeypatch):
    right = segfast.nn.ConvTranspose2d.forward

    def wrong_backward(self, x):
        self.weight.register_hook(lambda grad: 1.5 * grad)
        return right(self, x)

    monkeypatch.setattr(segfast.nn.ConvTranspose2d, "forward", wrong_backward)
    found = check_model(nn.Sequential(up(), nn.Conv2d(4, 1, 1)), torch.randn(1, 4, 5, 5), train=True, **QUICK)
    assert found.output.relative < 1e-6
    assert found.gradient.where == "0.weight" and found.gradient.relative == pytest.approx(0.5, rel=1e-3)


def test_nan_after_is_a_difference_and_nan_before_and_after_is_none(monkeypatch):
    class Overflow(nn.Module):
        def forward(self, x):
            return torch.cat([x, x / 0, 0 * x / 0])

    both = check_model(nn.Sequential(up(), Overflow()), torch.randn(1, 4, 5, 5), **QUICK)
    assert both.agrees and math.isfinite(both.output.absolute)
    right = segfast.nn.ConvTranspose2d.forward
    monkeypatch.setattr(segfast.nn.ConvTranspose2d, "forward", lambda self, x: 1.01 * right(self, x))
    wrong = check_model(nn.Sequential(up(), Overflow()), torch.randn(1, 4, 5, 5), **QUICK)
    assert wrong.output.relative == pytest.approx(0.01, rel=1e-3)
    monkeypatch.setattr(segfast.nn.ConvTranspose2d, "forward", lambda self, x: right(self, x).fill_(NAN))
    assert not check_model(up(), torch.randn(1, 4, 5, 5), **QUICK).agrees


def test_one_tensor_far_smaller_than_the_others_is_judged_by_the_others():
    reference = {"weight": torch.tensor([1.0]), "bias": torch.tensor([1e-9])}
    found = worst(reference, {"weight": torch.tensor([1.0]), "bias": torch.tensor([2e-9])})
    assert found.relative == pytest.approx(1e-6)
    missing = worst(reference, {"weight": torch.tensor([1.0])})
    assert math.isnan(missing.relative) and "bias" in missing.where
    reshaped = worst({"y": torch.ones(2)}, {"y": torch.ones(3)})
    assert math.isnan(reshaped.relative) and "[2] float32 became [3] float32" in reshaped.where


class Batch(nn.Module):
    """Batch norm, dropout, two inputs, and a dictionary of outputs."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.drop = up(), nn.BatchNorm2d(4), nn.Dropout()

    def forward(self, image, scale):
        y = self.drop(self.norm(self.up(image)))
        return {"out": y * scale, "aux": [y.mean()], "labels": y.argmax(1)}


def test_the_callers_model_and_random_state_stay(monkeypatch):
    model = Batch()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = check_model(model, (torch.randn(2, 4, 5, 5), 3.0), train=True, **QUICK)
    # Dropout draws the same mask before and after.
    assert found.agrees and found.output.where in ("output['out']", "output['aux'][0]")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert type(model.up) is nn.ConvTranspose2d and model.training
    assert torch.equal(model.up.weight.grad, torch.ones_like(model.up.weight))
    assert not torch.equal(random, torch.get_rng_state())  # the randn above
    random = torch.get_rng_state()
    check_model(model, (torch.ones(2, 4, 5, 5), 3.0), **QUICK)
    assert torch.equal(random, torch.get_rng_state())


def test_segfasts_own_layers_are_compared_with_aten(monkeypatch):
    seen = []
    forward = segfast.nn.ConvTranspose2d.forward

    def spy(self, x):
        seen.append(segfast.get_backend())
        return forward(self, x)

    monkeypatch.setattr(segfast.nn.ConvTranspose2d, "forward", spy)
    check_model(segfast.nn.ConvTranspose2d(4, 4, 2), torch.randn(1, 4, 5, 5), **QUICK)
    assert seen[0] == "aten" and "auto" in seen  # `optimize` lists the forward first, under "aten" too
    assert segfast.get_backend() == "auto"


def test_peak_memory_counts_what_lives_together():
    class Two(nn.Module):
        def forward(self, x):
            big = x.repeat(100, 1)
            return big.sum() + x.repeat(50, 1).sum()

    x = torch.randn(1, 1000)
    peak = peak_bytes(lambda: Two()(x), torch.device("cpu"))
    # `big` (400 kB) is alive while the second repeat (200 kB) is.
    assert 600_000 <= peak < 650_000


def test_peak_memory_of_training_holds_the_gradients():
    model = up(64)
    found = check_model(model, torch.randn(1, 64, 1, 1), train=True, **QUICK)
    gradients = sum(p.nbytes for p in model.parameters())
    assert gradients < found.before_bytes and gradients < found.after_bytes


@pytest.mark.parametrize(
    ("model", "example", "train", "message"),
    [
        (
            up(),
            torch.randn(1, 3, 5, 5),
            False,
            r"does not accept an input of shape \[1, 3, 5, 5\], float32: Runtime",
        ),
        (
            nn.Identity(),
            torch.ones(3, dtype=torch.int64),
            False,
            "returned Tensor without a floating-point tensor",
        ),
        (nn.ReLU(), torch.ones(3), True, "no parameter that requires a gradient"),
        (up().requires_grad_(False), torch.ones(1, 4, 2, 2), True, "no parameter that requires a gradient"),
        (up(), torch.ones(1, 4, 2, 2, device="meta"), False, "must be on a CPU or a CUDA GPU, got meta"),
        (up(), "image", False, "example must be a tensor or hold one"),
        (
            nn.LazyConv2d(4, 3),
            torch.ones(1, 4, 5, 5),
            False,
            "has lazy layers, which have no weights yet; run it once",
        ),
    ],
)
def test_what_cannot_be_checked(model, example, train, message):
    with pytest.raises(UserError, match=message):
        check_model(model, example, train=train, **QUICK)


def test_an_output_that_does_not_depend_on_the_parameters():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = up()

        def forward(self, x):
            return x

    with pytest.raises(UserError, match="no output of the model depends on its parameters"):
        check_model(Constant(), torch.ones(1, 4, 2, 2), train=True, **QUICK)


class TestCommand:
    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "neighbor.py").write_text("CHANNELS = 3\n")
        path = tmp_path / "mine.py"
        path.write_text(
            "from torch import nn\n"
            "from neighbor import CHANNELS\n"
            "def net():\n"
            "    return nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.ConvTranspose2d(4, 2, 2, 2))\n"
            "def up_only():\n"
            "    return nn.ConvTranspose2d(4, 2, 2, 2)\n"
            "def fails():\n"
            "    raise ValueError('no weights here\\nsecond line')\n"
            "def number():\n"
            "    return 3\n"
            "built = net()\n"
            "SIZE = 7\n"
        )
        return path

    def check(self, *arguments):
        return cli.main(["check", *map(str, arguments), "--seconds", "0.01"])

    def test_a_factory_in_a_file(self, file, capsys):
        assert self.check(f"{file}:net", "--size", "8x6", "--batch", 2) == 0
        out = capsys.readouterr().out
        assert "input [2, 3, 8, 6]" in out and "1 of 1 layers replaced" in out and "orth it" in out
        assert sorted(p.name for p in file.parent.iterdir()) == ["mine.py", "neighbor.py"]
        assert str(file.parent) not in sys.path

    def test_a_module_in_a_file_training_in_double(self, file, capsys):
        assert self.check(f"{file}:built", "--size", "8x6", "--train", "--dtype", "float64") == 0
        out = capsys.readouterr().out
        assert "training step" in out and "float64" in out and "no kernels for float64" in out

    def test_our_unet(self, capsys):
        assert self.check("unet", "--size", "16x16") == 0
        assert "input [1, 1, 16, 16]" in capsys.readouterr().out

    def test_a_difference_exits_1(self, file, monkeypatch, capsys):
        right = segfast.nn.ConvTranspose2d.forward
        monkeypatch.setattr(segfast.nn.ConvTranspose2d, "forward", lambda self, x: 2 * right(self, x))
        assert self.check(f"{file}:net", "--size", "4x4") == 1
        assert "DIFFERENT" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{file}:up_only", "--size", "8x8"], "give --channels"),
            (
                ["{file}:missing", "--size", "8x8"],
                "mine.py has no 'missing'; it has net, up_only, fails, number",
            ),
            (["{file}:SIZE", "--size", "8x8"], "is a int, neither a factory nor a module"),
            (["{file}:fails", "--size", "8x8"], "mine.py:fails raised ValueError: no weights here"),
            (["{file}:number", "--size", "8x8"], "returned int, not a torch.nn.Module"),
            (["unet.py", "--size", "8x8"], "MODEL must be one of unet or another of segfast.models.list"),
            (["vnet", "--size", "8x8"], "segfast has no model 'vnet'; the nearest are unet, "),
            (["keras:unet", "--size", "8x8"], "MODEL must be one of"),
            (["segfast:vnet", "--size", "8x8"], "segfast has no model 'vnet'; the nearest are unet, "),
        ],
    )
    def test_mistakes_are_one_line_and_exit_2(self, file, capsys, arguments, message):
        assert self.check(*(a.format(file=file) for a in arguments)) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("segfast: ") and message in captured.err
