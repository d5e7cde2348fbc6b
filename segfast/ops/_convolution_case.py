"""Shared by the cases of all convolutions: inputs, epilogue, gradients, FLOPs and bytes."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ._case import AnyCase, Case, Launch, Proof, Tensors, absolute, changed, moved, normal
from ._epilogue import apply_epilogue
from ._operands import Pair, load_kernels, pair

TILE_M, TILE_N = 128, 256  # the largest tile an implicit GEMM is expected to run with
CPU = torch.device("cpu")


class ConvolutionCase(Case):
    """A convolution of images: `n`, `ci`, `co`, `h`, `w`, kernel `k`, stride `s`, padding `p`, and further.

    `function` is ours, `plain` torch's; `name_of_kernels` is what the kernels' operations begin with.
    """

    function: ClassVar[Callable[..., Any]]
    plain: ClassVar[Callable[..., Tensor]]
    name_of_kernels: ClassVar[str]
    transposed: ClassVar[bool] = False
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

    @property
    def vectors(self) -> int:
        """The length of a scale and a shift."""
        return self["co"]

    def steps(self) -> tuple[Any, ...]:
        """The arguments of both functions behind input, weight and bias."""
        raise NotImplementedError

    def pairs(self) -> tuple[Any, ...]:
        """The same as our operators take them."""
        raise NotImplementedError

    def geometry(self) -> tuple[Any, ...]:
        """The same as the kernels' launchers take them."""
        return self.pairs()

    def filters(self, draw: Callable[..., Tensor]) -> Tensors:
        """The filters, of a size that keeps that of what they sum."""
        raise NotImplementedError

    def formula(self, t: Tensors) -> Tensor:
        y = self.plain(t["x"], t["weight"], t.get("bias"), *self.steps())
        return self.finish(y, t, activation=self.activation)

    def ours(self, t: Tensors) -> Tensor:
        return self.function(t["x"], t["weight"], t.get("bias"), *self.steps(), **self.operands(t))

    def operands(self, t: Tensors) -> dict[str, Any]:
        """Our function's epilogue."""
        found: dict[str, Any] = {name: t[name] for name in ("scale", "shift", "residual") if name in t}
        return {**found, "activation": self.activation}

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        draw, co = normal(device, dtype, generator), self["co"]
        t = {"x": draw(self["n"], self["ci"], self["h"], self["w"]), **self.filters(draw)}
        if "bias" in self.epilogue:
            t["bias"] = draw(co)
        if "affine" in self.epilogue:
            t |= {"scale": draw(self.vectors), "shift": draw(self.vectors)}
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

    def magnitude(self, t: Tensors) -> Tensor:
        return self.linear().formula(absolute(t))

    def linear(self) -> "ConvolutionCase":
        """Without its activation."""
        return self.replace(epilogue=tuple(name for name in self.epilogue if name != self.activation))

    def alone(self: AnyCase) -> AnyCase:
        """The layer without batch norm and activation, which a plain model runs after it."""
        bias = tuple(name for name in self.epilogue if name == "bias")
        return self.replace(name=f"{self.name}_layer", epilogue=bias, uses=("benchmark",))

    def at_batch(self: AnyCase, n: int) -> AnyCase:
        """The same layer of so many images."""
        params = {**self.params, "n": n}
        return self.replace(name=f"{self.name}_n{n}", params=params, uses=("benchmark",))

    def grad_input(self, t: Tensors, grad: Tensor) -> Tensor:
        """Our operator."""
        operator = getattr(torch.ops.segfast, f"{self.name_of_kernels}_grad_input")
        return operator(grad, t["weight"], *self.sizes(), *self.pairs())

    def sizes(self) -> tuple[int, ...]:
        """Sizes of the input, for the gradient with respect to it."""
        return self["h"], self["w"]

    def grad_weight(self, t: Tensors, grad: Tensor) -> Tensor:
        """Our operator."""
        operator = getattr(torch.ops.segfast, f"{self.name_of_kernels}_grad_weight")
        return operator(grad, t["x"], t["weight"], *self.pairs())

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
        yield self.proof(f"{self.name_of_kernels}_forward", self.name, self.ours, t, device, depths[0], tf32)

        grad = normal(CPU, dtype, torch.Generator().manual_seed(1))(*self.formula(t).shape)
        bare = {name: t[name] for name in ("x", "weight")} | {"grad": grad}
        on_device = moved(bare, device)
        found = (self._gradients(each) for each in (changed(bare, Tensor.double), on_device, absolute(bare)))
        for i, values in enumerate(zip(*found, strict=True)):
            name, operator = (("grad_input", self.grad_input), ("grad_weight", self.grad_weight))[i]
            operation, run = f"{self.name_of_kernels}_{name}", partial(operator, on_device, on_device["grad"])
            reference, aten, magnitude = values
            yield Proof(operation, self.name, run, reference, aten, magnitude, depths[1 + i], tf32)

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        n, kernels = self["n"], load_kernels()
        x, y = meta(dtype, n, self["ci"], self["h"], self["w"]), meta(dtype, n, self["co"], *self.output_size)
        weight = self.laid_out(self.filters(lambda *shape, scale=1.0: meta(dtype, *shape))["weight"])
        for name, call, width in self.forwards(x, weight, y):
            yield f"{self.name} {name}", call, width
        operands = {"grad_input": (y, weight, x), "grad_weight": (x, y, weight)}
        for (name, tensors), width in zip(operands.items(), self.gradient_widths(dtype), strict=True):
            launcher = getattr(kernels, f"{self.name_of_kernels}_{name}")
            yield f"{self.name} {name}", partial(launcher, *tensors, *self.geometry()), width

    def laid_out(self, weight: Tensor) -> Tensor:
        """The filters as `segfast.optimize` lays them out on a GPU."""
        return weight

    def forwards(self, x: Tensor, weight: Tensor, y: Tensor) -> Iterator[Launch]:
        """Launches of the forward."""
        raise NotImplementedError

    def gradient_widths(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of a store of either gradient; the weight's is in fp32 parts, whose rows hold all taps."""
        groups, taps = self.get("g"), self["k"] ** 2
        inner = (self["co"] if self.transposed else self["ci"]) // groups
        return widest(dtype.itemsize * self["ci"] // groups), widest(dtype.itemsize * inner * taps)

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
        """Numbers of elements: of what comes in with the pixels, of what goes out, and of the filters."""
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


def sizes(n: int, ci: int, co: int, h: int, w: int, k=1, s=1, p=0, d=1, g=1, **more: Any) -> dict[str, Any]:
    """The sizes of a case, as `params`."""
    return {"n": n, "ci": ci, "co": co, "h": h, "w": w, "k": k, "s": s, "p": p, "d": d, "g": g, **more}


def valid_taps(positions: int, limit: int, k: int, s: int, p: int, d: int) -> int:
    """Pairs (position, tap) along one axis whose product is kept: inside the input, or inside the output."""
    return sum(0 <= i * s - p + t * d < limit for i in range(positions) for t in range(k))


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
