"""Offsets past 2**31, in a process of their own, where one that wraps kills nothing else.

Linux gives memory only for pages that are touched, so that tensors of 4 to 7 GB cost a few kilobytes.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch


def far_apart(dense, axis):
    """The same values, neighbors along `axis` so far apart that the last begins past 2**31."""
    _n, c, h, w = dense.shape
    strides = [h * w * c, 1, w * c, c]
    strides[axis] = 2**31 // max(dense.shape[axis] - 1, 1) + 64
    numel = 1 + sum((size - 1) * step for size, step in zip(dense.shape, strides, strict=True))
    return torch.empty(numel, dtype=dense.dtype).as_strided(dense.shape, strides).copy_(dense)


def same(axis, launcher, inputs, like, spread=True):
    """The result of `launcher(*inputs, out)`, near as far apart, and the launches of the latter."""
    from segfast.kernels._launch import Launch

    def blank():
        return torch.full(like.shape, torch.nan, dtype=like.dtype).to(memory_format=torch.channels_last)

    near, far = blank(), far_apart(blank(), axis) if spread else blank()
    launcher(*inputs, near)
    original, launches = Launch._launch, []
    Launch._launch = lambda launch, *rest: launches.append(launch) or original(launch, *rest)
    launcher(*[t if t is None else far_apart(t, axis) for t in inputs], far)
    Launch._launch = original
    assert not near.isnan().any() and torch.equal(near, far), launcher
    return near, launches


def run_script(script, *arguments):
    """Run it in the interpreter; it prints "same" at its end."""
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert "same" in result.stdout, f"exit code {result.returncode}: {result.stdout} {result.stderr[-2000:]}"
