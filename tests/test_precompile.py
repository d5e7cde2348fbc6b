"""Compiling ahead of a GPU run: all that a first launch needs, and one failure costs no other kernel."""

import types

import torch

from benchmarks.precompile import warm_up
from segfast.kernels._configs import Config
from segfast.kernels._launch import Plan


class Kernel:
    """In place of a Triton kernel: notes what is asked of it. `fails` does not compile."""

    arg_names = ("x", "n")

    def __init__(self, name, done, fails=False):
        self.__name__, self.done, self.fails = name, done, fails

    def warmup(self, *arguments, **options):
        if self.fails:
            raise RuntimeError("PTX assembly aborted")
        self.done.append(f"{self.__name__} compiled")
        return Compiled(self)


class Compiled:
    """As in Triton: the launcher is built, or found on disk, where `run` is asked for."""

    def __init__(self, kernel):
        self.kernel = kernel

    @property
    def run(self):
        self.kernel.done.append(f"{self.kernel.__name__} launcher")
        return types.SimpleNamespace()


def launches(*kernels):
    config = Config(64, 32, 32, 4, 3)
    return [(Plan(kernel, (1,), (3,), {}, config), (torch.zeros(1),)) for kernel in kernels]


def test_launchers_are_built_beside_the_kernels():
    done = []
    assert warm_up(launches(Kernel("first", done), Kernel("second", done))) == 2
    assert done == ["first compiled", "first launcher", "second compiled", "second launcher"]


def test_a_kernel_that_does_not_compile_costs_no_other(capfd):
    done = []
    assert warm_up(launches(Kernel("bad", done, fails=True), Kernel("good", done))) == 1
    assert done == ["good compiled", "good launcher"]
    assert "bad: RuntimeError: PTX assembly aborted" in capfd.readouterr().err
