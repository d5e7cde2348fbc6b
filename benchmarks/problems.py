"""The inputs of a case, its formula in plain torch, and what a right answer is."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import crf_problems
from benchmarks.case import PYRAMIDS
from benchmarks.cases import Case, is_crf, is_head, output_size
from segfast.ops._gpu_measure import without_search

MOST_IN_FP64 = 2e11  # exponentials of a reference CRF

_WHOLE = ("upsample_cross_entropy", "upsample_dice")  # one result for the whole batch

Tensors = dict[str, torch.Tensor]
Formula = Callable[[Tensors], torch.Tensor]

IMAGES = ("x", "skip", "residual", "unary", "image", "values", "features")
# Arguments that are never differentiated: statistics and the affine part of an eval-mode batch norm, labels.
CONSTANT = ("mean", "var", "gamma", "beta", "labels")


def _epilogue(
    case: Case, y: torch.Tensor, t: Tensors, prefix: str = "", activate: bool = True
) -> torch.Tensor:
    """Eval-mode batch norm and activation as separate passes, the way the published models run them."""
    if "bn" in case.epilogue:
        y = F.batch_norm(y, *(t[prefix + name] for name in ("mean", "var", "gamma", "beta")), training=False)
    if "add" in case.epilogue:
        y = y + t["residual"]
    if not activate or case.activation is None:
        return y
    if case.activation == "gelu":
        return F.gelu(y)
    # In place, but for silu with gradients: there autograd would copy its input.
    inplace = case.activation != "silu" or not torch.is_grad_enabled()
    return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}[case.activation](y, inplace=inplace)


def _conv2d(case: Case) -> Formula:
    s, p, d, g = (case.params[name] for name in ("s", "p", "d", "g"))
    return lambda t: _epilogue(case, F.conv2d(t["x"], t["weight"], t.get("bias"), s, p, d, g), t)


def _conv_transpose2d(case: Case) -> Formula:
    s, p = case["s"], case["p"]
    return lambda t: _epilogue(case, F.conv_transpose2d(t["x"], t["weight"], t.get("bias"), s, p), t)


def crop_to(skip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The centre of `skip`."""
    top, left = (skip.shape[2] - height) // 2, (skip.shape[3] - width) // 2
    return skip[:, :, top : top + height, left : left + width]


def _up_concat(case: Case) -> Formula:
    def formula(t: Tensors) -> torch.Tensor:
        up = F.conv_transpose2d(t["x"], t["weight"], t.get("bias"), case["s"], case["p"])
        return torch.cat([crop_to(t["skip"], *up.shape[2:]), up], 1)

    return formula


def _separable_conv2d(case: Case) -> Formula:
    def formula(t: Tensors) -> torch.Tensor:
        y = F.conv2d(t["x"], t["depthwise"], None, case["s"], case["p"], case["d"], case["ci"])
        y = _epilogue(case, y, t, "depthwise_")
        return _epilogue(case, F.conv2d(y, t["weight"]), t, activate="linear" not in case.params)

    return formula


def _branches(case: Case, t: Tensors) -> list[torch.Tensor]:
    """The dense convolutions of an ASPP's input, with their epilogues."""
    branches = [_epilogue(case, F.conv2d(t["x"], t["weight"]), t)]
    for i, rate in enumerate(case["rates"]):
        branches.append(_epilogue(case, F.conv2d(t["x"], t[f"rate{i}"], None, 1, rate, rate), t))
    return branches


def _aspp_branches(case: Case) -> Formula:
    return lambda t: torch.cat(_branches(case, t), 1)


def _aspp(case: Case) -> Formula:
    def formula(t: Tensors) -> torch.Tensor:
        x, branches = t["x"], _branches(case, t)
        pooled = _epilogue(case, F.conv2d(x.mean((2, 3), keepdim=True), t["pool"]), t)
        branches.append(F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False))
        return _epilogue(case, F.conv2d(torch.cat(branches, 1), t["project"]), t)

    return formula


def _upsample_cross_entropy(case: Case) -> Formula:
    def formula(t: Tensors) -> torch.Tensor:
        return F.cross_entropy(_upsampled(case, t), t["labels"])

    return formula


def _upsampled(case: Case, t: Tensors) -> torch.Tensor:
    return F.interpolate(t["x"], scale_factor=case["scale"], mode="bilinear", align_corners=False)


