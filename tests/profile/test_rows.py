"""The rows of networks: a row for each layer, function, copy and cast; and the network as it was."""

import copy
import ctypes
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import segfast
from segfast._profile import timed
from segfast._profile.facts import LAYOUT_COPY
from segfast._profile.reorders import _stdout_to_file, copies_told
from segfast._profile.rows import Profile
from segfast.nn._fused.sequence import fusing
from tests.profile.conftest import ROOF
from tests.profile.test_flops import NETWORKS


class Net(nn.Module):
    """Of all kinds something."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.down = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.5)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.dropout(self.down(x)) + 1)
        y = torch.cat([self.up(y), x], 1)
        y = F.interpolate(y.contiguous(), scale_factor=2)
        return y.view(y.shape).flatten(2)


KINDS = [
    ("stem.0", "conv2d"),
    ("stem.1", "batch_norm"),
    ("stem.2", "activation"),
    ("down", "pool"),
    ("dropout", "other"),
    ("", "add"),
    ("", "activation"),
    ("up", "conv_transpose2d"),
    ("", "cat"),
    ("", "resize"),
]
COPIES = ("layout copy", "cast", "between layers")


def profiled(model: nn.Module, *images: torch.Tensor, **options) -> Profile:
    return segfast.profile(model, images, **{"seconds": 0.01, "budget": 0, "progress": False, **options})


def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


def layers(found: Profile, direction: str = "forward") -> list[tuple[str, str]]:
    rows = [row for row in found.rows if row.direction == direction]
    return [(row.name, row.kind) for row in rows if row.kind not in COPIES]


def test_layers_and_functions_in_the_order_of_their_calls():
    found = profiled(Net(), images())
    assert layers(found) == KINDS
    row = found.rows[[row.kind for row in found.rows].index("conv2d")]
    assert (row.flops, row.output, row.dtype) == (2 * 2 * 256 * 8 * 27, (2, 8, 16, 16), "float32")
    # The input, the filter with its bias, and the output.
    assert row.bytes == 4 * (2 * 3 * 256 + 8 * 27 + 8 + 2 * 8 * 256)
    assert (row.memory_format, row.parameters) == ("contiguous", 8 * 27 + 8)
    assert sum(row.parameters for row in found.rows) == sum(p.numel() for p in Net().parameters())
    assert row.intensity == row.flops / row.bytes
    assert found.batch == 2 and not found.train and found.roof == ROOF
    assert found.title == "Net, forward, input [2, 3, 16, 16] float32"


def test_a_layer_holds_its_output_at_least():
    found = profiled(nn.Sequential(nn.Identity(), nn.Hardtanh()), images())
    peaks = [row.peak_bytes for row in found.rows if row.kind != "between layers"]
    assert peaks == [0, 4 * 2 * 3 * 256]


def test_train_has_rows_of_the_backward():
    found = profiled(Net(), images(), train=True)
    assert layers(found) == KINDS
    assert set(layers(found, "backward")) == set(KINDS)
    back = [row for row in found.rows if row.direction == "backward" and row.kind != "between layers"]
    assert [row.start_us for row in back] == sorted(row.start_us for row in back)
    assert {row.name for row in back if row.flops} == {"stem.0", "up"}
    up = next(row for row in back if row.name == "up" and row.flops)
    image, result, filters = 2 * 8 * 64, 2 * 8 * 256, 8 * 8 * 4 + 8
    # Gradient of the output, input and filters are read, the gradients of both written.
    assert up.bytes == 4 * (result + 2 * image + 2 * filters)


def test_copies_and_casts_are_rows():
    class Copies(nn.Module):
        def forward(self, x):
            x = x.contiguous(memory_format=torch.channels_last).contiguous(memory_format=torch.channels_last)
            return x.to(torch.bfloat16).to(torch.bfloat16).float()

    rows = [row for row in profiled(Copies(), images()).rows if row.kind != "between layers"]
    assert [(row.kind, row.dtype, row.memory_format) for row in rows] == [
        ("layout copy", "float32", "channels_last"),
        ("cast", "bfloat16", "channels_last"),
        ("cast", "float32", "channels_last"),
    ]
    assert [row.bytes for row in rows] == [2 * 3 * 256 * each for each in (8, 6, 6)]
    assert {row.bound for row in rows} == {"layout copy"}


def test_a_cast_inside_a_layer_is_a_row_beside_it():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.linear(x)

    found = profiled(Autocast(), images())
    [cast] = [row for row in found.rows if row.kind == "cast"]
    [linear] = [row for row in found.rows if row.name == "linear" and row.kind == "other"]
    assert (cast.name, cast.dtype, linear.dtype) == ("linear", "float32 to bfloat16", "bfloat16")
    # Of images, the filter and the bias; on some CPUs oneDNN makes more.
    assert cast.bytes >= (2 * 3 * 256 + 16 * 16 + 16) * 6


def test_what_onednn_lays_out_anew_is_a_row():
    lines = (
        b"onednn_verbose,v1,info,cpu,isa:Intel AVX2\n"
        b"onednn_verbose,v1,primitive,exec,cpu,reorder,jit:blk,undef,src:f32::blocked:abcd::f0 "
        b"dst:f32::blocked:aBcd16b::f0,attr-scratchpad:user,,1x64x56x56,2.5\n"
        b"onednn_verbose,v1,primitive,exec,cpu,convolution,jit:avx2,forward_training,src:f32:a:blocked"
        b":aBcd16b::f0 wei:f32,attr-scratchpad:user,alg:convolution_direct,mb1_ic64oc64,7\n"
        b"onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:f32::blocked:abcd::f0 "
        b"dst:bf16::blocked:ABcd16b16a::f0,attr-scratchpad:user,,64x64x3x3,0.5\n"
    )
    assert copies_told(2 * lines, 0.02, 2) == [(LAYOUT_COPY, 0.25, 64 * 56 * 56), ("cast", 0.05, 64 * 64 * 9)]


def test_what_was_written_before_still_reaches_stdout(capfd):
    ctypes.CDLL(None).printf(b"written by C before")
    with _stdout_to_file() as (written, _):
        assert written() == 0
    assert capfd.readouterr().out == "written by C before"


def test_fused_layers_are_one_row():
    model = segfast.optimize(Net().eval())
    with fusing(True):
        found = profiled(model, images())
    assert layers(found)[0] == ("stem.0", "conv2d + batch_norm + activation")
    assert layers(found)[1:] == KINDS[3:]


def test_a_layer_whose_parts_are_not_called_is_one_row():
    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    found = profiled(nn.Sequential(Attention(16, 2)), torch.randn(4, 2, 16))
    assert layers(found) == [("0", "other")]


@pytest.mark.parametrize("train", [False, True])
def test_the_network_is_as_it_was(train):
    model = Net()
    model.stem[1].eval()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    x = images()
    modes = [module.training for module in model.modules()]
    state, given = copy.deepcopy(model.state_dict()), x.clone()
    call, random = nn.Module.__call__, torch.get_rng_state()
    stdout = os.fstat(1)
    profiled(model, x, train=train, kernels=True)
    assert nn.Module.__call__ is call and torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert model.up.weight.grad.eq(1).all() and model.stem[0].weight.grad is None
    assert torch.equal(x, given) and x.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert os.path.samestat(os.fstat(1), stdout)


def test_of_two_threads_one_profiles_at_a_time():
    running = [threading.Event(), threading.Event()]
    met = []

    def profile(turn: int) -> None:
        class Waits(nn.Module):
            def forward(self, x):
                if not running[turn].is_set():
                    running[turn].set()
                    met.append(running[1 - turn].wait(0.3))
                return x + 1

        profiled(Waits(), images())

    call = nn.Module.__call__
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(profile, range(2)))
    # The first ran alone, when the second did the first was done.
    assert met == [False, True] and nn.Module.__call__ is call


def test_what_raises_leaves_no_trace():
    class Raising(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.ReLU(), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 4:
                raise RuntimeError("the fourth call")
            return self.layer(x)

    call, stdout = nn.Module.__call__, os.fstat(1)
    with pytest.raises(RuntimeError, match="the fourth call"):
        profiled(Raising(), images())
    assert nn.Module.__call__ is call and os.path.samestat(os.fstat(1), stdout)
    assert torch.overrides._get_current_function_mode() is None


BAD = [
    ({"seconds": 0}, ValueError, "seconds must be positive and finite, got 0"),
    ({"seconds": float("nan")}, ValueError, "seconds must be positive and finite, got nan"),
    ({"budget": -1}, ValueError, "budget must be a number of seconds, 0 or more, got -1"),
    ({"optimize": True}, ValueError, "optimize needs a budget of more than 0 seconds"),
    ({"compile": True, "optimize": True, "budget": 1}, ValueError, "compile: layers are not told apart"),
    ({"nvtx": True}, ValueError, "nvtx: ranges are for a GPU, and the model is on cpu"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        profiled(Net(), images(), **options)


def test_bad_models_and_inputs():
    with pytest.raises(TypeError, match=r"model must be a .*Module, got function"):
        profiled(lambda x: x, images())
    with pytest.raises(TypeError, match="model is scripted or traced"):
        profiled(torch.jit.script(nn.ReLU()), images())
    with pytest.raises(ValueError, match="inputs must be a tensor or hold one, got int"):
        segfast.profile(Net(), 3)
    with pytest.raises(ValueError, match="model and inputs must be on one device, got cpu, meta"):
        profiled(Net(), images().to("meta"))
    with pytest.raises(ValueError, match="model has lazy layers"):
        profiled(nn.LazyConv2d(3, 3), images())
    with pytest.raises(ValueError, match="train: no output of the model requires a gradient"):
        profiled(nn.ReLU(), images(), train=True)


def test_a_dict_of_inputs():
    class Named(nn.Module):
        def forward(self, *, left, right):
            return {"sum": left + right}

    found = segfast.profile(
        Named(), {"left": images(), "right": images()}, seconds=0.01, budget=0, progress=False
    )
    assert layers(found) == [("", "add")]


def test_flops_that_no_row_has_are_told_with_their_unit():
    class Recomputed(nn.Sequential):
        def forward(self, x):  # autograd sees one node, in whose backward there is another
            return checkpoint(super().forward, x, use_reentrant=True)

    images = torch.ones(1, 2, 3, 5, requires_grad=True)
    found = segfast.profile(Recomputed(nn.Conv2d(2, 4, 1)), images, True, seconds=0.01, budget=0)
    assert sum(row.flops for row in found.rows) == 240
    # The forward once more, and of the backward two parts.
    assert "The rows have 240 FLOP of the 960 FLOP that the whole model has." in found.remarks


def test_kernels_on_a_cpu_are_operators():
    names = [name for name, calls, us in profiled(Net(), images(), kernels=True).kernels]
    assert any(name.startswith("aten::") for name in names)
    assert not profiled(Net(), images()).kernels


def test_the_page_says_what_is_so(capsys):
    page = (Path(__file__).parents[2] / "docs" / "profile.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code.replace("seconds=1", "seconds=0.01"), "profile.md", "exec"), {})
    assert "Sequential, forward, input [1, 3, 256, 256] float32" in capsys.readouterr().out
    words = " ".join(page.split())
    assert "A gap of 1 % of the whole" in words and timed._LONG_GAP == 0.01
    assert "short of the whole by more than 5 %" in words and timed.MOST_OFF == 0.05
    assert "on the ten networks" in words and len(NETWORKS) == 10
