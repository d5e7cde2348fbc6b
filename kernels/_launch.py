"""Launching a compiled kernel without Triton's JIT binder, which can take longer than a small kernel.

A launcher works out everything that follows from shapes, strides and options once, and keeps it as a `Plan`:
the grid, the integer arguments, the constants and, after the first call, the compiled kernel. The next call
with the same key only passes pointers. Triton specialises on the alignment of pointers, so the alignment
belongs to the key.
"""

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton import knobs

if TYPE_CHECKING:
    from ._configs import Config

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

_PLANS: dict[Hashable, Any] = {}
_MOST_PLANS = 4096
_recorder: list[tuple["Plan", tuple[torch.Tensor | None, ...]]] | None = None


class KernelError(RuntimeError):
    """A kernel that could not be compiled or launched; the reason is its `__cause__`."""


class Plan:
    """One kernel, ready to be called with its pointers."""

    __slots__ = ("_compiled", "_run", "config", "constants", "grid", "kernel", "options", "scalars")

    def __init__(self, kernel, grid: Sequence[int], scalars: Sequence[int | float], constants: dict[str, Any],
                 config: "Config"):  # fmt: skip
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.scalars = tuple(scalars)
        # In the kernel's own order: the short launch passes them by position.
        self.constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        self.config = config
        self.options = {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
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


def planned(key: Hashable, make: Callable[[], Any]) -> Any:
    """The plan, or what rests on plans, kept under `key`; made by `make` if there is none."""
    plan = _PLANS.get(key)
    if plan is None:
        plan = remember(key, make())
    return plan


def remember(key: Hashable, value: Any) -> Any:
    """Keep `value`, which rests on plans, until plans are forgotten; `recall(key)` returns it, or None."""
    if len(_PLANS) >= _MOST_PLANS:
        _PLANS.clear()
    _PLANS[key] = value
    return value


# The dictionary's own method: this is on the way of every call.
recall = _PLANS.get


def forget_plans() -> None:
    """Drop every plan, so that a changed configuration takes effect."""
    _PLANS.clear()


@contextlib.contextmanager
def separate_plans(kept: dict[Hashable, Any] | None = None) -> Iterator[None]:
    """Within it, plans of its own: those of `kept`, which keeps them from one time to the next.

    The plans there were before stand again afterwards.
    """
    before = dict(_PLANS)
    _PLANS.clear()
    _PLANS.update(kept or {})
    try:
        yield
    finally:
        if kept is not None:
            kept.clear()
            kept.update(_PLANS)
        _PLANS.clear()
        _PLANS.update(before)


def layout_key(*tensors: torch.Tensor | None) -> tuple:
    """All that a plan may depend on in its tensors: shape, strides, dtype, and whether they are aligned."""
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
    """Whether an offset in one of the tensors can pass 2**31 elements (less a margin for masked rows)."""
    return any(
        t is not None and sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) >= 2**31 - 2**24
        for t in tensors
    )


@contextlib.contextmanager
def record_launches() -> Iterator[list[tuple[Plan, tuple[torch.Tensor | None, ...]]]]:
    """Collect (plan, pointers) instead of launching: for compile reports, call overhead and tests.

    Launchers then work on tensors of any device, meta included.
    """
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


def compile_offline(
    plan: Plan, pointers: Sequence[torch.Tensor | None], target
) -> "triton.compiler.CompiledKernel":
    """Compile a recorded launch for `target` (a `triton.backends.compiler.GPUTarget`), without a GPU.

    The signature and the specialisation (integers equal to 1 or divisible by 16, aligned pointers) are those
    the launch itself would have.
    """
    from triton.compiler import ASTSource

    names = plan.kernel.arg_names
    values = dict(zip(names, (*pointers, *plan.scalars), strict=False)) | plan.constants
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        value = values[name]
        if name in plan.constants or value is None or (isinstance(value, int) and value == 1):
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
    source = ASTSource(fn=plan.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=dict(plan.options))


_TRITON_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
