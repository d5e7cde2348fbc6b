"""The shapes of transposed convolution: odd ones to prove kernels on, and layers of real networks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Launch, Proof, Tensors, normal
from .._convolution_case import ConvolutionCase, meta, sizes, widest
from .._operands import load_kernels
from .functional import OPERATIONS, conv_transpose2d
from .up_concat import up_concat

# Whose forward is compiled beside a skip that is cropped, as in an unpadded U-Net, or with a whole epilogue.
_WITH_SKIP = ("unet_up2", "unet_up4", "up24")
_WITH_EPILOGUE = ("unet_up3", "decoder_up4x4", "up3x3")


class ConvTranspose2d(ConvolutionCase):
    family = op = name_of_kernels = "conv_transpose2d"
    function, plain = staticmethod(conv_transpose2d), staticmethod(F.conv_transpose2d)
    transposed = True

    def filters(self, draw: Callable[..., Tensor]) -> Tensors:
        ci, co, k, groups = self["ci"], self["co"], self["k"], self.get("g")
        if self.params.get("weight") == "bilinear":
            like = draw(ci, co, k, k)
            return {"weight": like.copy_(bilinear_weight(ci, k))}
        return {"weight": draw(ci, co // groups, k, k, scale=self["s"] / (ci * k * k / groups) ** 0.5)}

    def steps(self) -> tuple[Any, ...]:
        return self["s"], self["p"], self.get("extra"), self.get("g"), self.get("d")

    def pairs(self) -> tuple[Any, ...]:
        return (self["s"],) * 2, (self["p"],) * 2, self.get("g"), (self.get("d"),) * 2

    def geometry(self) -> tuple[Any, ...]:
        stride, padding, groups, dilation = self.pairs()
        return stride, padding, dilation, groups

    def gemm_width(self) -> int:
        dense_phase = self["k"] == self["s"]
        return self["co"] * (self["k"] ** 2 if dense_phase else 1)

    def forwards(self, x: Tensor, weight: Tensor, y: Tensor) -> Iterator[Launch]:
        n, channels, height, width = y.shape
        vector, least = meta(y.dtype, channels), widest(y.itemsize * channels // self.get("g"))

        def forward(affine=None, residual=None, skip=None, activation=None) -> None:
            out = meta(y.dtype, n, channels + (0 if skip is None else skip.shape[1]), height, width)
            crop = (0, 0) if skip is None else (4, 4)
            operands = (x, weight, vector, affine, affine, residual, skip, out)
            load_kernels().conv_transpose2d_forward(*operands, *self.geometry(), crop, activation, 0.01)

        yield "forward", forward, least
        if self.name in _WITH_SKIP:
            skip = meta(y.dtype, n, channels, height + 8, width + 8)
            yield "up_concat", partial(forward, skip=skip, activation="relu"), least
        if self.name in _WITH_EPILOGUE:
            fused = partial(forward, affine=vector, residual=y, activation="gelu")
            yield "scale+residual+gelu", fused, least


class UpConcat(ConvTranspose2d):
    """The step of a U-Net: beside the upsampled, a skip of `cs` channels, at least `hs` by `ws` pixels."""

    op = "up_concat"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        t = super().inputs(device, dtype, generator)
        size = [max(self[side], up) for side, up in zip(("hs", "ws"), self.output_size, strict=True)]
        t["skip"] = normal(device, dtype, generator)(self["n"], self.params.get("cs", self["co"]), *size)
        return t

    def formula(self, t: Tensors) -> Tensor:
        up = super().formula(t)
        return torch.cat([crop_to(t["skip"], *up.shape[2:]), up], 1)

    def ours(self, t: Tensors) -> Tensor:
        return up_concat(t["x"], t["skip"], t["weight"], t.get("bias"), self["s"], self["p"])

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        """The same forward kernel with its copy of a cropped skip, which must be exact."""
        t, tf32 = self.drawn(dtype), load_kernels().multiplies_in_tf32(dtype)
        whole = self.proof(OPERATIONS[0], f"{self.name} crop", self.ours, t, device, self.depths()[0], tf32)
        yield whole
        copied = crop_to(t["skip"], *self.output_size)

        def differs() -> Tensor:
            return (whole.actual()[:, : copied.shape[1]].cpu() != copied).float()

        nowhere = torch.zeros(copied.shape)
        yield Proof(
            OPERATIONS[0], f"{self.name} copy", differs, nowhere.double(), nowhere, nowhere.double(), 1
        )

    def elements(self) -> tuple[float, float, float]:
        # The skip's crop is read and written beside the up-convolution.
        x, y, weight = super().elements()
        return x, 3 * y, weight


def crop_to(skip: Tensor, height: int, width: int) -> Tensor:
    """The center of `skip`."""
    top, left = (skip.shape[2] - height) // 2, (skip.shape[3] - width) // 2
    return skip[:, :, top : top + height, left : left + width]


def bilinear_weight(channels: int, k: int) -> Tensor:
    """FCN's initialization [C, C, k, k]: each channel interpolates itself (Long, Shelhamer, Darrell 2015)."""
    factor = (k + 1) // 2
    center = factor - 1 if k % 2 == 1 else factor - 0.5
    line = 1 - (torch.arange(k) - center).abs() / factor
    weight = torch.zeros(channels, channels, k, k)
    weight[range(channels), range(channels)] = line[:, None] * line
    return weight


