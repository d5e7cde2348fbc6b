"""Registering the operators of our kernels, and the one form autograd takes.

An operator here is opaque: `torch.compile`, `export`, fake tensors, `vmap` and the FLOP counter see one node.
Its implementation runs our kernels; on a CPU outside Triton's interpreter, the family's ATen reference, so
that an exported program stays usable there.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._backend import _INTERPRETING, get_backend
from ._fallback import give_up
from ._operands import empty, kernel_output, load_kernels

LIBRARY = torch.library.Library("segfast", "DEF")
OPERATORS: dict[str, "Operator"] = {}


class Operator:
    """A registered operator, `torch.ops.segfast.<name>`; a call takes the shortest way to its implementation.

    Args:
        schema: "name(Tensor x, ...) -> Tensor", or "-> (Tensor, Tensor)", each with the batch in dimension 0.
        kernels: the implementation on a GPU, and on CPU tensors under Triton's interpreter. What are lists in
            the schema are tuples here, those of numbers in calls too.
        reference: the same in ATen operations.
        fake: the result's shape, dtype and strides; shares its shape function with `kernels`.
        flops: floating-point operations, from shapes: torch's FLOP-formula signature.
        per_sample: positions of the tensor arguments whose dimension 0 is the batch; where only those are
            vmapped, the mapped dimension joins the batch. Otherwise the calls are made one by one.
    """

    def __init__(
        self,
        schema: str,
        *,
        kernels: Callable[..., Any],
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        flops: Callable[..., int],
        per_sample: Sequence[int] = (),
    ):
        self.name = schema.partition("(")[0]
        self.reference = reference
        self._kernels = kernels
        self._per_sample = frozenset(per_sample)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self._run, "CUDA")
        LIBRARY.impl(self.name, self._run if _INTERPRETING else reference, "CPU")
        qualified = f"segfast::{self.name}"
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        torch.library.register_vmap(qualified, self._vmap, lib=LIBRARY)
        self.packet = getattr(torch.ops.segfast, self.name)
        self.overload = self.packet.default
        register_flop_formula(self.packet)(flops)
        OPERATORS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        # Behind the dispatcher waits nothing but our implementation, unless one of these listens.
        plain = type(args[0]) in _PLAIN and (type(args[1]) in _PLAIN or _are_plain(args[1]))
        if plain and not (is_traced() or _profiling()) and args[0].is_cuda | _INTERPRETING:
            # As `_run`, without a call for it.
            try:
                return self._kernels(*args)
            except RuntimeError as error:
                return self._computed_by_aten(error, args)
        return self.overload(*args)

    def _run(self, *args: Any) -> Any:
        # The dispatcher makes lists of tuples; what a launch is remembered by must be hashable.
        args = tuple([tuple(arg) if type(arg) is list else arg for arg in args])
        try:
            return self._kernels(*args)
        except RuntimeError as error:
            return self._computed_by_aten(error, args)

    def _computed_by_aten(self, error: RuntimeError, args: Sequence[Any]) -> Any:
        """The result of `reference`, which runs from here on; or the error, if it is to be seen."""
        give_up(self.name, error)
        kernels, reference = self._kernels, self.reference
        self._kernels = lambda *args: (kernels if get_backend() == "triton" else reference)(*args)
        return reference(*args)

    def _vmap(self, info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        mapped = [i for i, dim in enumerate(in_dims) if dim is not None and isinstance(args[i], Tensor)]
        size = info.batch_size
        args_list = list(args)
        if (
            self._per_sample
            and all(isinstance(args[i], Tensor) for i in mapped)
            and set(mapped) == {i for i in self._per_sample if isinstance(args[i], Tensor)}
        ):
            for i in mapped:
                args_list[i] = args[i].movedim(in_dims[i], 0).flatten(0, 1)
            result = self.overload(*args_list)
            if isinstance(result, Tensor):
                return result.unflatten(0, (size, -1)), 0
            return tuple(t.unflatten(0, (size, -1)) for t in result), (0,) * len(result)
        results = []
        for sample in range(size):
            for i in mapped:
                args_list[i] = args[i].select(in_dims[i], sample)
            results.append(self.overload(*args_list))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def launch_again(key: Hashable, tensors: Sequence[Any]) -> Tensor | None:
    """The result of a call that `launch_first` remembers one like: allocated and launched, nothing else.

    It was found valid, and nothing of it had to be copied. None if there is none.
    """
    ready = load_kernels().recall(key)
    if ready is None:
        return None
    shape, dtype, device, memory_format, launch = ready
    out = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    launch(*tensors, out)
    return out


def launch_first(
    key: Hashable,
    shape: Sequence[int],
    memory_format: torch.memory_format,
    tensors: Sequence[Tensor | None],
    fitted: Sequence[Tensor | None],
    launch: Callable[[Tensor], Callable[..., Any]],
) -> Tensor:
    """The result of `launch(out)`, by which `key` is remembered where no copies were made.

    Args:
        key: all that the launch follows from.
        tensors, fitted: the operands as they came and as the kernel takes them, the input first.
        launch: writes the result; returns a function that does so again, of what `launch_again` is given.
    """
    input = fitted[0]
    assert input is not None
    out = kernel_output(shape, input, memory_format)
    if out.numel() == 0:
        return empty(shape, input, memory_format)
    again = launch(out)
    result = out.contiguous(memory_format=memory_format)
    if result is out and all([a is b for a, b in zip(fitted, tensors, strict=True)]):
        load_kernels().remember(key, (tuple(shape), out.dtype, out.device, memory_format, again))
    return result


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Every segfast operator in ATen operations, for back ends that know only those.

    Example:
        >>> import torch, segfast
        >>> up = segfast.nn.ConvTranspose2d(4, 2, 2, stride=2).eval()
        >>> program = torch.export.export(up, (torch.randn(1, 4, 3, 3),))
        >>> program = program.run_decompositions(segfast.decompositions())
    """
    return {operator.overload: operator.reference for operator in OPERATORS.values()}


