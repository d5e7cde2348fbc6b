"""Cases: shapes by name, each with its inputs, its formula and our call of it.

Proofs, the compile report, the fuzzing of kernels and the benchmarks are loops over them. Those of a family
are in its `cases.py`, which importing segfast does not import.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
# The name of a row of the compile report, a call of a launcher on meta tensors, the bytes of its stores.
Launch = tuple[str, Callable[[], object], int]
DIRECTIONS = ("forward", "grad_input", "grad_weight", "backward", "train")
AnyCase = TypeVar("AnyCase", bound="Case")


class Proof(NamedTuple):
    """One result of a kernel beside what it should be.

    `actual` is a call of the kernels. `reference` and `magnitude` are fp64; `magnitude` is the operation on
    absolute values, `depth` the terms in a sum, `tf32` says that they are products of operands rounded to
    TF32.
    """

    operation: str
    case: str
    actual: Callable[[], Tensor]
    reference: Tensor
    aten: Tensor
    magnitude: Tensor
    depth: int
    tf32: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operation on tensors of named sizes. A subclass is an operation, `op` by name.

    `layer` is the model and the layer that the sizes are from, `epilogue` what follows the product: "bias",
    "bn" (batch norm in eval mode) or "affine" (a scale and a shift), "add" of a residual, an activation.
    `uses` says who draws from it: "prove", "compile", "benchmark", of these "quick" and "headline". On a CPU
    benchmarks replace entries of `params` by those of `small`.
    """

    family: ClassVar[str]
    op: ClassVar[str]

    name: str
    layer: str
    params: Mapping[str, Any] = dataclasses.field(hash=False)
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False, repr=False)
    epilogue: tuple[str, ...] = ()
    uses: tuple[str, ...] = ("benchmark",)
    dtype: str = "bfloat16"
    direction: str = "forward"
    size: str = "full"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Random tensors by name, those with four dimensions channels_last."""
        raise NotImplementedError

    def formula(self, t: Tensors) -> Tensor:
        """The result in plain torch, exact of float64."""
        raise NotImplementedError

    def prepared(self, t: Tensors) -> Tensors:
        """`t` and whatever `ours` is given besides that is made once and not at each call."""
        return t

    def ours(self, t: Tensors) -> Tensor:
        """segfast's function of tensors that are `prepared`, on the backend in force."""
        raise NotImplementedError

    def magnitude(self, t: Tensors) -> Tensor:
        """The size of the terms that each result sums, in float64."""
        return self.formula(absolute(t))

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        """Our kernels on `device` beside the formula in float64 on a CPU and in `dtype` on `device`."""
        raise NotImplementedError

    def drawn(self, dtype: torch.dtype) -> Tensors:
        """Inputs on the CPU, the same at each call."""
        return self.inputs(torch.device("cpu"), dtype, torch.Generator().manual_seed(0))

    def proof(
        self, operation: str, name: str, function: Callable[[Tensors], Tensor], t: Tensors,
        device: torch.device, depth: int, tf32: bool = False,
    ) -> Proof:  # fmt: skip
        """`function` of `t` on `device` beside the formula."""
        reference, on_device = self.formula(changed(t, Tensor.double)), moved(t, device)
        aten, run = self.formula(on_device), functools.partial(function, on_device)
        return Proof(operation, name, run, reference, aten, self.magnitude(t), depth, tf32)

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        """Launches for the compile report, on meta tensors."""
        raise NotImplementedError

    def __getitem__(self, key: str) -> Any:
        return self.params[key]

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def activation(self) -> str | None:
        return next((n for n in self.epilogue if n not in ("bias", "bn", "affine", "add")), None)

    @property
    def key(self) -> str:
        return f"{self.name}/{self.dtype}/{self.direction}/{self.size}"

    @property
    def work(self) -> tuple:
        """All that tells what is computed: the name and the layer's words aside."""
        return self.op, frozenset(self.params.items()), self.dtype, self.direction, self.epilogue

    def cpu(self: AnyCase) -> AnyCase:
        """The same layer at batch 1 in fp32 and small."""
        return self.replace(params={**self.params, **self.small}, dtype="float32", size="cpu")

    def tiny(self: AnyCase) -> AnyCase:
        """Smaller still, for a walk through the control flow."""
        case = self.cpu()
        params = {name: min(value, self.most.get(name, value)) for name, value in case.params.items()
                  if isinstance(value, int)}  # fmt: skip
        return case.replace(params={**case.params, **params}, size="tiny")

    most: ClassVar[Mapping[str, int]] = {"ci": 16, "co": 16, "g": 16, "h": 24, "w": 24, "classes": 16}

    def replace(self: AnyCase, **changes: Any) -> AnyCase:
        """The same with other fields; `params` are added to the case's own."""
        return dataclasses.replace(self, **changes)

    def become(self, kind: type[AnyCase], **changes: Any) -> AnyCase:
        """The same sizes for another operation."""
        return kind(**{**vars(self), **changes})

    @property
    def flops(self) -> float:
        """Matrix FLOPs as usually counted, padding included; of a separable pair the pointwise half."""
        return self.count_flops(useful=False)

    @property
    def useful_flops(self) -> float:
        """FLOPs left when products with zero padding, or outside the output, are not made."""
        return self.count_flops(useful=True)

    def count_flops(self, useful: bool) -> float:
        return 0.0

    @property
    def min_bytes(self) -> float:
        """Bytes of every input read once and every output written once."""
        return 0.0

    @property
    def l2_bytes(self) -> float:
        """Bytes an implicit GEMM with 128 x 256 tiles reads from L2: each input tile again for every tap."""
        return 0.0

    @property
    def exponentials(self) -> float:
        """exp2 evaluations: an exact dense CRF's for each pair of pixels, a softmax's for each logit."""
        return 0.0


def cases(family: str, use: str) -> list[Case]:
    """Those of a family that have such a use."""
    found = importlib.import_module(f"{__package__}.{family}.cases").CASES
    return [case for case in found if use in case.uses]


def proofs(family: str, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
    """Every proof of a family's kernels."""
    for case in cases(family, "prove"):
        yield from case.proofs(device, dtype)


def launches(family: str, dtype: torch.dtype) -> Iterator[Launch]:
    """Every launch of a family's kernels that the compile report has."""
    for case in cases(family, "compile"):
        yield from case.launches(dtype)


def normal(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Callable[..., Tensor]:
    """A function of a shape, and of a scale, that draws normal numbers: images and filters channels_last."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        t = (scale * torch.randn(*shape, device=device, generator=generator)).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    return draw


def changed(t: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    """Tensors of numbers `change`d, others as they are."""
    return {name: change(value) if value.is_floating_point() else value for name, value in t.items()}


def absolute(t: Tensors) -> Tensors:
    """The absolute values, in float64."""
    return changed(t, lambda value: value.double().abs())


def moved(t: Tensors, device: torch.device) -> Tensors:
    return {name: value.to(device) for name, value in t.items()}
