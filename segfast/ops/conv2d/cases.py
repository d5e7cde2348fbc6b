"""The shapes of conv2d: odd ones to prove kernels on, and layers of ResNet, U-Net, VGG16 and DeepLab."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Launch, Proof, Tensors, normal
from .._convolution_case import ConvolutionCase, affine, meta, sizes, widest
from .._operands import load_kernels
from .batch_norm_cases import CASES as _NORMS
from .functional import OPERATIONS, conv2d
from .geometry import cropped
from .parallel import parallel_conv2d

_WITH_RESIDUAL = ("resnet_layer3_reduce", "resnet_layer3_d2", "aspp_r12")  # compiled with one, too


class Conv2d(ConvolutionCase):
    family, op, name_of_kernels = "conv2d", "conv2d", "conv2d"
    function, plain = staticmethod(conv2d), staticmethod(F.conv2d)

    def filters(self, draw: Callable[..., Tensor]) -> Tensors:
        depth, k = self["ci"] // self.get("g"), self["k"]
        return {"weight": draw(self["co"], depth, k, k, scale=1 / math.sqrt(depth * k * k))}

    def steps(self) -> tuple[Any, ...]:
        return self["s"], self["p"], self["d"], self.get("g")

    def pairs(self) -> tuple[Any, ...]:
        return (self["s"],) * 2, (self["p"],) * 2, (self["d"],) * 2, self.get("g")

    def forwards(self, x: Tensor, weight: Tensor, y: Tensor) -> Iterator[Launch]:
        vector, width = meta(torch.float32, y.shape[1]), widest(y.itemsize * y.shape[1] // self.get("g"))
        forward = partial(load_kernels().conv2d_forward, (x,), weight, None)
        yield "forward", partial(forward, None, None, None, y, *self.pairs(), None, 0.0), width
        yield "scale+relu", partial(forward, vector, vector, None, y, *self.pairs(), "relu", 0.0), width
        if self.name in _WITH_RESIDUAL:
            yield "residual", partial(forward, vector, vector, y, y, *self.pairs(), "relu", 0.0), width


class SplitConv2d(Conv2d):
    """A conv2d on tiles whose depth is cut into `split` parts."""

    def ours(self, t: Tensors) -> Tensor:
        with _split(OPERATIONS[0], self["split"]):
            return super().ours(t)

    def grad_input(self, t: Tensors, grad: Tensor) -> Tensor:
        with _split(OPERATIONS[1], self["split"] if self["s"] == 1 else 1):
            return super().grad_input(t, grad)


def _split(operation: str, split: int) -> contextlib.AbstractContextManager:
    """Tiles of so many parts; the operation's own if there is one part."""
    if split == 1:
        return contextlib.nullcontext()
    kernels = load_kernels()
    return kernels.override_tile(operation, kernels.Tile(64, 32, 32, 4, 3, split_k=split))