_PLAIN = (Tensor, torch.nn.Parameter)


def _are_plain(values: Any) -> bool:
    """True if each is a tensor of no subclass, or an integer such as an image's size; or for a flag."""
    return type(values) is bool or (
        type(values) in (list, tuple)
        and all([type(value) in _PLAIN or type(value) is int for value in values])
    )


# By names of this module: they are looked up in every call.
_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiling = torch._C._autograd._profiler_enabled
_tracing = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled
_forward_ad = torch.autograd.forward_ad


def is_traced() -> bool:
    """True if a compiler, a transform, a tensor mode or a tracer is to see the operators that are called."""
    return _compiling() or _functorch_active() or _dispatch_modes() > 0 or _tracing() is not None


def _distinct(args: Sequence[Any]) -> list[Any]:
    """`args` with a view in place of a tensor's second mention.

    Dynamo refuses a Function given one tensor twice.
    """
    result: list[Any] = []
    for arg in args:
        repeated = isinstance(arg, Tensor) and any(arg is other for other in result)
        result.append(arg.view_as(arg) if repeated else arg)
    return result


class Differentiable(torch.autograd.Function):
    """An autograd Function whose `call` pays for functorch and the compiler only when they are there.

    `Function.apply` binds the signature on every call; the C function below it does not, and is right
    whenever no functorch transform is active and nothing is being traced. Positional arguments only.
    Subclasses define `forward` without ctx, `setup_context` and `backward`.
    """

    generate_vmap_rule = True
    _apply: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]

    @classmethod
    def call(cls, *args: Any) -> Any:
        """Apply the Function."""
        if torch.compiler.is_compiling():
            return cls.apply(*_distinct(args))
        if _functorch_active():
            return cls.apply(*args)
        return cls._apply(*args)


def needs_autograd(*tensors: Tensor | None) -> bool:
    """True if a gradient, a transform or forward-mode AD asks for the autograd Function."""
    if _functorch_active() or _forward_ad._current_level >= 0:
        return True
    return _grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def cast_operands(dtype: torch.dtype, *tensors: Tensor | None) -> list:
    """The tensors in `dtype`, which is autocast's."""
    return [None if t is None else t.to(dtype) for t in tensors]


def autocast_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype autocast wants on `input`'s device, None if it is off.

    Callers cast before the Function: `torch.amp.custom_fwd` does not go with `setup_context`.
    """
    if input.is_meta:
        return None  # torch knows no autocast there
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(kind)
    return None
