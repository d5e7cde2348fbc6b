"""The shapes of depthwise and separable convolution: odd ones, and layers of four families of networks."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Launch, Proof, Tensors, moved
from .._convolution_case import ConvolutionCase, affine, batch_norm, meta, sizes
from .._operands import load_kernels
from .functional import OPERATIONS, depthwise_conv2d, separable_conv2d
from .operators import taps_major

_WITH_EPILOGUES = ("xception_middle_dw", "mobilenetv2_dw144", "convnext_dw96_k7")  # compiled with these, too


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, s: int, p: int, d: int) -> Tensor:
    return F.conv2d(x, weight, bias, s, p, d, groups=x.shape[1])


class DepthwiseConv2d(ConvolutionCase):
    """A filter a channel, or several: `g` is `ci`."""

    family, op, name_of_kernels = "separable_conv2d", "conv2d", "depthwise_conv2d"
    function, plain = staticmethod(depthwise_conv2d), staticmethod(_plain)
    tf32 = False

    def filters(self, draw: Callable[..., Tensor]) -> Tensors:
        return {"weight": draw(self["co"], 1, self["k"], self["k"], scale=1 / self["k"])}

    def steps(self) -> tuple[Any, ...]:
        return self["s"], self["p"], self["d"]

    def pairs(self) -> tuple[Any, ...]:
        return tuple((step, step) for step in self.steps())

    def sizes(self) -> tuple[int, ...]:
        return self["ci"], *super().sizes()

    def prepared(self, t: Tensors) -> Tensors:
        return super().prepared({**t, "weight": self.laid_out(t["weight"])})

    def laid_out(self, weight: Tensor) -> Tensor:
        if weight.is_meta:  # where two orders are one, too
            return weight.new_empty((*weight.shape[2:], 1, weight.shape[0])).permute(3, 2, 0, 1)
        return taps_major(weight) if weight.is_cuda else weight

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        """The forward with its statistics, then the gradients."""

        def statistics(t: Tensors) -> tuple[Tensor, ...]:
            options = {**self.operands(t), "return_statistics": True}
            return depthwise_conv2d(t["x"], t["weight"], t["bias"], *self.steps(), **options)

        first, *gradients = super().proofs(device, dtype)
        on_device = moved(self.drawn(dtype), device)
        yield first._replace(actual=lambda: statistics(on_device)[0])
        values = [y.cpu().double() for y in (first.reference, first.aten)]
        reference, aten = (torch.stack([y.sum((2, 3)), y.square().sum((2, 3))]) for y in values)
        # Roundings of what is summed: their sum has this deviation, times 3.5, twice of which is allowed.
        squares = values[0].square()
        off = torch.stack([squares.sum((2, 3)), 4 * squares.square().sum((2, 3))]).sqrt()
        aten = reference + (aten - reference).abs().maximum(torch.finfo(dtype).eps * off)
        yield Proof(
            first.operation, f"{self.name}, sums", lambda: torch.stack(statistics(on_device)[1:]),
            reference, aten, reference, math.prod(self.output_size),
        )  # fmt: skip
        yield from gradients

    def gemm_width(self) -> int:
        return 0

    def forwards(self, x: Tensor, weight: Tensor, y: Tensor) -> Iterator[Launch]:
        filters, width = y.shape[1], self.gradient_widths(x.dtype)[0]
        vector, wide = meta(x.dtype, filters), meta(torch.float32, filters)
        forward = partial(load_kernels().depthwise_conv2d_forward, x, weight)
        yield "forward", partial(forward, vector, None, None, y, None, *self.pairs(), None, 0.01), width
        if self.name in _WITH_EPILOGUES:
            sums = meta(torch.float32, self["n"], 2, self["ci"])
            for name, between, activation, least in (
                ("scale+relu6", None, "relu6", width),
                ("gelu", None, "gelu", width),
                ("statistics", sums, "silu", min(4, width)),
            ):
                options = (None, wide, wide, y, between, *self.pairs(), activation, 0.01)
                yield name, partial(forward, *options), least

    def gradient_widths(self, dtype: torch.dtype) -> tuple[int, int]:
        channels, k = self["ci"], self["k"]
        walks = self["co"] == channels and k <= 7 and 1 in (self["s"], self["d"])
        width = _width(dtype, channels, k * k) if walks else math.gcd(16, dtype.itemsize * channels)
        return width, dtype.itemsize  # the filter itself is small


class SeparableConv2d(DepthwiseConv2d):
    """A depthwise convolution, then one of 1x1; after the first, `between`, by default the same activation.

    "linear": the second is followed by none. Its proof is of one of the kernel's forms, `form`.
    """

    op = "separable_conv2d"

    @property
    def _activations(self) -> tuple[str | None, str | None]:
        return self.params.get("between", self.activation), None if self.get("linear") else self.activation

    @property
    def _between(self) -> int:
        return self["ci"] * self.params.get("m", 1)

    def filters(self, draw: Callable[..., Tensor]) -> Tensors:
        between, k = self._between, self["k"]
        t = {"weight": draw(self["co"], between, 1, 1, scale=1 / math.sqrt(between))}
        t["depthwise"] = draw(between, 1, k, k, scale=1 / k)
        if "bias" in self.epilogue:
            t["depthwise_bias"] = draw(between)
        if "affine" in self.epilogue:
            t |= {"depthwise_scale": draw(between), "depthwise_shift": draw(between)}
        return t | (batch_norm(between, draw, "depthwise_") if "bn" in self.epilogue else {})

    def formula(self, t: Tensors) -> Tensor:
        between, after = self._activations
        y = self.plain(t["x"], t["depthwise"], t.get("depthwise_bias"), *self.steps())
        y = self.finish(y, t, "depthwise_", between)
        return self.finish(F.conv2d(y, t["weight"], t.get("bias")), t, activation=after)

    def linear(self) -> "SeparableConv2d":
        without = super().linear()
        return self.replace(epilogue=without.epilogue, params={**self.params, "between": None})

    def prepared(self, t: Tensors) -> Tensors:
        t = ConvolutionCase.prepared(self, {**t, "depthwise": self.laid_out(t["depthwise"])})
        if "bn" not in self.epilogue:
            return t
        scale, shift = affine(t, "depthwise_")
        return {**t, "depthwise_scale": scale, "depthwise_shift": shift}

    def ours(self, t: Tensors) -> Tensor:
        between, after = self._activations
        return separable_conv2d(
            t["x"], t["depthwise"], t["weight"], t.get("depthwise_bias"), t.get("bias"), *self.steps(),
            depthwise_scale=t["depthwise_scale"], depthwise_shift=t["depthwise_shift"],
            depthwise_activation=between, scale=t["scale"], shift=t["shift"], residual=t.get("residual"),
            activation=after,
        )  # fmt: skip

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        kernels = load_kernels()

        def function(t: Tensors) -> Tensor:
            tile = tile_of(self["form"], t["x"], self["co"])
            with kernels.override_tile("separable_conv2d_forward", tile):
                return self.ours(t)

        depth, tf32 = self["k"] ** 2 * self._between, kernels.multiplies_in_tf32(dtype)
        yield self.proof(OPERATIONS[3], self.name, function, self.drawn(dtype), device, depth, tf32)

    def count_flops(self, useful: bool) -> float:
        pixels = math.prod(self.output_size)
        return self.times() * self["n"] * pixels * self["ci"] * self["co"]

    def elements(self) -> tuple[float, float, float]:
        x, y, _ = super().elements()
        return x, y, self["ci"] * self["k"] ** 2 + self["ci"] * self["co"]

    def gemm_width(self) -> int:
        return self["co"]

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        n, ci, co, k = self["n"], self["ci"], self["co"], self["k"]
        t = self.filters(lambda *shape, scale=1.0: meta(dtype, *shape))
        x, y = meta(dtype, n, ci, self["h"], self["w"]), meta(dtype, n, co, *self.output_size)
        inner, outer = ([meta(torch.float32, c)] * 2 for c in (ci, co))
        filters = (self.laid_out(t["depthwise"]), None, *inner, t["weight"], None, *outer)
        width = math.gcd(_width(dtype, ci, k * k), dtype.itemsize * co)
        call = partial(load_kernels().separable_conv2d_forward, x, *filters)
        yield f"{self.name} separable", partial(call, None, y, *self.pairs(), "relu6", "relu", 0.01), width
        if "linear" in self.params:  # and with the sum around the block
            added = partial(call, y, y, *self.pairs(), "relu6", None, 0.01)
            yield f"{self.name} separable residual", added, width


def tile_of(form: str, x: Tensor, channels_out: int) -> Any:
    """The first tile of that form that fits the device."""
    from segfast.kernels import _device, _tiles  # which needs triton

    problem = _tiles.Problem(
        "separable_conv2d_forward", x.shape[1], channels_out, 9, 1, x.dtype, x.numel() // x.shape[1],
        rows=x.numel() // x.shape[1], columns=channels_out, depth=x.shape[1],
    )  # fmt: skip
    found = _tiles.candidates(problem, _device.architecture(x.device), _device.shared_memory_limit(x.device))
    return next(tile for tile in found if tile.form == form)


def _width(dtype: torch.dtype, channels: int, taps: int) -> int:
    """Bytes of a store: a thread's channels, as far as every pixel's address allows."""
    most = 16 if taps <= 9 else 8 if taps <= 25 else 4
    return math.gcd(max(most, dtype.itemsize), dtype.itemsize * channels)


def _proven(name, n, channels, filters, *given) -> DepthwiseConv2d:
    """`filters` a channel. Odd sizes that leave no tile full, several tiles in every direction."""
    params = sizes(n, channels, channels * filters, *given) | {"g": channels}
    return DepthwiseConv2d(name, "", params, epilogue=("bias", "affine", "relu6"), uses=("prove",))


def _proven_pair(name, n, ci, co, h, w, s, form, k=3, d=1, m=1) -> SeparableConv2d:
    params = sizes(n, ci, co, h, w, k, s, d * (k // 2), d, ci, m=m, form=form, between="relu6")
    return SeparableConv2d(name, "", params, epilogue=("bias", "affine", "add", "relu"), uses=("prove",))


def _depthwise(name, layer, c, size, k=3, *, s=1, d=1, m=1, small=1, side=None, epilogue=(), uses=("compile",)
               ) -> DepthwiseConv2d:  # fmt: skip
    """A case at batch 8, padded to keep the size; on a CPU it has `small` channels and `side` pixels."""
    params = sizes(8, c, c * m, size, size, k, s, d * (k - 1) // 2, d, c)
    little = {"n": 1, "ci": small, "co": small, **({"h": side, "w": side} if side else {}), "g": small}
    return DepthwiseConv2d(name, layer, params, little, epilogue, uses)


def _separable(name, layer, c, size, k=3, *, co=0, s=1, small=1, uses=("compile",)) -> SeparableConv2d:
    params = sizes(8, c, co or c, size, size, k, s, k // 2)
    sides = {"h": 129, "w": 129} if name == "entry_sep_128" else {}
    return SeparableConv2d(name, layer, params, {"n": 1, "ci": small, "co": small, **sides}, _BN_RELU, uses)


def _projected(depthwise: DepthwiseConv2d, co: int) -> SeparableConv2d:
    """A depthwise block and MobileNetV2's 1x1 convolution after it, which has no activation of its own."""
    params = {**depthwise.params, "co": co, "linear": 1}
    changes = {"name": f"{depthwise.name}_projected", "small": {**depthwise.small, "co": co}}
    return depthwise.become(SeparableConv2d, params=params, **changes, uses=("compile", "benchmark"))


