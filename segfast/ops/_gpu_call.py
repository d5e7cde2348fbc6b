"""A call on a GPU that something can be chosen for, and how it is run again to be measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
# Tiles of each kernel that are tried; `segfast tune` tries them all.
FEW, ALL = 4, 1000


class GpuCall(NamedTuple):
    """A call on a GPU, as far as a choice may depend on it.

    `gpu` is the GPU's name, `dtype` what is computed in, `precision` how products of float32 are made,
    `images` the shapes of what has pixels, `weights` those of filters, `options` whatever else the operation
    is told, in an order of its own. Image sizes of 0 stand for any.
    """

    operation: str
    gpu: str
    dtype: torch.dtype
    precision: str
    channels_last: bool
    images: tuple[Shape, ...]
    weights: tuple[Shape, ...]
    options: tuple[Any, ...]
    gradients: bool

    @property
    def pixels(self) -> int:
        """Pixels of all images of the batch, at the first input's resolution."""
        return _pixels(self.images[0])

    def of_any_size(self) -> "GpuCall":
        """The same call, whatever the images' size."""
        return self._replace(images=tuple([_of_any_size(shape) for shape in self.images]))

    def distance(self, other: "GpuCall") -> float:
        """The logarithm of how many times more pixels one of the two has, of the images that differ most."""
        pairs = zip(self.images, other.images, strict=True)
        return max([abs(math.log(_pixels(theirs) / _pixels(mine))) for mine, theirs in pairs])

    def can_run(self, name: str) -> bool:
        """True: what an implementation does not take is seen where it is called."""
        return True

    def multiplications(self) -> int:
        """An upper bound, by which calls are put in order."""
        return self.pixels * max(1, sum(map(math.prod, self.weights)) or self.images[0][1])

    def __str__(self) -> str:
        images = " and ".join("x".join(map(str, shape)) for shape in self.images)
        weights = ", ".join("x".join(map(str, shape)) for shape in self.weights)
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.operation} of {images}" + (f" by {weights}" if weights else "")
        return f"{text}, {dtype}" + (" with gradients" if self.gradients else "")


class Bound(NamedTuple):
    """A call with tensors to run it on.

    `function(*tensors)` is the public function; of each floating-point tensor the gradient is asked for where
    the call has gradients. `depth` is how many terms its longest sums have. `candidates` are other
    implementations, by name, of the same arguments; `laid_out(*tensors)` are the tensors as our kernels read
    them without a copy.
    """

    tensors: tuple[Tensor, ...]
    function: Callable[..., Any]
    depth: int
    candidates: Mapping[str, Callable[..., Any]] = MappingProxyType({})
    laid_out: Callable[..., Sequence[Tensor]] | None = None

    def as_kernels_read(self) -> "Bound":
        """The same with tensors that our kernels read without a copy."""
        if self.laid_out is None:
            return self
        return self._replace(tensors=tuple([t.detach() for t in self.laid_out(*self.tensors)]))


# A prime, so that where values come again lines up with no size.
_DRAWN = 2**20 - 3


class Draw:
    """Random tensors of a call's dtype and layout on a device, the same for the same call.

    Of large ones the values come again and again: drawing them all on a CPU would take seconds.
    """

    def __init__(self, call: GpuCall, device: torch.device) -> None:
        self.call, self.device = call, device
        self._generator = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal, of this standard deviation."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.call.dtype, device="meta")
        count = math.prod(shape)
        drawn = torch.randn(min(count, _DRAWN), generator=self._generator, dtype=torch.float32, device="cpu")
        t = (drawn * scale).to(self.device, self.call.dtype)
        t = t.repeat(-(-count // _DRAWN))[:count].view(shape) if count > _DRAWN else t.view(shape)
        last = self.call.channels_last and len(shape) == 4
        return t.contiguous(memory_format=torch.channels_last) if last else t

    def given(self, wanted: Sequence[bool], shapes: Sequence[Shape]) -> list[Tensor]:
        """Those of such tensors that are `wanted`."""
        return [self(*shape) for shape, want in zip(shapes, wanted, strict=True) if want]

    def filters(self, shape: Shape) -> Tensor:
        """Filters [C_out, C_in, kH, kW] that keep the size of what they sum."""
        return self(*shape, scale=1 / math.sqrt(max(1, math.prod(shape[1:]))))

    def labels(self, classes: int, *shape: int) -> Tensor:
        """Random classes, int64."""
        return torch.randint(classes, shape, generator=self._generator, device="cpu").to(self.device)


class GpuOperation(NamedTuple):
    """How calls of one operation are measured: what must be proven of which family, and how to run one.

    `proofs(gradients)` names the kernels' operations; `bind(call, draw)` makes tensors of the call's shapes.
    `composite` operations consist of others, which are measured before.
    """

    family: str
    proofs: Callable[[bool], tuple[str, ...]]
    bind: Callable[[GpuCall, Draw], Bound]
    composite: bool = False


# By the name of the public function.
GPU_OPERATIONS: dict[str, GpuOperation] = {}


def with_operands(
    function: Callable[..., Any], names: Sequence[str], given: Sequence[bool], count: int = 2, **options: Any
) -> Callable[..., Any]:
    """`function` of `count` tensors and, by name, of those operands that are `given`."""
    present = [name for name, wanted in zip(names, given, strict=True) if wanted]

    def run(*tensors: Tensor) -> Any:
        operands = dict(zip(present, tensors[count:], strict=True))
        return function(*tensors[:count], **operands, **options)

    return run


def _pixels(shape: Shape) -> int:
    return math.prod((shape[0], *shape[2:]))


def _of_any_size(shape: Shape) -> Shape:
    return (0, shape[1], 0, 0)
