"""Depthwise and separable convolution against ATen in both layouts, on a GPU against cuDNN's calls too."""

from functools import partial

import pytest
import torch
from torch import nn

import segfast
from benchmarks.cases import CASES, directions, find
from benchmarks.trial import Trial
from segfast.commands._threads import one_thread
from segfast.ops.separable_conv2d import separable
from segfast.ops.separable_conv2d.cases import DepthwiseConv2d, SeparableConv2d

CPU = torch.device("cpu")
FAMILY = [case for case in CASES if case.family == "separable_conv2d"]
# On a CPU all batches are the same case, and the gradients of a few stand for all.
ON_GPU = torch.cuda.is_available()
OTHER_BATCHES = {case.name for case in FAMILY if case["n"] != 8}
FEW = ("mobilenetv2_dw144", "xception_middle_dw_layer", "efficientnet_dw144_k5_s2", "decoder_sep_256")

# Of modules on a CPU: channels, side, kernel, stride, padding, dilation.
SIZES = {
    "xception": (256, 65, 3, 1, 1, 1),
    "mobilenetv2": (72, 129, 3, 1, 1, 1),
    "mobilenetv2 stride 2": (48, 129, 3, 2, 1, 1),
    "efficientnet": (72, 128, 5, 2, 2, 1),
    "rate 12": (128, 65, 3, 1, 12, 12),
    "convnext": (48, 80, 7, 1, 3, 1),
}


@pytest.mark.parametrize(
    "case", [c for c in FAMILY if ON_GPU or c.name not in OTHER_BATCHES], ids=lambda case: case.name
)
def test_forward(compare, case):
    compare(case)


@pytest.mark.parametrize(
    ("name", "direction"),
    [(c.name, direction) for c in FAMILY if ON_GPU or c.name in FEW for direction in directions(c)],
)
def test_gradients(compare, name, direction):
    compare(find(name).replace(direction=direction))


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def _layer(channels, kernel, *geometry) -> tuple[nn.Module, nn.Module]:
    plain = nn.Conv2d(channels, channels, kernel, *geometry, groups=channels)
    ours = segfast.nn.DepthwiseConv2d(channels, channels, kernel, *geometry)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def _block(channels, kernel, *geometry) -> tuple[nn.Module, nn.Module]:
    ours = segfast.nn.SeparableConv2d(
        channels,
        channels,
        kernel,
        *geometry,
        norm_layer=_norm,
        depthwise_activation="relu",
        activation="relu",
    )
    plain = nn.Sequential(
        nn.Conv2d(channels, channels, kernel, *geometry, groups=channels, bias=False),
        _norm(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 1, bias=False),
        _norm(channels),
        nn.ReLU(inplace=True),
    )
    for theirs, mine in zip(plain[::3], (ours.conv_dw, ours.conv_pw), strict=True):
        theirs.load_state_dict(mine.state_dict())
    for theirs, mine in zip(plain[1::3], (ours.bn_dw, ours.bn_pw), strict=True):
        theirs.load_state_dict(mine.state_dict())
    return plain, ours


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("make", [_layer, _block], ids=["layer", "block"])
@one_thread()
@torch.no_grad()
def test_modules_on_a_cpu(compare, name, make):
    if ON_GPU:
        pytest.skip("the sizes are a CPU's")
    torch.manual_seed(0)
    channels, side, kernel, *geometry = SIZES[name]
    plain, ours = (m.eval().to(memory_format=torch.channels_last) for m in make(channels, kernel, *geometry))
    x = torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
    sizes = {"n": 1, "ci": channels, "co": channels, "h": side, "w": side, "k": kernel, "g": channels}
    sizes |= dict(zip("spd", geometry, strict=True))
    kind = DepthwiseConv2d if make is _layer else SeparableConv2d
    layer = f"{type(ours).__name__}, {name}"
    case = kind(layer, layer, sizes, dtype="float32", size="cpu")
    compare.side_by_side(case, {"segfast": partial(ours, x), "plain": partial(plain, x)})


def _kept_for_backward(function, inputs) -> int:
    """Bytes that autograd keeps of `function(inputs)` besides the inputs themselves."""
    kept = {}
    own = {t.untyped_storage().data_ptr() for t in inputs}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = function()
    output.sum().backward()
    assert all(t.grad is not None for t in inputs if t.requires_grad)
    return sum(kept.values())


@pytest.mark.parametrize("activation", ["relu", None, "silu"])
def test_fused_training_step_keeps_nothing_between_the_convolutions(activation):
    """The peak memory of a training step rests on this; on a GPU the rows have the peak itself."""
    case = find("decoder_sep_256").cpu().replace(direction="train", epilogue=("bn", activation))
    case = case.replace(params={**case.params, "h": 33, "w": 33})
    trial = Trial(case, CPU)
    t = {name: value.detach().requires_grad_(name in trial.wanted(trial.tensors))
         for name, value in trial.tensors.items()}  # fmt: skip
    vectors = [torch.ones(case["ci"]) for _ in range(4)]
    geometry = ((1, 1), (1, 1), (1, 1))

    def fused():
        return separable(
            t["x"], t["depthwise"], None, *vectors[:2], t["weight"], None, *vectors[2:], None,
            *geometry, activation, activation, 0.0,
        )  # fmt: skip

    inputs = [*t.values(), *vectors]
    image = t["x"].nbytes
    # relu's gradient follows from the output; silu's from what is computed again.
    assert _kept_for_backward(fused, inputs) == (image if activation == "relu" else 0)
    assert _kept_for_backward(lambda: trial.formula(t), inputs) >= (4 if activation else 3) * image
