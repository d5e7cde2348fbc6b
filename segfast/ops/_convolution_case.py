"""Shared by the cases of all convolutions: inputs, epilogue, gradients, FLOPs and bytes."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import Case, Proof, Tensors, changed, moved, normal
from ._epilogue import apply_epilogue
from ._operands import Pair, load_kernels, pair

TILE_M, TILE_N = 128, 256  # the largest tile an implicit GEMM is expected to run with
CPU = torch.device("cpu")


class ConvolutionCase(Case):
    """A convolution of images: `n`, `ci`, `co`, `h`, `w`, kernel `k`, stride `s`, padding `p`, and further.

    Of proofs, `operations` are the forward's and the gradients'.
    """

    transposed: ClassVar[bool] = False
    operations: ClassVar[tuple[str, ...]]
    tf32: ClassVar[bool] = True  # products on matrix units

    def get(self, name: str) -> int:
        """One of the sizes that a case need not name."""
        return self.params.get(name, {"k": 1, "s": 1, "p": 0, "d": 1, "g": 1}.get(name, 0))

    @property
    def output_size(self) -> Pair:
        """Height and width of the output."""
        return self._along("h"), self._along("w")

    def _along(self, side: str) -> int:
        k, s, p, d = (self.get(name) for name in ("k", "s", "p", "d"))
        reach = d * (k - 1) + 1
        if self.transposed:
            return (self[side] - 1) * s - 2 * p + reach + pair(self.get("extra"), "extra")[side == "w"]
        return (self[side] + 2 * p - reach) // s + 1

    def filters(self, draw: Callable[..., Tensor]) -> Tensors:
        """The filters, of a size that keeps that of what they sum."""
        raise NotImplementedError

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        draw, co = normal(device, dtype, generator), self["co"]
        t = {"x": draw(self["n"], self["ci"], self["h"], self["w"]), **self.filters(draw)}
        if "bias" in self.epilogue:
            t["bias"] = draw(co)
        if "affine" in self.epilogue:
            t |= {"scale": draw(co), "shift": draw(co)}
        if "add" in self.epilogue:
            t["residual"] = draw(self["n"], co, *self.output_size)
        return t | (batch_norm(co, draw) if "bn" in self.epilogue else {})

    def finish(self, y: Tensor, t: Tensors, prefix: str = "", activation: str | None = None) -> Tensor:
        """The epilogue of `y`: "affine" in fp32, rounded once; the others as the published models run them.

        These have a pass for each of norm, sum and activation.
        """
        if "affine" in self.epilogue:
            residual = None if prefix else t.get("residual")
            return apply_epilogue(y, t[f"{prefix}scale"], t[f"{prefix}shift"], residual, activation, 0.0)
        if "bn" in self.epilogue:
            mean, var, gamma, beta = (t[prefix + name] for name in ("mean", "var", "gamma", "beta"))
            y = F.batch_norm(y, mean, var, gamma, beta, training=False)
        if "add" in self.epilogue and not prefix:
            y = y + t["residual"]
        return y if activation is None else _activate(y, activation)

    def prepared(self, t: Tensors) -> Tensors:
        """Batch norm as a scale and a shift."""
        if "bn" not in self.epilogue:
            return t
        scale, shift = affine(t)
        return {**t, "scale": scale, "shift": shift}

    def linear(self) -> "ConvolutionCase":
        """Without its activation: of absolute values the size of the terms."""
        return self.replace(epilogue=tuple(name for name in self.epilogue if name != self.activation))

    def grad_input(self, t: Tensors, grad: Tensor) -> Tensor:
        """Our operator."""
        raise NotImplementedError

    def grad_weight(self, t: Tensors, grad: Tensor) -> Tensor:
        """Our operator."""
        raise NotImplementedError

    def depths(self) -> tuple[int, int, int]:
        """Terms of a sum in the forward and in either gradient."""
        taps, groups = self.get("k") ** 2, self.get("g")
        pixels = math.prod((self["h"], self["w"]) if self.transposed else self.output_size)
        reached = -(-self.get("k") // self["s"])  # taps of one output along an axis
        forward = reached**2 * self["ci"] // groups
        if not self.transposed:
            # A tap meets no more pixels than the input has.
            forward, pixels = taps * self["ci"] // groups, min(pixels, self["h"] * self["w"])
        return forward, taps * self["co"] // groups, self["n"] * pixels

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        """The forward with its whole epilogue, and both gradients."""
        t, tf32 = self.drawn(dtype), self.tf32 and load_kernels().multiplies_in_tf32(dtype)
        depths = self.depths()
        yield self.proof(self.operations[0], self.name, self.ours, t, device, depths[0], tf32)

        grad = normal(CPU, dtype, torch.Generator().manual_seed(1))(*self.formula(t).shape)
        bare = {name: t[name] for name in ("x", "weight")} | {"grad": grad}
        on_device = moved(bare, device)
        found = (self._gradients(each) for each in (changed(bare, Tensor.double), on_device, absolute(bare)))
        for i, (reference, aten, magnitude) in enumerate(zip(*found, strict=True), start=1):
            operator = self.grad_input if i == 1 else self.grad_weight
            run = partial(operator, on_device, on_device["grad"])
            yield Proof(self.operations[i], self.name, run, reference, aten, magnitude, depths[i], tf32)

    def drawn(self, dtype: torch.dtype) -> Tensors:
        """Inputs on the CPU, always the same."""
        return self.inputs(CPU, dtype, torch.Generator().manual_seed(0))

    def proof(
        self, operation: str, name: str, function: Callable[[Tensors], Tensor], t: Tensors,
        device: torch.device, depth: int, tf32: bool = False,
    ) -> Proof:  # fmt: skip
        """`function` of `t` on `device`, beside the formula."""
        on_device, formula = moved(t, device), self.formula
        reference, magnitude = formula(changed(t, Tensor.double)), self.linear().formula(absolute(t))
        run = partial(function, on_device)
        return Proof(operation, name, run, reference, formula(on_device), magnitude, depth, tf32)

    def _gradients(self, t: Tensors) -> tuple[Tensor, ...]:
        """Those of the convolution alone, of its input and its weight."""
        leaves = {name: t[name].detach().requires_grad_() for name in ("x", "weight")}
        return torch.autograd.grad(
            self.replace(epilogue=()).formula(leaves), list(leaves.values()), t["grad"]
        )

    def count_flops(self, useful: bool) -> float:
        products = self.products(useful)
        return self.times() * self["n"] * self["ci"] * self["co"] / self.get("g") * products

    def times(self) -> float:
        """FLOPs of a product in the case's direction."""
        return 2.0 * {"backward": 2, "train": 3}.get(self.direction, 1)

    def products(self, useful: bool) -> int:
        """Position-tap products of one channel pair and one image."""
        k, s, p, d = (self.get(name) for name in ("k", "s", "p", "d"))
        total = 1
        for side, out in zip(("h", "w"), self.output_size, strict=True):
            positions, limit = (self[side], out) if self.transposed else (out, self[side])
            total *= valid_taps(positions, limit, k, s, p, d) if useful else positions * k
        return total

    @property
    def min_bytes(self) -> float:
        x, y, weight = self.elements()
        # Forward reads x and the weight, writes y; a gradient reads two of the three and writes the other.
        passes = {"backward": 2 * x + y + 2 * weight, "train": 3 * x + 2 * y + 3 * weight}
        return self.torch_dtype.itemsize * passes.get(self.direction, x + y + weight)

    def elements(self) -> tuple[float, float, float]:
        """Of what comes in with the pixels, of what goes out, and of the filters."""
        n, ci, co, out = self["n"], self["ci"], self["co"], math.prod(self.output_size)
        x = n * self["h"] * self["w"] * ci + ("add" in self.epilogue) * n * out * co
        return x, n * out * co, ci * co * self.get("k") ** 2 / self.get("g")

    @property
    def l2_bytes(self) -> float:
        width = self.gemm_width()
        if width == 0:
            return 0.0
        n = min(TILE_N, 2 ** math.ceil(math.log2(width)))
        return self.useful_flops * self.torch_dtype.itemsize / 2 * (TILE_M + n) / (TILE_M * n)

    def gemm_width(self) -> int:
        """Columns of the matrix product behind the case; 0 where there is none."""
        return self["co"] if self.get("g") == 1 else 0


