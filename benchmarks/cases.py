"""Every measured shape, named after the layer of the model it is from.

One list for the benchmarks, the tuner and the tests. Sizes are those of the papers' networks at batch 1, 8
or 16, bf16; `case.cpu()` is the same layer small enough for a CPU (batch 1, fp32). Needs torch only.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

DIRECTIONS = ("forward", "grad_input", "grad_weight", "backward", "train")
TILE_M, TILE_N = 128, 256  # the largest tile an implicit GEMM is expected to run with


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator call, or one whole model.

    `op` names the formula in problems.py, `family` the operator family that serves it, `epilogue` what
    follows the product (`bias`, `bn` in eval mode, an activation). `small` replaces entries of `params` on a
    CPU.
    """

    name: str
    family: str
    op: str
    layer: str
    params: Mapping[str, Any] = dataclasses.field(hash=False)
    small: Mapping[str, Any] = dataclasses.field(hash=False, repr=False)
    dtype: str = "bfloat16"
    direction: str = "forward"
    epilogue: tuple[str, ...] = ()
    size: str = "full"
    headline: bool = False

    def __getitem__(self, key: str) -> Any:
        return self.params[key]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def activation(self) -> str | None:
        return next((name for name in self.epilogue if name not in ("bias", "bn")), None)

    @property
    def key(self) -> str:
        return f"{self.name}/{self.dtype}/{self.direction}/{self.size}"

    def cpu(self) -> "Case":
        """The same layer at batch 1 in fp32 and small."""
        return self.replace(params={**self.params, **self.small}, dtype="float32", size="cpu")

    def tiny(self) -> "Case":
        """Smaller still, for a walk through the control flow."""
        case = self.cpu()
        most = {"ci": 16, "co": 16, "g": 16, "h": 24, "w": 24, "classes": 16}
        if case.op == "model":
            most = {"h": 188, "w": 188}
        params = {name: min(value, most.get(name, value)) for name, value in case.params.items()
                  if isinstance(value, int)}  # fmt: skip
        return case.replace(params={**case.params, **params}, size="tiny")

    def replace(self, **changes) -> "Case":
        return dataclasses.replace(self, **changes)

    @property
    def flops(self) -> float:
        """Matrix FLOPs as usually counted, padding included; of a separable pair the pointwise half."""
        return _work(self, useful=False)

    @property
    def useful_flops(self) -> float:
        """FLOPs left when products with zero padding, or outside the output, are not made."""
        return _work(self, useful=True)

    @property
    def min_bytes(self) -> float:
        """Bytes of every input read once and every output written once."""
        return _bytes(self)

    @property
    def exponentials(self) -> float:
        """exp2 evaluations of an exact dense CRF: one for each pair of pixels, in each iteration."""
        return (self["h"] * self["w"]) ** 2 * self["iterations"] if self.op == "dense_crf" else 0.0

    @property
    def l2_bytes(self) -> float:
        """What an implicit GEMM with 128 x 256 tiles reads from L2: each input tile again for every tap."""
        width = _gemm_width(self)
        if width == 0:
            return 0.0
        n = min(TILE_N, 2 ** math.ceil(math.log2(width)))
        return self.useful_flops * _itemsize(self) / 2 * (TILE_M + n) / (TILE_M * n)


def _itemsize(case: Case) -> int:
    return case.torch_dtype.itemsize


