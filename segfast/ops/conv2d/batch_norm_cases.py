"""The shapes of batch norm in training, after a convolution: odd ones to prove the kernels on, and layers."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .._batch_norm import Norm, batch_norm_act
from .._case import Case, Launch, Proof, Tensors, changed, moved, normal
from .._epilogue import ACTIVATIONS
from .._operands import load_kernels

_EPS = 1e-5


class BatchNormAct(Case):
    """act(norm(x) + residual) of x [n, c, h, w] with a mean away from zero, and its gradients."""

    family, op = "conv2d", "batch_norm_act"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        draw, c = normal(device, dtype, generator), self["c"]
        shape = self["n"], c, self["h"], self["w"]
        t = {"x": 2 + draw(*shape), "weight": 1 + draw(c, scale=0.2).float(), "bias": draw(c).float()}
        if "add" in self.epilogue:
            t["residual"] = draw(*shape)
        return t | {"grad": draw(*shape)}

    def formula(self, t: Tensors) -> Tensor:
        wide = t["weight"].dtype
        z = F.batch_norm(t["x"].to(wide), None, None, t["weight"], t["bias"], True, 0.0, _EPS)
        z = z + t["residual"].to(wide) if "residual" in t else z
        return ACTIVATIONS[self.activation](z, 0.01).to(t["x"].dtype)

    def ours(self, t: Tensors) -> Tensor:
        norm = Norm(t["weight"], t["bias"], None, None, 0.0, _EPS)
        return batch_norm_act(t["x"], norm, t.get("residual"), self.activation)

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        t = self.drawn(dtype)
        wide, here = changed(t, Tensor.double), moved(t, device)
        pixels = t["x"].numel() // self["c"]

        def gradients(function, t: Tensors) -> tuple[Tensor, ...]:
            leaves = {name: each.detach().requires_grad_() for name, each in t.items() if name != "grad"}
            wanted = [leaves[name] for name in ("x", "weight")]
            with torch.enable_grad():
                return torch.autograd.grad(function(leaves), wanted, t["grad"])

        def proof(operation: str, run, reference: Tensor, aten: Tensor) -> Proof:
            size = torch.full_like(reference, 4 * max(1.0, reference.abs().max().item()))
            return Proof(operation, self.name, run, reference, aten, size, pixels)

        def variance() -> Tensor:
            mean, var = (torch.empty(self["c"], dtype=torch.float32, device=device) for _ in range(2))
            load_kernels().batch_norm_statistics(here["x"], mean, var)
            return var

        variances = [x.var((0, 2, 3), correction=0) for x in (wide["x"], here["x"].float())]
        yield proof("batch_norm_statistics", variance, *variances)
        yield proof("batch_norm_apply", partial(self.ours, here), self.formula(wide), self.formula(here))
        exact, aten = (gradients(self.formula, each) for each in (wide, here))
        for index, operation in ((1, "batch_norm_grad_sums"), (0, "batch_norm_grad_input")):
            run = partial(lambda i: gradients(self.ours, here)[i], index)
            yield proof(operation, run, exact[index], aten[index])

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        def make(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            t = torch.empty(sizes, dtype=dtype, device="meta")
            return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t

        kernels, c = load_kernels(), self["c"]
        x = make(self["n"], c, self["h"], self["w"], dtype=dtype)
        mean, residual, width = make(c), x if "add" in self.epilogue else None, min(16, 4 * dtype.itemsize)
        given, options = (mean, mean, mean, mean, residual), (_EPS, self.activation, 0.0)
        yield f"{self.name} statistics", partial(kernels.batch_norm_statistics, x, mean, mean), 4
        yield f"{self.name} apply", partial(kernels.batch_norm_apply, x, *given, x, *options), width
        sums = partial(kernels.batch_norm_grad_sums, x, x, *given, make(2, c), *options)
        yield f"{self.name} sums", sums, 4
        to_input = partial(kernels.batch_norm_grad_input, x, x, *given, make(2, c), x, residual, *options)
        yield f"{self.name} gradient", to_input, width


def _case(name: str, n: int, c: int, h: int, w: int, *epilogue: str, layer: str = "") -> BatchNormAct:
    use = "compile" if layer else "prove"
    return BatchNormAct(name, layer, {"n": n, "c": c, "h": h, "w": w}, epilogue=epilogue, uses=(use,))


CASES = [
    _case("norm 5 channels", 2, 5, 17, 13, "add", "relu"),
    _case("norm 72 channels", 3, 72, 19, 11, "silu"),
    _case("norm 21 channels", 1, 21, 33, 31),
    _case("norm resnet_layer1", 8, 256, 129, 129, "add", "relu", layer="ResNet layer1, last of a block"),
    _case("norm unet_encoder", 8, 64, 512, 512, "relu", layer="U-Net, first block"),
    _case("norm efficientnet", 8, 144, 64, 64, "silu", layer="EfficientNet-B0, expansion"),
]