def _upsample_dice(case: Case) -> Formula:
    def formula(t: Tensors) -> torch.Tensor:
        p = torch.softmax(_upsampled(case, t), 1)
        hot = F.one_hot(t["labels"], case["classes"]).movedim(-1, 1).to(p.dtype)
        hits, sizes, pixels = (part.sum((0, 2, 3)) for part in (p * hot, p + hot, hot))
        return ((1 - 2 * hits / sizes.clamp_min(1e-7)) * (pixels > 0)).mean()

    return formula


def _upsample_argmax(case: Case) -> Formula:
    return lambda t: _upsampled(case, t).argmax(1)


FORMULAS = {
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "up_concat": _up_concat,
    "separable_conv2d": _separable_conv2d,
    "aspp": _aspp,
    "aspp_branches": _aspp_branches,
    "upsample_cross_entropy": _upsample_cross_entropy,
    "upsample_dice": _upsample_dice,
    "upsample_argmax": _upsample_argmax,
    "dense_crf": crf_problems.dense_crf,
    "gaussian_filter": crf_problems.gaussian_filter,
}


class Problem:
    """Random inputs of one operator case on a device, channels_last where they are images or filters."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        self.formula: Formula = FORMULAS[case.op](case)
        generator = torch.Generator(device).manual_seed(seed)
        self.tensors = {
            name: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
            for name, value in _inputs(case, device, generator).items()
        }
        self.grad_output: torch.Tensor | None = None
        if case.direction != "forward":
            with torch.no_grad():
                output = self.formula(self.tensors)
            self.grad_output = torch.randn(
                output.shape, device=device, generator=generator, dtype=output.dtype
            )
            if output.dim() == 4:
                self.grad_output = self.grad_output.contiguous(memory_format=torch.channels_last)

    def contiguous(self) -> Tensors:
        return {name: value.contiguous() for name, value in self.tensors.items()}

    def wanted(self, tensors: Tensors) -> list[str]:
        """Names of the inputs whose gradient the case's direction asks for."""
        if self.case.direction == "grad_input":
            return ["x"]
        names = [name for name in tensors if not name.endswith(CONSTANT)]
        return (
            [name for name in names if name not in IMAGES] if self.case.direction == "grad_weight" else names
        )

    def bind(self, function: Formula, tensors: Tensors | None = None) -> Callable[[], Any]:
        """A call of `function` on `tensors` in the case's direction; gradients in the order of `wanted`."""
        tensors = dict(self.tensors if tensors is None else tensors)
        direction = self.case.direction
        if direction == "forward":

            def forward() -> torch.Tensor:
                with torch.no_grad():
                    return function(tensors)

            return forward
        wanted = self.wanted(tensors)
        leaves = [tensors[name].detach().requires_grad_() for name in wanted]
        tensors.update(zip(wanted, leaves, strict=True))
        grad_output = self.grad_output
        assert grad_output is not None
        if tensors["x"].is_contiguous() and grad_output.dim() == 4:
            grad_output = grad_output.contiguous()

        def gradients(output: torch.Tensor, keep: bool) -> tuple[torch.Tensor, ...]:
            grad = grad_output.to(output.dtype)
            return torch.autograd.grad(output, leaves, grad, retain_graph=keep)

        if direction == "train":
            return lambda: gradients(function(tensors), False)
        saved: list[torch.Tensor] = []

        def backward() -> tuple[torch.Tensor, ...]:
            # The forward pass runs once, in the first (warm-up) call.
            if not saved:
                saved.append(function(tensors))
            return gradients(saved[0], True)

        return backward

    def sample(self, output: Any) -> Any:
        """The part of an output that is compared: first and last image of a forward, all of a gradient.

        Of labels, whose ties may fall either way, the probability of what was chosen.
        """
        if self.case.op == "upsample_argmax":
            return self._probabilities().gather(1, output[self._images()][:, None])[:, 0]
        if self.case.direction == "forward" and self.case.op not in _WHOLE:
            return output[self._images()]
        return output

    def reference(self) -> Any:
        """`sample` of the right answer, in fp64; of a CRF with 1e11 pairs and more in fp32."""
        dtype = torch.float64 if self.case.exponentials < MOST_IN_FP64 else torch.float32
        tensors = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.tensors.items()
        }
        if self.case.op == "upsample_argmax":
            return self._probabilities().amax(1)
        with without_search():
            if self.case.direction != "forward" or self.case.op in _WHOLE:
                return self.bind(self.formula, tensors)()
            images = self._images()
            batch = {name: tensors[name][images] for name in IMAGES if name in tensors}
            with torch.no_grad():
                return self.formula({**tensors, **batch})

    def _probabilities(self) -> torch.Tensor:
        """Softmax of the first and the last image's upsampled logits."""
        with torch.no_grad():
            return torch.softmax(_upsampled(self.case, {"x": self.tensors["x"][self._images()].double()}), 1)

    def _images(self) -> Sequence[int]:
        return sorted({0, self.case["n"] - 1})


