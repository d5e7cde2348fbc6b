"""The convolution kernels compile where sizes and strides are 1: the compiler builds those integers in.

The interpreter passes every integer as it is. Triton's own IR is where a kernel stumbles over a constant.
"""

import itertools

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from segfast import kernels

# (C_in, C_out): pixels that are folded into rows, or not; depths that end with a tile, or not.
CHANNELS = [(1, 1), (10, 1), (3, 21), (16, 16)]
SIZES = [(1, 1), (5, 1), (1, 5)]
GEOMETRIES = [((1, 1), 1), ((1, 1), 2), ((3, 3), 1), ((3, 3), 2), ((1, 3), 1), ((2, 2), 2), ((4, 4), 2)]


class Reached(Exception):
    """Triton's IR is made."""


@pytest.fixture
def only_triton_ir(monkeypatch):
    """Ends a compilation where the kernel's source has become Triton's IR: a twentieth of a second."""
    add_stages = CUDABackend.add_stages

    def first_stage(backend, stages, *args):
        add_stages(backend, stages, *args)
        make = stages["ttir"]

        def reached(*args):
            make(*args)
            raise Reached

        stages["ttir"] = reached

    monkeypatch.setattr(CUDABackend, "add_stages", first_stage)
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")


def images(*shape):
    return torch.empty(shape, device="meta", dtype=torch.float16).to(memory_format=torch.channels_last)


def conv2d(batch, c_in, c_out, size, kernel, stride):
    padding = tuple((k - 1) // 2 for k in kernel)
    out = [(n + 2 * p - k) // stride + 1 for n, p, k in zip(size, padding, kernel, strict=True)]
    if min(out) < 1:
        return
    x, w, y = images(batch, c_in, *size), images(c_out, c_in, *kernel), images(batch, c_out, *out)
    options = ((stride, stride), padding, (1, 1), 1)
    kernels.conv2d_forward([x], w, None, None, None, None, y, *options, None, 0.0)
    kernels.conv2d_grad_input(y, w, x, *options)
    kernels.conv2d_grad_weight(x, y, torch.empty_like(w), *options)


def conv_transpose2d(batch, c_in, c_out, size, kernel, stride):
    out = [(n - 1) * stride + k for n, k in zip(size, kernel, strict=True)]
    x, w, y = images(batch, c_in, *size), images(c_in, c_out, *kernel), images(batch, c_out, *out)
    options = ((stride, stride), (0, 0), (1, 1), 1)
    kernels.conv_transpose2d_forward(x, w, None, None, None, None, None, y, *options, (0, 0), None, 0.0)
    kernels.conv_transpose2d_grad_input(y, w, x, *options)
    kernels.conv_transpose2d_grad_weight(x, y, torch.empty_like(w), *options)


def specialization(launch):
    """All that makes one IR differ from another in these launches."""
    scalars = [(s == 1, s % 16 == 0) for s in launch.scalars if isinstance(s, int)]
    return launch.kernel.__name__, *launch.constants.items(), *scalars


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("launcher", [conv2d, conv_transpose2d])
def test_sizes_and_strides_of_one_compile(launcher, channels, only_triton_ir):
    launches = {}
    with kernels.pretend_architecture("sm_90"):
        for batch, size, geometry in itertools.product((1, 8), SIZES, GEOMETRIES):
            with kernels.record_launches() as recorded:
                launcher(batch, *channels, size, *geometry)
            launches |= {specialization(launch): (launch, pointers) for launch, pointers in recorded}
    assert len(launches) > 20
    for launch, pointers in launches.values():
        with pytest.raises(Reached):
            kernels.compile_offline(launch, pointers, GPUTarget("cuda", 90, 32))
