"""Batch norm in training on a device: results, statistics and gradients, in every dtype and layout."""

import pytest
import torch
import torch.nn.functional as F

import segfast
from segfast.kernels._launch import _LAUNCHES
from segfast.ops._batch_norm import Norm, batch_norm_act

from ..fused_conv import REFERENCE_ACTIVATIONS
from .tester import DTYPES, compare, draw, place

pytestmark = pytest.mark.device

# The image, what is added, the activation, and the layout.
CASES = {
    "relu and an addition": ((2, 16, 9, 7), True, "relu", ""),
    "silu, 5 channels, NCHW": ((2, 5, 7, 9), False, "silu", "NCHW"),
    "one channel": ((1, 1, 13, 11), False, "gelu", ""),
    "several blocks, off 16 bytes": ((1, 72, 31, 19), True, "leaky_relu", "off16"),
    "width 1, odd strides": ((3, 8, 19, 1), False, "hardswish", "wide"),
}


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_batch_norm(name, arithmetic, device):
    shape, adds, activation, layout = CASES[name]
    dtype, channels = DTYPES[arithmetic], shape[1]
    shapes = {"x": shape, "grad": shape, "weight": (channels,), "bias": (channels,)}
    values = draw(shapes | ({"residual": shape} if adds else {}), dtype, 0)
    values["x"] += 3
    wide = {name: t.double().requires_grad_() for name, t in values.items()}
    mean, var = wide["x"].mean((0, 2, 3)), wide["x"].var((0, 2, 3))
    z = F.batch_norm(wide["x"], None, None, wide["weight"], wide["bias"], True, 0.0, 1e-3)
    z = z + wide["residual"] if adds else z
    # A gradient jumps where an activation has a kink: nothing comes back from nearby.
    values["grad"][(z.abs() < 1e-3) | ((z.abs() - 3).abs() < 1e-3)] = 0
    y = REFERENCE_ACTIVATIONS[activation](z)
    names = [name for name in wide if name != "grad"]
    gradients = torch.autograd.grad(y, [wide[name] for name in names], values["grad"].double())
    expected = dict(zip(names, gradients, strict=True)) | {"y": y.detach(), "mean": mean, "var": var}

    def run():
        here = {n: t.to(device) if t.dim() == 4 else t.float().to(device) for n, t in values.items()}
        here = {n: place(t, layout).requires_grad_() if t.dim() == 4 else t.requires_grad_()
                for n, t in here.items()}  # fmt: skip
        statistics = torch.zeros(channels, device=device), torch.zeros(channels, device=device)
        norm = Norm(here["weight"], here["bias"], *statistics, 1.0, 1e-3)
        with segfast.backend("triton"):
            y = batch_norm_act(here["x"], norm, here.get("residual"), activation, 0.2)
            found = torch.autograd.grad(y, [here[name] for name in names], here["grad"].detach())
        return dict(zip(names, found, strict=True)) | dict(y=y, mean=statistics[0], var=statistics[1])

    run()
    launches = dict(_LAUNCHES)
    found = run()
    assert launches and launches == _LAUNCHES
    size = 16 * max(t.abs().max().item() for t in (y, wide["x"], wide["grad"]))
    pixels = z.numel() // channels
    for name, t in found.items():
        largest = torch.full_like(expected[name], size * (pixels**0.5 if name in ("weight", "bias") else 1))
        compare(name, t, expected[name].detach(), largest, arithmetic)