def output_size(case: Case) -> tuple[int, int]:
    """Height and width of the output of a convolution case."""
    k, s, p, d = (case.params.get(name, value) for name, value in (("k", 1), ("s", 1), ("p", 0), ("d", 1)))
    reach = d * (k - 1) + 1
    if case.op in ("conv_transpose2d", "up_concat"):
        return tuple((case[side] - 1) * s - 2 * p + reach for side in ("h", "w"))  # type: ignore[return-value]
    return tuple((case[side] + 2 * p - reach) // s + 1 for side in ("h", "w"))  # type: ignore[return-value]


def valid_taps(size: int, out: int, k: int, s: int, p: int, d: int, transposed: bool) -> int:
    """Pairs (position, tap) along one axis whose product is kept: inside the input, or inside the output."""
    positions, limit = (size, out) if transposed else (out, size)
    return sum(0 <= i * s - p + t * d < limit for i in range(positions) for t in range(k))


def _products(case: Case, useful: bool, k: int, d: int, p: int) -> int:
    """Position-tap products of one channel pair and one image."""
    transposed = case.op in ("conv_transpose2d", "up_concat")
    s = case.params.get("s", 1)
    sized = case.replace(params={**case.params, "k": k, "d": d, "p": p})
    total = 1
    for side, out in zip(("h", "w"), output_size(sized), strict=True):
        positions = case[side] if transposed else out
        total *= valid_taps(case[side], out, k, s, p, d, transposed) if useful else positions * k
    return total


def _work(case: Case, useful: bool) -> float:
    if case.op == "model":
        times = 3 if case.direction == "train" else 1
        scale = (case["h"] * case["w"]) / (case["full_h"] * case["full_w"])
        return case["gflop"] * 1e9 * case["n"] * times * scale
    if case.op == "dense_crf":
        # Exponent and filter, each a dot over 32 columns.
        return 128.0 * case.exponentials
    if case.op == "upsample_cross_entropy":
        return 0.0
    n, ci, co = case["n"], case["ci"], case["co"]
    if case.op == "separable_conv2d":
        pixels = math.prod(output_size(case))
        work = 2.0 * n * pixels * ci * co
    elif case.op == "aspp":
        products = sum(_products(case, useful, 3, rate, rate) for rate in case["rates"])
        pixels = case["h"] * case["w"]
        branches = len(case["rates"]) + 2
        work = 2.0 * n * co * (ci * (products + pixels) + pixels * branches * co)
    else:
        d, p = case.params.get("d", 1), case.params.get("p", 0)
        work = 2.0 * n * ci * co / case.params.get("g", 1) * _products(case, useful, case["k"], d, p)
    return work * {"backward": 2, "train": 3}.get(case.direction, 1)


def _bytes(case: Case) -> float:
    if case.op in ("model", "dense_crf"):
        return 0.0
    n, item = case["n"], _itemsize(case)
    if case.op == "upsample_cross_entropy":
        pixels = case["h"] * case["w"]
        return n * (case["classes"] * pixels * item + pixels * case["scale"] ** 2 * 8.0)
    ci, co, pixels = case["ci"], case["co"], case["h"] * case["w"]
    out = math.prod(output_size(case)) if case.op != "aspp" else pixels
    weight = ci * co * case.params.get("k", 1) ** 2 / case.params.get("g", 1)
    if case.op == "separable_conv2d":
        weight = ci * case["k"] ** 2 + ci * co
    if case.op == "aspp":
        branches = len(case["rates"]) + 2
        weight = co * (ci * (9 * len(case["rates"]) + 2) + branches * co)
    x, y = n * pixels * ci, n * out * co
    if case.op == "up_concat":
        # The skip's crop is read and written beside the up-convolution.
        y += 2 * n * out * co
    # Forward reads x and the weight, writes y; a gradient reads two of the three and writes the other.
    passes = {"backward": 2 * x + y + 2 * weight, "train": 3 * x + 2 * y + 3 * weight}
    return item * passes.get(case.direction, x + y + weight)


def _gemm_width(case: Case) -> int:
    """Columns of the matrix product behind a case; 0 where there is none."""
    if case.op in ("conv_transpose2d", "up_concat"):
        dense_phase = case["k"] == case["s"]
        return case["co"] * (case["k"] ** 2 if dense_phase else 1)
    if case.op in ("conv2d", "aspp", "separable_conv2d"):
        return case["co"] if case.params.get("g", 1) == 1 or case.op == "separable_conv2d" else 0
    return 0


def _small(ci: int, co: int, side: int | None = None, **more: int) -> dict[str, int]:
    return {"n": 1, "ci": ci, "co": co, **({} if side is None else {"h": side, "w": side}), **more}


def _up(name, layer, n, ci, co, size, k, s, p=0, *, small, epilogue=("bias",)) -> Case:
    params = {"n": n, "ci": ci, "co": co, "h": size, "w": size, "k": k, "s": s, "p": p}
    family = op = "conv_transpose2d"
    return Case(name, family, op, layer, params, small, epilogue=epilogue, headline=True)


def _bilinear(case: Case, side: int) -> Case:
    """The layer with FCN's fixed weights: bilinear on the channels' diagonal, zero off it."""
    small = _small(case["ci"], case["co"], side)
    params = {**case.params, "weight": "bilinear"}
    return case.replace(name=f"{case.name}_bilinear", params=params, small=small, headline=False)


def _up_concat(name, layer, ci, co, size, skip, *, small, headline=False) -> Case:
    params = {
        "n": 16,
        "ci": ci,
        "co": co,
        "h": size,
        "w": size,
        "hs": skip,
        "ws": skip,
        "k": 2,
        "s": 2,
        "p": 0,
    }
    fields = {"epilogue": ("bias",), "headline": headline}
    return Case(name, "conv_transpose2d", "up_concat", layer, params, small, **fields)


def _conv(family, name, layer, n, channels, size, k, *, small, d=1, p=None, g=1, **fields) -> Case:
    padding = d * (k - 1) // 2 if p is None else p
    sizes = {"n": n, "ci": channels, "co": channels, "h": size, "w": size}
    params = {**sizes, "k": k, "s": 1, "p": padding, "d": d, "g": g}
    return Case(name, family, "conv2d", layer, params, small, **fields)


def _separable(name, layer, c, size, *, small, headline=False) -> Case:
    params = {"n": 8, "ci": c, "co": c, "h": size, "w": size, "k": 3, "s": 1, "p": 1, "d": 1}
    family = op = "separable_conv2d"
    return Case(name, family, op, layer, params, small, epilogue=_BN_RELU, headline=headline)


def _aspp(name, layer, n, size, rates, *, small) -> Case:
    params = {"n": n, "ci": 2048, "co": 256, "h": size, "w": size, "rates": rates}
    return Case(name, "dilated_conv2d", "aspp", layer, params, small, epilogue=_BN_RELU)


def _crf(name, layer, h, w, alpha, beta, weight) -> Case:
    params = {"n": 1, "labels": 21, "h": h, "w": w, "iterations": 10, "alpha": alpha, "beta": beta}
    params |= {"bilateral_weight": weight, "gamma": 3, "gaussian_weight": 3}
    small = {"h": 24, "w": 32, "iterations": 3}
    return Case(name, "dense_crf", "dense_crf", layer, params, small, dtype="float32")


def _model(name, layer, model, size, gflop, *, small) -> Case:
    params = {"n": 8, "model": model, "h": size, "w": size, "full_h": size, "full_w": size, "gflop": gflop}
    return Case(name, "models", "model", layer, params, {"n": 1, "h": small, "w": small})


_BN_RELU = ("bn", "relu")
_BIAS_RELU = ("bias", "relu")
_DW, _DILATED = "separable_conv2d", "dilated_conv2d"

# kernels.md section 6, in its order. `_small(ci, co, side)` is the CPU's size.
OPERATORS = [
    _up("unet_up1", "U-Net up 1", 16, 1024, 512, 28, 2, 2, small=_small(512, 256)),
    _up("unet_up2", "U-Net up 2", 16, 512, 256, 52, 2, 2, small=_small(256, 128)),
    _up("unet_up3", "U-Net up 3", 16, 256, 128, 100, 2, 2, small=_small(128, 64)),
    _up("unet_up4", "U-Net up 4", 16, 128, 64, 196, 2, 2, small=_small(64, 32)),
    _up("decoder_up4x4", "4x4 stride 2 decoder", 16, 256, 128, 64, 4, 2, 1, small=_small(128, 64, 32)),
    _up("fcn8s_up8", "FCN-8s, last upsampling", 16, 21, 21, 70, 16, 8, 4,
        small=_small(21, 21, 32), epilogue=()),
    _up("fcn32s_up32", "FCN-32s, upsampling", 16, 21, 21, 16, 64, 32, 16,
        small=_small(21, 21, 8), epilogue=()),
    _aspp("aspp_n1_33", "DeepLabV3 ASPP, 513 pixels, OS16", 1, 33, (6, 12, 18), small=_small(256, 64)),
    _aspp("aspp_n8_33", "DeepLabV3 ASPP, 513 pixels, OS16", 8, 33, (6, 12, 18), small=_small(128, 32)),
    _aspp("aspp_n8_65", "DeepLabV3 ASPP, 513 pixels, OS8", 8, 65, (12, 24, 36), small=_small(64, 32)),
    _conv(_DILATED, "resnet_layer3_d2", "ResNet OS8 layer3 3x3", 8, 256, 65, 3, d=2,
          small=_small(128, 128, 33), epilogue=_BN_RELU, headline=True),
    _conv(_DILATED, "resnet_layer4_d4", "ResNet OS8 layer4 3x3", 8, 512, 65, 3, d=4,
          small=_small(128, 128, 33), epilogue=_BN_RELU),
    _conv(_DILATED, "unet_down1_conv2", "U-Net level 1, second 3x3", 8, 64, 570, 3, p=0,
          small=_small(32, 32, 190), epilogue=_BIAS_RELU),
    _conv(_DW, "xception_middle_dw", "Xception65 middle flow", 8, 728, 65, 3, g=728,
          small=_small(256, 256, g=256), epilogue=_BN_RELU, headline=True),
    _conv(_DW, "mobilenetv2_dw144", "MobileNetV2 block 3", 8, 144, 129, 3, g=144,
          small=_small(72, 72, g=72), epilogue=("bn", "relu6"), headline=True),
    _conv(_DW, "aspp_dw_d12", "DeepLabV3+ separable ASPP, rate 12", 8, 2048, 65, 3, d=12, g=2048,
          small=_small(256, 256, g=256)),
    _separable("decoder_sep_256", "DeepLabV3+ decoder", 256, 129, small=_small(64, 64), headline=True),
    _separable("entry_sep_128", "Xception65 entry flow", 128, 257, small=_small(32, 32, 129)),
    _separable("middle_sep_728", "Xception65 middle flow", 728, 65, small=_small(182, 182)),
    _conv(_DW, "xception_middle_dw_wgrad", "Xception65 middle flow", 8, 728, 65, 3, g=728,
          small=_small(256, 256, g=256), direction="grad_weight"),
    _conv(_DILATED, "resnet_layer3_d2_wgrad", "ResNet OS8 layer3 3x3", 8, 256, 65, 3, d=2,
          small=_small(128, 128, 33), direction="grad_weight"),
    _crf("crf_512_67_3", "DeepLabV2 CRF", 512, 512, 67, 3, 4),
    _crf("crf_321_160_3", "CRF-RNN", 321, 321, 160, 3, 5),
    _crf("crf_1024x512_80_13", "pydensecrf README, wide image", 512, 1024, 80, 13, 10),
]  # fmt: skip

# What the tables name in their notes: fixed bilinear weights, the concatenation, a 150-class head's loss.
BLOCKS = [
    _bilinear(OPERATORS[5], 16),
    _bilinear(OPERATORS[6], 16),
    _up_concat("unet_up1_concat", "U-Net up 1 and skip", 1024, 512, 28, 64, small=_small(512, 256)),
    _up_concat("unet_up2_concat", "U-Net up 2 and skip", 512, 256, 52, 136, small=_small(256, 128)),
    _up_concat("unet_up3_concat", "U-Net up 3 and skip", 256, 128, 100, 280, small=_small(128, 64)),
    _up_concat("unet_up4_concat", "U-Net up 4 and skip", 128, 64, 196, 568,
               small=_small(64, 32), headline=True),
    Case("ade20k_upsample_loss", "segmentation_head", "upsample_cross_entropy", "ADE20K head, 512 pixels",
         {"n": 16, "classes": 150, "h": 128, "w": 128, "scale": 4}, {"n": 1, "h": 32, "w": 32},
         direction="train"),
]  # fmt: skip

# kernels.md section 7: GFLOP of one image at full size.
MODELS = [
    _model("unet_572", "U-Net, 572 pixels, unpadded", "unet", 572, 301, small=188),
    _model("fcn8s_vgg16_500", "FCN-8s, VGG16, 500 pixels", "fcn8s_vgg16", 500, 363, small=64),
    _model("deeplabv3_r50_513", "DeepLabV3, ResNet-50, OS8", "deeplabv3_resnet50", 513, 337, small=65),
    _model("deeplabv3_r50_769", "DeepLabV3, ResNet-50, OS8", "deeplabv3_resnet50", 769, 751, small=65),
    _model("deeplabv3plus_xception65_513", "DeepLabV3+, Xception65", "deeplabv3plus_xception65", 513, 102,
           small=65),
    _model("deeplabv3plus_mobilenetv2_513", "DeepLabV3+, MobileNetV2", "deeplabv3plus_mobilenetv2", 513, 54,
           small=65),
]  # fmt: skip

CASES = OPERATORS + BLOCKS + MODELS


def headline() -> list[Case]:
    """The twelve rows of the second tier."""
    return [case for case in CASES if case.headline]


def find(name: str) -> Case:
    """The case of that name; KeyError lists the names there are."""
    for case in CASES:
        if case.name == name:
            return case
    raise KeyError(f"no case {name!r}; there are {', '.join(case.name for case in CASES)}")
