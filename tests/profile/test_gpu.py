"""Readings of a GPU: CUDA events, kernels by torch's profiler, the allocator; no GPU is needed."""

import types

import pytest
import torch
from torch import nn

from segfast._optimize.verify import running_mode
from segfast._profile import profiled
from segfast._profile.passes import Stopwatch, Task, plan_of

GPU = torch.device("cuda", 1)
CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def operator(name: str, *children, kernels=(), shape=(2, 3), dtype=None) -> types.SimpleNamespace:
    """An event as torch's profiler has it."""
    run = [types.SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels]
    return types.SimpleNamespace(
        name=name, cpu_children=children, kernels=run, input_shapes=[shape], concrete_inputs=[None, dtype]
    )


def test_a_time_is_that_between_events_of_the_models_device(monkeypatch):
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.place = len(recorded)
            recorded.append(stream)

        def elapsed_time(self, later):
            return 2.0 * (later.place - self.place)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    stopwatch = Stopwatch(GPU)
    first, _, third = (stopwatch.now() for _ in range(3))
    stopwatch.wait()
    assert stopwatch.us(first, third) == 4000.0
    assert recorded == ["stream of cuda:1"] * 3 and waited == [GPU]


def test_copies_are_those_that_ran_a_kernel_and_what_cudnn_lays_out():
    layer = operator(
        "segfast span 3",
        operator("aten::conv2d", operator("aten::to", operator("aten::_to_copy", dtype=15))),
        operator("aten::_to_copy", operator("aten::copy_", kernels=[("copy", 10.0)]), dtype=15),
        operator("aten::clone", operator("aten::copy_", kernels=[("copy", 5.0)]), shape=(4,)),
        operator("aten::clone", operator("aten::copy_", kernels=[("copy", 50.0)]), shape=()),
        operator(
            "aten::cudnn_convolution",
            kernels=[("void cudnn::ops::nchwToNhwcKernel<float>", 15.0), ("sm90_xmma_fprop", 20.0)],
        ),
    )
    assert profiled.device_us(layer, True) == 100.0
    assert profiled._copies(layer, True) == [("cast", 0.1, 6), ("layout copy", 0.2, 4)]


def test_kernels_of_a_gpu_are_not_the_operators():
    def average(key, device_type, count, us):
        return types.SimpleNamespace(
            key=key, device_type=device_type, count=count, self_device_time_total=us, self_cpu_time_total=9.0
        )

    averages = [
        average("aten::conv2d", CPU, 2, 0.0),
        average("short", CUDA, 3, 1.0),
        average("long", CUDA, 1, 5.0),
        average("segfast span 1", CUDA, 1, 6.0),
    ]
    profiler = types.SimpleNamespace(key_averages=lambda: averages)
    assert profiled.kernels_of(profiler, True) == (("long", 1, 5.0), ("short", 3, 1.0))
    assert profiled.kernels_of(profiler, False) == (("aten::conv2d", 2, 9.0),)


def test_peaks_are_above_what_was_held_before(monkeypatch):
    held = {"now": 100, "peak": 100}

    class Holds(nn.Module):
        def __init__(self, scratch, kept):
            super().__init__()
            self.scratch, self.kept = scratch, kept

        def forward(self, x):
            held["peak"] = max(held["peak"], held["now"] + self.scratch)
            held["now"] += self.kept
            return x + 1

    def reset(device):
        assert device == GPU
        held["peak"] = held["now"]

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    net = nn.Sequential(Holds(50, 20), Holds(7, 3))
    task = Task(net, (torch.ones(1),), False, GPU)
    with running_mode(net, False):
        plan = plan_of(task)
        assert list(profiled._gpu_peaks(task, plan).values()) == [50, 7]


@pytest.mark.parametrize("name", ["model", "block.conv"])
def test_nvtx_ranges_have_the_layers_names(monkeypatch, name):
    from segfast._profile.profile import _nvtx_range
    from segfast._profile.spans import Key, Span

    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda message: message)
    assert _nvtx_range(Span(Key("" if name == "model" else name, "conv2d"), 0, -1)) == name
