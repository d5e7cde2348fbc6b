"""Every measured case: the families' own, the dense CRF's, and whole models.

One list for the benchmarks and the tests. Sizes are those of the papers' networks at batch 1, 8, 16 or 32,
bf16; `case.cpu()` is the same layer small enough for a CPU (batch 1, fp32). Needs torch only.
"""

from benchmarks.crf_cases import CASES as CRFS
from benchmarks.crf_cases import DenseCrf
from segfast.ops import FAMILIES
from segfast.ops._case import DIRECTIONS, Case, cases

__all__ = ["CASES", "CRFS", "DIRECTIONS", "MODELS", "Case", "directions", "find", "headline", "is_crf"]


class Model(Case):
    """A whole network, `gflop` of an image at full size."""

    family, op = "models", "model"
    most = {"h": 188, "w": 188}  # noqa: RUF012

    def count_flops(self, useful: bool) -> float:
        times = 3 if self.direction == "train" else 1
        scale = (self["h"] * self["w"]) / (self["full_h"] * self["full_w"])
        return self["gflop"] * 1e9 * self["n"] * times * scale


def _model(name, layer, model, size, gflop, *, small) -> list[Model]:
    """A model's cases: at batch 8 and at batch 1."""
    params = {"model": model, "h": size, "w": size, "full_h": size, "full_w": size, "gflop": gflop}
    small = {"n": 1, "h": small, "w": small}
    return [Model(name + end, layer, {"n": n, **params}, small) for n, end in ((8, ""), (1, "_n1"))]


_MODELS = [
    _model("unet_572", "U-Net, 572 pixels, unpadded", "unet", 572, 301, small=188),
    _model("fcn8s_vgg16_500", "FCN-8s, VGG16, 500 pixels", "fcn8s_vgg16", 500, 363, small=64),
    _model("deeplabv3_r50_513", "DeepLabV3, ResNet-50, OS8", "deeplabv3_resnet50", 513, 337, small=65),
    _model("deeplabv3_r50_769", "DeepLabV3, ResNet-50, OS8", "deeplabv3_resnet50", 769, 751, small=65),
    _model("deeplabv3plus_xception65_513", "DeepLabV3+, Xception65", "deeplabv3plus_xception65", 513, 108,
           small=65),
    _model("deeplabv3plus_mobilenetv2_513", "DeepLabV3+, MobileNetV2, dense decoder",
           "deeplabv3plus_mobilenetv2", 513, 54, small=65),
    _model("fcn_r50_513", "FCN, ResNet-50, OS8", "fcn_resnet50", 513, 285, small=65),
    _model("segnet_vgg16_360", "SegNet, VGG16, 360 pixels", "segnet_vgg16", 360, 162, small=64),
]  # fmt: skip
MODELS = [case for both in zip(*_MODELS, strict=True) for case in both]

CASES: list[Case] = [case for family in FAMILIES for case in cases(family, "benchmark")] + CRFS + MODELS
_TABLED = {case.name for case in CASES if "quick" in case.uses}

# Depthwise blocks with batch norm and activation, and the row of the layer alone.
ALONE = {
    case.name.removesuffix("_layer"): case.name
    for case in cases("separable_conv2d", "benchmark")
    if case.name.endswith("_layer")
}
ALONE["aspp_dw_d12_block"] = "aspp_dw_d12"


def is_crf(case: Case) -> bool:
    """True if it filters pixels by their places and colors."""
    return isinstance(case, DenseCrf)


_CONVOLUTIONS = ("conv_transpose2d", "conv2d", "separable_conv2d")


def directions(case: Case) -> tuple[str, ...]:
    """The gradients that are measured besides the forward of `case`."""
    if case.family == "packed_pool2d":
        return ("train",)
    if case.family not in _CONVOLUTIONS or case.direction != "forward":
        return ()
    if case.family == "conv2d" and case.op == "conv2d" and case.epilogue in ((), ("bias",)):
        return ("grad_input", "grad_weight", "train")
    if case.family != "separable_conv2d":
        both = case.family == "conv_transpose2d" or case.name in _TABLED
        return ("backward", "train") if both else ("train",)
    if case.name in _TABLED or case.name.removesuffix("_layer") in _TABLED:
        bare = case.op == "conv2d" and not case.epilogue
        return ("grad_input", "grad_weight", "train") if bare else ("backward", "train")
    return ("train",)


def headline() -> list[Case]:
    """The twelve rows that a GPU run measures first."""
    return [case for case in CASES if "headline" in case.uses]


def find(name: str) -> Case:
    """The case of that name; KeyError lists the names there are."""
    for case in CASES:
        if case.name == name:
            return case
    raise KeyError(f"no case {name!r}; there are {', '.join(case.name for case in CASES)}")