def _inputs(case: Case, device: torch.device, generator: torch.Generator) -> Tensors:
    dtype = case.torch_dtype

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, device=device, generator=generator)).to(dtype)

    if is_crf(case):
        return crf_problems.inputs(case, device, generator)
    n, h, w = case["n"], case["h"], case["w"]
    if is_head(case):
        out = case["scale"] * h, case["scale"] * w
        labels = torch.randint(case["classes"], (n, *out), device=device, generator=generator)
        return {"x": normal(n, case["classes"], h, w), "labels": labels}
    ci, co, k, groups = case["ci"], case["co"], case.params.get("k", 1), case.params.get("g", 1)
    tensors = {"x": normal(n, ci, h, w)}
    scale = 1 / math.sqrt(ci * k * k / groups)
    if case.params.get("weight") == "bilinear":
        tensors["weight"] = bilinear_weight(ci, k).to(device, dtype)
    elif case.op in ("conv_transpose2d", "up_concat"):
        tensors["weight"] = normal(ci, co, k, k, scale=scale * case["s"])
    elif case.op == "conv2d":
        tensors["weight"] = normal(co, ci // groups, k, k, scale=scale)
    else:
        tensors["weight"] = normal(co, ci, 1, 1, scale=1 / math.sqrt(ci))
    if case.op == "up_concat":
        height, width = output_size(case)
        tensors["skip"] = normal(n, co, max(height, case["hs"]), max(width, case["ws"]))
    if case.op == "separable_conv2d":
        tensors["depthwise"] = normal(ci, 1, k, k, scale=1 / k)
        tensors.update(_batch_norm(ci, normal, "depthwise_"))
    if case.op in PYRAMIDS:
        for i in range(len(case["rates"])):
            tensors[f"rate{i}"] = normal(co, ci, 3, 3, scale=1 / math.sqrt(9 * ci))
    if case.op == "aspp":
        tensors["pool"] = normal(co, ci, 1, 1, scale=1 / math.sqrt(ci))
        branches = len(case["rates"]) + 2
        tensors["project"] = normal(co, branches * co, 1, 1, scale=1 / math.sqrt(branches * co))
    if "bias" in case.epilogue:
        tensors["bias"] = normal(co)
    if "add" in case.epilogue:
        tensors["residual"] = normal(n, co, *output_size(case))
    if "bn" in case.epilogue:
        tensors.update(_batch_norm(co, normal))
    return tensors


def bilinear_weight(channels: int, k: int) -> torch.Tensor:
    """FCN's initialisation [C, C, k, k]: each channel interpolates itself (Long, Shelhamer, Darrell 2015)."""
    factor = (k + 1) // 2
    centre = factor - 1 if k % 2 == 1 else factor - 0.5
    line = 1 - (torch.arange(k) - centre).abs() / factor
    weight = torch.zeros(channels, channels, k, k)
    weight[range(channels), range(channels)] = line[:, None] * line
    return weight


def _batch_norm(channels: int, normal: Callable[..., torch.Tensor], prefix: str = "") -> Tensors:
    return {
        prefix + "mean": normal(channels, scale=0.1),
        prefix + "var": normal(channels).abs() + 0.5,
        prefix + "gamma": normal(channels).abs() + 0.5,
        prefix + "beta": normal(channels),
    }


def affine(tensors: Tensors, prefix: str = "", eps: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 scale and shift that an eval-mode batch norm is."""
    mean, var, gamma, beta = (tensors[prefix + name].float() for name in ("mean", "var", "gamma", "beta"))
    scale = gamma * (var + eps).rsqrt()
    return scale, beta - mean * scale


def folded(tensors: Tensors) -> Tensors:
    """The same layer with its batch norm folded into weight and bias, rounded to their dtype."""
    scale, shift = affine(tensors)
    weight = tensors["weight"]
    shape = (-1,) + (1,) * (weight.dim() - 1)
    return {
        **{name: tensors[name] for name in IMAGES if name in tensors},
        "weight": (weight.float() * scale.view(shape)).to(weight.dtype, memory_format=torch.preserve_format),
        "bias": shift.to(weight.dtype),
    }