def valid_taps(positions: int, limit: int, k: int, s: int, p: int, d: int) -> int:
    """Pairs (position, tap) along one axis whose product is kept: inside the input, or inside the output."""
    return sum(0 <= i * s - p + t * d < limit for i in range(positions) for t in range(k))


def absolute(t: Tensors) -> Tensors:
    """The absolute values, in float64."""
    return changed(t, lambda value: value.double().abs())


def batch_norm(channels: int, draw: Callable[..., Tensor], prefix: str = "") -> Tensors:
    return {
        prefix + "mean": draw(channels, scale=0.1),
        prefix + "var": draw(channels).abs() + 0.5,
        prefix + "gamma": draw(channels).abs() + 0.5,
        prefix + "beta": draw(channels),
    }


def affine(t: Tensors, prefix: str = "", eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The fp32 scale and shift that an eval-mode batch norm is."""
    mean, var, gamma, beta = (t[prefix + name].float() for name in ("mean", "var", "gamma", "beta"))
    scale = gamma * (var + eps).rsqrt()
    return scale, beta - mean * scale


def _activate(y: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(y)
    # In place, but for silu with gradients: there autograd would copy its input.
    inplace = activation != "silu" or not torch.is_grad_enabled()
    return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}[activation](y, inplace=inplace)


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """An unwritten tensor that has no memory: images and filters channels_last."""
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t


def widest(row_bytes: int) -> int:
    """The widest access, at most 16 bytes, that every row of `row_bytes` allows."""
    return math.gcd(16, row_bytes)