class Images(Conv2d):
    """One convolution of several images, `images` of (channels, height, width), cropped to the smallest."""

    op = "conv2d_of_images"

    def inputs(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        draw = normal(device, dtype, generator)
        images = {f"x{i}": draw(self["n"], *shape) for i, shape in enumerate(self["images"])}
        return {**images, **self.filters(draw), "bias": draw(self["co"])}

    def formula(self, t: Tensors) -> Tensor:
        return super().formula({**t, "x": torch.cat(cropped(self._images(t)), 1)})

    def ours(self, t: Tensors) -> Tensor:
        options = {"padding": self["p"], "activation": self.activation}
        return conv2d(self._images(t), t["weight"], t["bias"], **options)

    def _images(self, t: Tensors) -> Sequence[Tensor]:
        return [t[f"x{i}"] for i in range(len(self["images"]))]

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        t, depth, tf32 = self.drawn(dtype), self.depths()[0], load_kernels().multiplies_in_tf32(dtype)
        yield self.proof(OPERATIONS[0], self.name, self.ours, t, device, depth, tf32)

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        images = cropped([meta(dtype, self["n"], *shape) for shape in self["images"]])
        k, co = self["k"], self["co"]
        weight, y = meta(dtype, co, self["ci"], k, k), meta(dtype, self["n"], co, *self.output_size)
        options = (meta(dtype, co), None, None, None, y, *self.pairs(), "relu", 0.0)
        yield f"{self.name} images", partial(load_kernels().conv2d_forward, images, weight, *options), 16


class Branches(ConvolutionCase):
    """The convolutions of an ASPP that read its input, at 1x1 and at `rates`, and their concatenation."""

    family, op = "conv2d", "aspp_branches"

    @property
    def dilations(self) -> tuple[int, ...]:
        return 1, *self["rates"]

    @property
    def vectors(self) -> int:
        return len(self.dilations) * self["co"]

    @property
    def names(self) -> list[str]:
        """Of the branches' weights, the 1x1 convolution's first."""
        return ["weight", *(f"rate{i}" for i in range(len(self["rates"])))]

    def filters(self, draw: Callable[..., Tensor]) -> Tensors:
        taps = {name: 1 if d == 1 else 3 for name, d in zip(self.names, self.dilations, strict=True)}
        co, ci = self["co"], self["ci"]
        return {name: draw(co, ci, k, k, scale=1 / math.sqrt(ci * k * k)) for name, k in taps.items()}

    def layer_of(self, x: Tensor, t: Tensors, name: str, d: int = 1) -> Tensor:
        """A convolution that keeps the size, with batch norm and activation where the case has them."""
        y = F.conv2d(x, t[name], None, 1, d * (t[name].shape[2] // 2), d)
        return self.finish(y, t, activation=self.activation) if "bn" in self.epilogue else y

    def branches(self, t: Tensors, layer: Callable[..., Tensor]) -> list[Tensor]:
        return [layer(t["x"], t, name, d) for name, d in zip(self.names, self.dilations, strict=True)]

    def formula(self, t: Tensors, layer: Callable[..., Tensor] | None = None) -> Tensor:
        """`layer` in the place of `layer_of`, if given."""
        y = torch.cat(self.branches(t, layer or self.layer_of), 1)
        return y if "bn" in self.epilogue else self.finish(y, t, activation=self.activation)

    def prepared(self, t: Tensors) -> Tensors:
        if "bn" not in self.epilogue:
            return t
        scale, shift = (vector.repeat(len(self.dilations)) for vector in affine(t))
        return {**t, "scale": scale, "shift": shift}

    def ours(self, t: Tensors) -> Tensor:
        return parallel_conv2d(t["x"], [t[name] for name in self.names], self.dilations, **self.operands(t))

    def proofs(self, device: torch.device, dtype: torch.dtype) -> Iterator[Proof]:
        """The one launch, on tiles whose depth is cut into `split` parts."""

        def function(t: Tensors) -> Tensor:
            with _split(OPERATIONS[3], self["split"]):
                return self.ours(t)

        t, tf32 = self.drawn(dtype), load_kernels().multiplies_in_tf32(dtype)
        yield self.proof(OPERATIONS[3], self.name, function, t, device, 9 * self["ci"], tf32)

    def launches(self, dtype: torch.dtype) -> Iterator[Launch]:
        size, filters = (self["h"], self["w"]), self.filters(lambda *shape, scale: meta(dtype, *shape))
        x, out = meta(dtype, self["n"], self["ci"], *size), meta(dtype, self["n"], self.vectors, *size)
        vector = meta(torch.float32, self.vectors)
        options = (vector, vector, out, [(d, d) for d in self.dilations], "relu", 0.0)
        call = partial(load_kernels().parallel_conv2d_forward, x, list(filters.values()), *options)
        yield f"{self.name} parallel", call, 16

    def count_flops(self, useful: bool) -> float:
        return self.times() * self["n"] * self["co"] * self["ci"] * self._products(useful)

    def _products(self, useful: bool) -> int:
        """Products of all branches, for one pair of channels and one image."""
        rates = (self.replace(params={**self.params, "k": 3, "d": d, "p": d}) for d in self["rates"])
        return sum(rate.products(useful) for rate in rates) + self["h"] * self["w"]

    def elements(self) -> tuple[float, float, float]:
        x, y, weight = super().elements()
        return x, y * len(self.dilations), weight * (9 * len(self["rates"]) + 1)


class Aspp(Branches):
    """The whole: a pooled branch besides, and the projection. Ours is a module, of the benchmarks."""

    op = "aspp"

    def filters(self, draw: Callable[..., Tensor]) -> Tensors:
        co, ci, inner = self["co"], self["ci"], self._concatenated
        more = {"pool": (ci, 1 / math.sqrt(ci)), "project": (inner, 1 / math.sqrt(inner))}
        return super().filters(draw) | {name: draw(co, c, 1, 1, scale=s) for name, (c, s) in more.items()}

    @property
    def _concatenated(self) -> int:
        return self.vectors + self["co"]

    def formula(self, t: Tensors, layer: Callable[..., Tensor] | None = None) -> Tensor:
        layer = layer or self.layer_of
        x, branches = t["x"], self.branches(t, layer)
        pooled = layer(x.mean((2, 3), keepdim=True), t, "pool")
        branches.append(F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=False))
        return layer(torch.cat(branches, 1), t, "project")

    def count_flops(self, useful: bool) -> float:
        projection = self["h"] * self["w"] * self._concatenated
        return super().count_flops(useful) + self.times() * self["n"] * self["co"] * projection

    def elements(self) -> tuple[float, float, float]:
        x, y, _ = ConvolutionCase.elements(self)
        taps = 9 * len(self["rates"]) + 2
        return x, y, self["co"] * (self["ci"] * taps + self._concatenated)


def _proven(name, *given, split=1) -> SplitConv2d:
    """A case to prove: odd sizes that leave no tile full, and each of the kernels' forms."""
    epilogue = ("bias", "affine", "add", "relu")
    return SplitConv2d(name, "", sizes(*given, split=split), epilogue=epilogue, uses=("prove",))


def _pyramid(split: int) -> Branches:
    sizes = {"n": 1, "ci": 72, "co": 72, "h": 33, "w": 31, "rates": (6, 12, 18), "split": split}
    return Branches(f"pyramid, split {split}", "", sizes, epilogue=("affine", "relu"), uses=("prove",))


def _images(name: str, layer: str, n: int, co: int, p: int, images: Sequence[tuple], use: str) -> Images:
    channels, heights, widths = zip(*images, strict=True)
    params = sizes(n, sum(channels), co, min(heights), min(widths), 3, 1, p, images=images)
    return Images(name, layer, params, epilogue=("bias", "relu"), uses=(use,))


def _conv(name, layer, n, ci, co, size, k, s=1, d=1, p=None, *, g=1, small=(), uses=(), **fields) -> Conv2d:
    padding = d * (k - 1) // 2 if p is None else p
    params = sizes(n, ci, co, size, size, k, s, padding, d, g)
    return Conv2d(name, layer, params, _small(*small), uses=uses, **fields)


def _small(ci: int = 1, co: int = 1, side: int | None = None) -> dict[str, int]:
    return {"n": 1, "ci": ci, "co": co, **({} if side is None else {"h": side, "w": side})}


def _tabled(name, layer, ci, size, d=1, p=None, *uses, small, epilogue=("bn", "relu")) -> Conv2d:
    uses = ("compile", "benchmark", "quick", *uses)
    return _conv(name, layer, 8, ci, ci, size, 3, d=d, p=p, small=small, epilogue=epilogue, uses=uses)


def _dense(name, layer, ci, co, size, k=3, *, epilogue=("bn", "relu"), uses=(), **steps) -> list[Conv2d]:
    """A convolution at batch 8 and 1; on a CPU with a quarter of the channels, up to 64, and 33 pixels."""
    few = [c if c < 16 else min(64, c // 4) for c in (ci, co)]
    fields = {"small": (*few, min(size, 33)), "epilogue": epilogue, **steps}
    case = _conv(name, layer, 8, ci, co, size, k, uses=("benchmark", *uses), **fields)
    return [case, case.at_batch(1)]


def _aspp(name, layer, n, size, rates, *, small, uses=("benchmark", "quick")) -> Aspp:
    params = {"n": n, "ci": 2048, "co": 256, "h": size, "w": size, "rates": rates}
    return Aspp(name, layer, params, _small(*small), ("bn", "relu"), uses)


def _branches(aspp: Aspp) -> Branches:
    compiled = ("compile",) * (aspp.name != "aspp_n1_65")
    name = aspp.name.replace("aspp_", "aspp_branches_")
    return aspp.become(Branches, name=name, uses=("benchmark", *compiled))


_BIAS_RELU = ("bias", "relu")
_BN_ADD_RELU = ("bn", "add", "relu")
_COMPILED = ("compile",)
_ASPP = "DeepLabV3 ASPP, 513 pixels, OS"
_ASPPS = [
    _aspp("aspp_n1_33", f"{_ASPP}16", 1, 33, (6, 12, 18), small=(256, 64)),
    _aspp("aspp_n8_33", f"{_ASPP}16", 8, 33, (6, 12, 18), small=(128, 32)),
    _aspp("aspp_n8_65", f"{_ASPP}8", 8, 65, (12, 24, 36), small=(64, 32)),
    _aspp("aspp_n1_65", f"{_ASPP}8", 1, 65, (12, 24, 36), small=(64, 32), uses=("benchmark",)),
]
_TABLED = [
    _tabled("resnet_layer3_d2", "ResNet OS8 layer3 3x3", 256, 65, 2, None, "headline", small=(128, 128, 33)),
    _tabled("resnet_layer4_d4", "ResNet OS8 layer4 3x3", 512, 65, 4, small=(128, 128, 33)),
    _tabled("unet_down1_conv2", "U-Net level 1, second 3x3", 64, 570, 1, 0,
            small=(32, 32, 190), epilogue=_BIAS_RELU),
]  # fmt: skip
# ResNet-50 at output stride 8, U-Net at 572 pixels and VGG16 in FCN-8s at 500: inference's at batch 8 and 1,
# and alone what has an epilogue.
CASES = [
    _proven("k3", 2, 72, 136, 13, 11, 3, 1, 1),
    _proven("k1 split", 1, 264, 72, 9, 7, 1, 1, 0, split=3),
    _proven("k3 d2 split", 1, 136, 40, 15, 17, 3, 1, 2, 2, split=4),
    _proven("k3 s2", 2, 64, 72, 17, 21, 3, 2, 1),
    _proven("k7 s2 RGB", 2, 3, 64, 33, 35, 7, 2, 3),
    _proven("k3 d12 zones", 1, 72, 72, 19, 21, 3, 1, 12, 12),
    _proven("k3 d18 zones split", 1, 72, 40, 33, 31, 3, 1, 18, 18, split=3),
    _proven("k3 pad 20", 1, 64, 72, 3, 5, 3, 1, 20),
    _proven("k5 s3 d2 groups", 2, 48, 24, 23, 19, 5, 3, 3, 2, 3),
    _proven("k3 21 channels", 1, 21, 21, 14, 19, 3, 1, 1),
    _images("four images", "", 2, 72, 1, ((40, 15, 14), (72, 9, 12), (24, 9, 11), (64, 13, 11)), "prove"),
    _pyramid(1),
    _pyramid(3),
    *_ASPPS[:3],
    *_TABLED,
    _TABLED[0].replace(name="resnet_layer3_d2_wgrad", epilogue=(), direction="grad_weight",
                       uses=("benchmark", "quick")),
    _ASPPS[3],
    *map(_branches, _ASPPS),
    *(case.at_batch(1) for case in _TABLED),
    *(case.alone() for case in _TABLED),
    *_dense("resnet_layer1_3x3", "ResNet layer1 3x3", 64, 64, 129),
    *_dense("resnet_layer1_expand", "ResNet layer1 1x1", 64, 256, 129, 1, epilogue=_BN_ADD_RELU),
    *_dense("resnet_layer2_3x3", "ResNet OS8 layer2 3x3", 128, 128, 65),
    *_dense("resnet_layer3_reduce", "ResNet OS8 layer3 1x1", 1024, 256, 65, 1, uses=_COMPILED),
    *_dense("resnet_layer3_expand", "ResNet OS8 layer3 1x1", 256, 1024, 65, 1, epilogue=_BN_ADD_RELU),
    *_dense("resnet_layer4_expand", "ResNet OS8 layer4 1x1", 512, 2048, 65, 1, epilogue=_BN_ADD_RELU),
    *_dense("resnet_stem", "ResNet stem", 3, 64, 513, 7, s=2, uses=_COMPILED),
    *_dense("fcn_head_3x3", "FCN-ResNet's head", 2048, 512, 65),
    *_dense("deeplabv3_project", "DeepLabV3 ASPP's projection, OS8", 1280, 256, 65, 1),
    *_dense("unet_down2_conv2", "U-Net level 2, second 3x3", 128, 128, 282, p=0, epilogue=_BIAS_RELU),
    *_dense("unet_bottom_conv2", "U-Net bottom, second 3x3", 1024, 1024, 30, p=0, epilogue=_BIAS_RELU),
    *_dense("unet_up2_conv1", "U-Net up 2, first 3x3", 512, 256, 104, p=0, epilogue=_BIAS_RELU),
    *_dense("unet_up4_conv1", "U-Net up 4, first 3x3", 128, 64, 392, p=0, epilogue=_BIAS_RELU),
    *_dense("vgg16_conv1_2", "VGG16 in FCN-8s, padded by 100", 64, 64, 698, epilogue=_BIAS_RELU),
    *_dense("vgg16_conv3_2", "VGG16 in FCN-8s, padded by 100", 256, 256, 175, epilogue=_BIAS_RELU),
    *_dense("vgg16_conv4_2", "VGG16 in FCN-8s, padded by 100", 512, 512, 88, epilogue=_BIAS_RELU),
    *_dense("vgg16_conv6", "VGG16's first classifier in FCN-8s", 512, 4096, 22, 7, p=0, epilogue=_BIAS_RELU),
    _conv("vgg_conv5", "VGG16, fifth block", 8, 512, 512, 32, 3, uses=_COMPILED),
    _conv("resnet_layer4_d4_33_n1", "ResNet OS8 layer4 3x3", 1, 512, 512, 33, 3, d=4, uses=_COMPILED),
    _conv("resnet_down", "ResNet layer2, first 3x3", 8, 128, 128, 129, 3, 2, uses=_COMPILED),
    _conv("aspp_r12", "DeepLabV3 ASPP, rate 12", 8, 2048, 256, 33, 3, d=12, uses=_COMPILED),
    _conv("aspp_r18_n1", "DeepLabV3 ASPP, rate 18", 1, 2048, 256, 33, 3, d=18, uses=_COMPILED),
    _conv("classifier_21", "FCN-ResNet's classifier", 8, 512, 21, 65, 1, uses=_COMPILED),
    _conv("resnext_32x8", "ResNeXt OS8 layer3 3x3", 8, 256, 256, 65, 3, d=2, g=32, uses=_COMPILED),
    _conv("past_int32", "", 64, 64, 128, 800, 3, uses=_COMPILED),
    # A cropped skip beside what was upsampled, unpadded, and four images at once.
    _images("unet_decoder", "U-Net's decoder", 8, 128, 0, ((128, 280, 280), (128, 200, 200)), "compile"),
    _images("unet_plus_plus", "U-Net++", 8, 128, 0,
            ((64, 128, 128), (64, 128, 128), (24, 128, 128), (64, 128, 128)), "compile"),
    *_NORMS,
]  # fmt: skip