def _proven(name, *given, extra=0) -> ConvTranspose2d:
    """A case to prove: odd sizes that leave no tile full."""
    epilogue = ("bias", "affine", "add", "relu")
    return ConvTranspose2d(name, "", sizes(*given, extra=extra), epilogue=epilogue, uses=("prove",))


def _up(name, layer, n, ci, co, size, k, s, p=0, *, small, epilogue=("bias",)) -> ConvTranspose2d:
    params = {"n": n, "ci": ci, "co": co, "h": size, "w": size, "k": k, "s": s, "p": p}
    uses = ("compile", "benchmark", "quick", "headline")
    small = {"n": 1, **dict(zip(("ci", "co", "h", "w"), small, strict=False))}
    return ConvTranspose2d(name, layer, params, small, epilogue, uses)


def _compiled(name, *given) -> ConvTranspose2d:
    return ConvTranspose2d(name, "", sizes(*given), uses=("compile",))


def _bilinear(case: ConvTranspose2d, side: int) -> ConvTranspose2d:
    """The layer with FCN's fixed weights: bilinear on the channels' diagonal, zero off it."""
    params, small = {**case.params, "weight": "bilinear"}, {**case.small, "h": side, "w": side}
    uses = ("benchmark", "quick")
    return case.replace(name=f"{case.name}_bilinear", params=params, small=small, uses=uses)


def _concat(case: ConvTranspose2d, skip: int, *uses: str) -> UpConcat:
    name, params = f"{case.name}_concat", {**case.params, "hs": skip, "ws": skip}
    uses = ("benchmark", "quick", *uses)
    return case.become(UpConcat, name=name, layer=f"{case.layer} and skip", params=params, uses=uses)


_UPS = [
    _up("unet_up1", "U-Net up 1", 16, 1024, 512, 28, 2, 2, small=(512, 256)),
    _up("unet_up2", "U-Net up 2", 16, 512, 256, 52, 2, 2, small=(256, 128)),
    _up("unet_up3", "U-Net up 3", 16, 256, 128, 100, 2, 2, small=(128, 64)),
    _up("unet_up4", "U-Net up 4", 16, 128, 64, 196, 2, 2, small=(64, 32)),
    _up("decoder_up4x4", "4x4 stride 2 decoder", 16, 256, 128, 64, 4, 2, 1, small=(128, 64, 32, 32)),
    _up("fcn8s_up8", "FCN-8s, last upsampling", 16, 21, 21, 70, 16, 8, 4,
        small=(21, 21, 32, 32), epilogue=()),
    _up("fcn32s_up32", "FCN-32s, upsampling", 16, 21, 21, 16, 64, 32, 16,
        small=(21, 21, 8, 8), epilogue=()),
]  # fmt: skip
CASES = [
    _proven("k2s2", 2, 40, 24, 13, 11, 2, 2),
    _proven("k2s2 output_padding", 1, 72, 136, 9, 7, 2, 2, extra=1),
    _proven("k4s2p1", 2, 64, 128, 9, 17, 4, 2, 1),
    _proven("k16s8 21 classes", 1, 21, 21, 7, 5, 16, 8, 4),
    _proven("k3s2 groups dilation", 2, 24, 48, 8, 9, 3, 2, 1, 2, 3, extra=1),
    UpConcat("up_concat", "", {"n": 2, "ci": 24, "co": 48, "h": 9, "w": 7, "k": 2, "s": 2, "p": 0,
                               "extra": (0, 1), "cs": 40, "hs": 25, "ws": 15}, uses=("prove",)),
    *_UPS,
    *(_bilinear(case, side) for case, side in zip(_UPS[5:], (16, 16), strict=True)),
    *(_concat(case, skip) for case, skip in zip(_UPS, (64, 136, 280), strict=False)),
    _concat(_UPS[3], 568, "headline"),
    _compiled("up3x3", 16, 256, 128, 64, 64, 3, 2, 1),
    _compiled("up3x3_groups", 16, 96, 48, 64, 64, 3, 2, 1, 2, 2),
    _compiled("up24", 16, 48, 24, 99, 101, 2, 2),
    _compiled("past_int32", 64, 128, 64, 400, 400, 2, 2),
]  # fmt: skip
