"""Launching a compiled kernel without Triton's JIT binder, which can take longer than a small kernel.

A launcher works out everything that follows from shapes, strides and options once, and keeps it as a
`Launch`: the grid, the integer arguments, the constants and, after the first call, the compiled kernel. The
next call with the same key only passes pointers. Triton specializes on the alignment of pointers, so the
alignment belongs to the key.
"""

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton import knobs

if TYPE_CHECKING:
    from ._tiles import Tile

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

_LAUNCHES: dict[Hashable, Any] = {}
_MOST_LAUNCHES = 4096
_recorder: list[tuple["Launch", tuple[torch.Tensor | None, ...]]] | None = None


class KernelError(RuntimeError):
    """A kernel that could not be compiled or launched; the reason is its `__cause__`."""


class Launch:
    """One kernel, ready to be called with its pointers."""

    __slots__ = ("_compiled", "_run", "constants", "grid", "kernel", "options", "scalars", "tile")

    def __init__(self, kernel, grid: Sequence[int], scalars: Sequence[int | float], constants: dict[str, Any],
                 tile: "Tile"):  # fmt: skip
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.scalars = tuple(scalars)
        # In the kernel's own order: the short launch passes them by position.
        self.constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self.tile = tile
        self.options = {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            # a * b + c in one instruction, rounded once. Said, for the default changes with Triton 3.10; a
            # kernel that must round each operation sets it to False.
            "enable_fp_fusion": True,
        }
        self._compiled = None
        self._run = None

    def __call__(self, *pointers: torch.Tensor | None) -> None:
        if _recorder is not None:
            _recorder.append((self, pointers))
            return
        if min(self.grid) == 0:
            return
        device = next(p for p in pointers if p is not None).device
        try:
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                with torch.cuda.device(device):
                    self._launch(pointers, device.index)
            else:
                self._launch(pointers, device.index)
        except Exception as error:
            if "out of memory" in str(error):
                raise
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise KernelError(
                f"the kernel {self.kernel.__name__} could not be compiled or launched "
                f"({type(error).__name__}: {reason})"
            ) from error

    def _launch(self, pointers: tuple[torch.Tensor | None, ...], index: int) -> None:
        compiled = self._compiled
        hooks = knobs.runtime.launch_enter_hook  # a chain that is always there, and mostly empty
        if compiled is None or getattr(hooks, "calls", hooks):
            # First call, or a profiler (Proton) listens: the long way, which compiles and calls hooks.
            result = self.kernel[self.grid](*pointers, *self.scalars, **self.constants, **self.options)
            if hasattr(result, "packed_metadata"):  # the interpreter returns nothing
                self._compiled, self._run = result, result.run
            return
        stream = torch._C._cuda_getCurrentRawStream(index)
        self._run(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
                  *pointers, *self.scalars, *self.constants.values())  # fmt: skip

    def warmup(self, *pointers: torch.Tensor | None) -> None:
        """Compile for the current device, the launcher in C too, and launch nothing."""
        compiled = self.kernel.warmup(
            *pointers, *self.scalars, grid=self.grid, **self.constants, **self.options
        )
        # Reading it is what builds the launcher; the interpreter's kernels have none.
        getattr(compiled, "run", None)


def launch_for(key: Hashable, make: Callable[[], Any]) -> Any:
    """The launch kept under `key`, or what rests on launches; made by `make` if there is none."""
    launch = _LAUNCHES.get(key)
    if launch is None:
        launch = remember(key, make())
    return launch


def remember(key: Hashable, value: Any) -> Any:
    """Keep `value`, which rests on launches, until these are forgotten; `recall(key)` returns it, or None."""
    if len(_LAUNCHES) >= _MOST_LAUNCHES:
        _LAUNCHES.clear()
    _LAUNCHES[key] = value
    return value


# The dictionary's own method: this is on the way of every call.
recall = _LAUNCHES.get


def forget_launches() -> None:
    """Drop every launch, so that a changed tile takes effect."""
    _LAUNCHES.clear()


@contextlib.contextmanager
def separate_launches(kept: dict[Hashable, Any] | None = None) -> Iterator[None]:
    """Within it, launches of its own: those of `kept`, which keeps them from one time to the next.

    The launches there were before stand again afterwards.
    """
    before = dict(_LAUNCHES)
    _LAUNCHES.clear()
    _LAUNCHES.update(kept or {})
    try:
        yield
    finally:
        if kept is not None:
            kept.clear()
            kept.update(_LAUNCHES)
        _LAUNCHES.clear()
        _LAUNCHES.update(before)


def layout_key(*tensors: torch.Tensor | None) -> tuple:
    """All that a launch may depend on in its tensors: shape, strides, dtype, and whether they are aligned."""
    return tuple(
        [None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    )


def image_strides(t: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of image, row and pixel of [N, C, H, W]; the channel's is 1."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(2), t.stride(3))


def pixel_alignment(*tensors: torch.Tensor | None) -> int:
    """The largest power of two, at most 16, that divides the offset of every pixel.

    It lets accesses be 16 bytes wide; Triton itself sees divisibility by 16 only, and would read 24
    channels one at a time.
    """
    common = 16
    for t in tensors:
        if t is not None:
            for axis in (0, 2, 3):
                if t.shape[axis] > 1:
                    common = math.gcd(common, t.stride(axis))
    return common


def needs_wide_index(*tensors: torch.Tensor | None) -> bool:
    """True if an offset in one of the tensors can pass 2**31 elements (less a margin for masked rows)."""
    return any(
        t is not None and sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= 2**31 - 2**24
        for t in tensors
    )


@contextlib.contextmanager
def record_launches() -> Iterator[list[tuple[Launch, tuple[torch.Tensor | None, ...]]]]:
    """Collect (launch, pointers) instead of launching: for compile reports, call overhead and tests.

    Launchers then work on tensors of any device, meta included.
    """
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


def compile_offline(
    launch: Launch, pointers: Sequence[torch.Tensor | None], target
) -> "triton.compiler.CompiledKernel":
    """Compile a recorded launch for `target` (a `triton.backends.compiler.GPUTarget`), without a GPU.

    The signature and the specialization (integers equal to 1 or divisible by 16, aligned pointers) are those
    the launch itself would have.
    """
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    values = dict(zip(names, (*pointers, *launch.scalars), strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        value = values[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TRITON_TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=dict(launch.options))


_TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