def _batches(block: DepthwiseConv2d) -> Iterator[DepthwiseConv2d]:
    """`block` at each batch, and beside it its layer alone; at batch 8 under its own name."""
    for n in (1, 8, 32):
        case = block if n == 8 else block.at_batch(n)
        if n != 8 or "quick" not in block.uses:
            yield case
        if case.op == "conv2d" and case.epilogue not in ((), ("bias",)):
            yield case.alone()


_BN_RELU = ("bn", "relu")
_BN_RELU6 = ("bn", "relu6")
_BN_SILU = ("bn", "silu")
_BOTH = ("compile", "benchmark")
_BENCHMARK = ("benchmark",)
_QUICK = ("compile", "benchmark", "quick")
_HEADLINE = (*_QUICK, "headline")
_XCEPTION = _depthwise("xception_middle_dw", "Xception65 middle flow", 728, 65,
                       small=256, epilogue=_BN_RELU, uses=_HEADLINE)  # fmt: skip
_MOBILENET = _depthwise("mobilenetv2_dw144", "MobileNetV2 block 3", 144, 129,
                        small=72, epilogue=_BN_RELU6, uses=_HEADLINE)  # fmt: skip
# The rate-12 row has no batch norm in the table: its block is the one with.
_RATE_12 = _depthwise("aspp_dw_d12", "DeepLabV3+ separable ASPP, rate 12", 2048, 65, d=12,
                      small=256, uses=_QUICK)  # fmt: skip
_DECODER = _separable("decoder_sep_256", "DeepLabV3+ decoder", 256, 129, small=64, uses=_HEADLINE)
_MIDDLE = _separable("middle_sep_728", "Xception65 middle flow", 728, 65, small=182, uses=_QUICK)
CASES = [
    _proven("k3", 2, 72, 1, 11, 21, 3, 1, 1, 1),
    _proven("k3 s2", 2, 40, 1, 17, 21, 3, 2, 1, 1),
    _proven("k3 d3 21 channels", 1, 21, 1, 14, 19, 3, 1, 3, 3),
    _proven("k5", 1, 40, 1, 9, 19, 5, 1, 2, 1),
    _proven("k5 s2", 1, 40, 1, 10, 19, 5, 2, 2, 1),
    _proven("k7", 1, 40, 1, 9, 11, 7, 1, 3, 1),
    _proven("k9 s3, taps", 1, 24, 1, 13, 14, 9, 3, 4, 1),
    _proven("two filters a channel, taps", 2, 24, 2, 9, 11, 3, 2, 2, 2),
    _proven_pair("fused", 2, 136, 72, 13, 17, 1, "fused"),
    _proven_pair("fused s2", 1, 72, 264, 21, 17, 2, "fused"),
    _proven_pair("fused k5 d2, two filters a channel", 1, 40, 72, 13, 17, 1, "fused", 5, 2, 2),
    _proven_pair("two kernels", 2, 136, 72, 13, 17, 1, "two kernels"),
    _XCEPTION,
    _MOBILENET,
    _RATE_12,
    _DECODER,
    _separable("entry_sep_128", "Xception65 entry flow", 128, 257, small=32, uses=_QUICK),
    _MIDDLE,
    _XCEPTION.replace(name="xception_middle_dw_wgrad", epilogue=(), direction="grad_weight",
                      uses=("benchmark", "quick")),
    *_batches(_XCEPTION),
    *_batches(_MOBILENET),
    _RATE_12.replace(name="aspp_dw_d12_block", epilogue=_BN_RELU, uses=_BENCHMARK),
    *_batches(_depthwise("mobilenetv2_dw96_s2", "MobileNetV2 block 2", 96, 257, s=2,
                         small=48, epilogue=_BN_RELU6, uses=_BOTH)),
    *_batches(_depthwise("efficientnet_dw144_k5_s2", "EfficientNet-B0 stage 3, first block", 144, 128, 5, s=2,
                         small=72, epilogue=_BN_SILU, uses=_BENCHMARK)),
    *_batches(_depthwise("efficientnet_dw672_k5", "EfficientNet-B0 stage 5", 672, 32, 5,
                         small=168, epilogue=_BN_SILU, uses=_BENCHMARK)),
    *_batches(_depthwise("convnext_dw96_k7", "ConvNeXt-T stage 1", 96, 128, 7,
                         small=48, side=64, epilogue=("bias",), uses=_BOTH)),
    *_batches(_depthwise("segformer_dw256", "SegFormer-B2 stage 1, Mix-FFN", 256, 128,
                         small=64, side=64, epilogue=("bias", "gelu"), uses=_BENCHMARK)),
    *_batches(_DECODER),
    *_batches(_MIDDLE),
    *_batches(_projected(_MOBILENET, 24)),
    _depthwise("efficientnet_k5", "EfficientNet-B0 stage 5, 513 pixels", 672, 33, 5),
    _depthwise("efficientnet_k5_s2", "EfficientNet-B0 stage 3, 513 pixels", 144, 129, 5, s=2),
    _depthwise("kernel_1", "", 64, 65, 1),
    _depthwise("one_channel", "", 1, 65),
    _depthwise("channels_24", "", 24, 99),
    _depthwise("multiplier_2", "", 64, 65, m=2),
    _depthwise("kernel_31", "", 128, 65, 31),
    _depthwise("s2_d2", "", 128, 65, s=2, d=2),
    _separable("mobilenet_192_64_s2", "MobileNetV2 block 7", 192, 65, co=64, s=2),
    _separable("efficientnet_sep_k5", "EfficientNet-B0 stage 5, 513 pixels", 672, 33, 5, co=112),
]  # fmt: skip
