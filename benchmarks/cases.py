"""Every measured shape, named after the layer of the model it is from.

One list for the benchmarks and the tests. Sizes are those of the papers' networks at batch 1, 8,
16 or 32, bf16; `case.cpu()` is the same layer small enough for a CPU (batch 1, fp32). Needs torch only.
"""

from collections.abc import Iterator

from benchmarks.case import DIRECTIONS, Case, is_crf, is_depthwise, is_head, output_size
from benchmarks.crf_cases import crf, further
from segfast.ops._case import cases

__all__ = [
    "ALONE", "BLOCKS", "CASES", "CONVOLUTIONS", "CRFS", "DIRECTIONS", "HEADS", "LAYERS", "MODELS",
    "OPERATORS", "Case", "directions", "find", "headline", "is_crf", "is_depthwise", "is_head", "output_size",
]  # fmt: skip


def _small(ci: int, co: int, side: int | None = None, **more: int) -> dict[str, int]:
    return {"n": 1, "ci": ci, "co": co, **({} if side is None else {"h": side, "w": side}), **more}


def _of(*cases) -> list[Case]:
    """Cases of a family as the benchmarks have them."""
    return [
        Case(c.name, c.family, c.op, c.layer, c.params, c.small, epilogue=c.epilogue,
             headline="headline" in c.uses)
        for c in cases
    ]  # fmt: skip


def _conv(family, name, layer, n, channels, size, k, *, small, s=1, d=1, p=None, g=1, co=0, **fields) -> Case:
    padding = d * (k - 1) // 2 if p is None else p
    sizes = {"n": n, "ci": channels, "co": co or channels, "h": size, "w": size}
    params = {**sizes, "k": k, "s": s, "p": padding, "d": d, "g": g}
    return Case(name, family, "conv2d", layer, params, small, **fields)


def _depthwise(name, layer, channels, size, k=3, *, s=1, small: int, side=None, epilogue) -> Case:
    sizes = _small(small, small, side, g=small)
    return _conv(_DW, name, layer, 8, channels, size, k, s=s, g=channels, small=sizes, epilogue=epilogue)


def _separable(name, layer, c, size, *, small, headline=False) -> Case:
    params = {"n": 8, "ci": c, "co": c, "h": size, "w": size, "k": 3, "s": 1, "p": 1, "d": 1}
    family = op = "separable_conv2d"
    return Case(name, family, op, layer, params, small, epilogue=_BN_RELU, headline=headline)


def _projected(depthwise: Case, co: int) -> Case:
    """A depthwise block and MobileNetV2's 1x1 convolution after it, which has no activation of its own."""
    params = {**depthwise.params, "co": co, "linear": 1}
    name, small = f"{depthwise.name}_projected", {**depthwise.small, "co": co}
    return depthwise.replace(name=name, op="separable_conv2d", params=params, small=small)


def _alone(block: Case) -> Case:
    """The layer of `block` without batch norm and activation, which a plain model runs after it."""
    bias = tuple(name for name in block.epilogue if name == "bias")
    return block.replace(name=f"{block.name}_layer", epilogue=bias, headline=False)


def _batches(block: Case, batches=(1, 8, 32)) -> Iterator[Case]:
    """`block` at each batch, and beside it its layer alone; at batch 8 under its own name."""
    for n in batches:
        name = block.name if n == 8 else f"{block.name}_n{n}"
        case = block.replace(name=name, params={**block.params, "n": n}, headline=False)
        if n != 8 or block.name not in _IN_TABLE:
            yield case
        if case.op == "conv2d" and case.epilogue not in ((), ("bias",)):
            yield _alone(case)


def _aspp(name, layer, n, size, rates, *, small) -> Case:
    params = {"n": n, "ci": 2048, "co": 256, "h": size, "w": size, "rates": rates}
    return Case(name, "conv2d", "aspp", layer, params, small, epilogue=_BN_RELU)


def _branches(pyramid: Case) -> Case:
    """The convolutions of an ASPP that read its input, and their concatenation."""
    return pyramid.replace(name=pyramid.name.replace("aspp_", "aspp_branches_"), op="aspp_branches")


def _dense(name, layer, ci, co, size, k=3, *, s=1, d=1, p=None, epilogue=("bn", "relu")) -> Iterator[Case]:
    """A convolution at batch 8 and 1; on a CPU with a quarter of the channels, up to 64, and 33 pixels."""
    few = [c if c < 16 else min(64, c // 4) for c in (ci, co)]
    geometry = {"k": k, "s": s, "d": d, "p": p, "co": co, "epilogue": epilogue}
    small = _small(*few, min(size, 33))
    for n in (8, 1):
        ending = "" if n == 8 else f"_n{n}"
        yield _conv(_DILATED, f"{name}{ending}", layer, n, ci, size, small=small, **geometry)


def _head(name, layer, n, classes, height, width, scale, *, small) -> Iterator[Case]:
    """The loss forward and in training, the dice loss in training, and the labels."""
    params = {"n": n, "classes": classes, "h": height, "w": width, "scale": scale}
    small = {"n": 1, **dict(zip(("h", "w"), small, strict=True))}
    for op, direction, ending in (
        ("upsample_cross_entropy", "train", "loss"),
        ("upsample_cross_entropy", "forward", "loss_forward"),
        ("upsample_dice", "train", "dice"),
        ("upsample_argmax", "forward", "argmax"),
    ):
        yield Case(f"{name}_{ending}", "segmentation_head", op, layer, params, small, direction=direction)


def _model(name, layer, model, size, gflop, *, small, n=8) -> Case:
    params = {"n": n, "model": model, "h": size, "w": size, "full_h": size, "full_w": size, "gflop": gflop}
    return Case(name, "models", "model", layer, params, {"n": 1, "h": small, "w": small})


def _at_batch_1(block: Case) -> Case:
    return block.replace(name=f"{block.name}_n1", params={**block.params, "n": 1}, headline=False)


_BN_RELU = ("bn", "relu")
_BIAS_RELU = ("bias", "relu")
_BN_ADD_RELU = ("bn", "add", "relu")
_DW, _DILATED = "separable_conv2d", "conv2d"

_UPS = _of(*cases("conv_transpose2d", "benchmark"))

# kernels.md section 6, in its order. `_small(ci, co, side)` is the CPU's size.
OPERATORS = [
    *_UPS[:7],
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
    crf("crf_512_67_3", "DeepLabV2 CRF", "512", (67, 3, 4)),
    crf("crf_321_160_3", "CRF-RNN", "321", (160, 3, 5)),
    crf("crf_1024x512_80_13", "pydensecrf README, wide image", "1024x512", (80, 13, 10)),
]  # fmt: skip

# What the tables name in their notes: fixed bilinear weights, the concatenation, a 150-class head's loss.
BLOCKS = [
    *_UPS[7:],
    next(_head("ade20k_upsample", "ADE20K head, 512 pixels", 16, 150, 128, 128, 4, small=(32, 32))),
]  # fmt: skip

# More losses and labels of upsampled logits.
HEADS = [
    *list(_head("ade20k_upsample", "ADE20K head, 512 pixels", 16, 150, 128, 128, 4, small=(32, 32)))[1:],
    *_head("ade20k_upsample_os32", "ADE20K head, 512 pixels, OS32", 4, 150, 16, 16, 32, small=(3, 3)),
    *_head("cityscapes_upsample_n1", "Cityscapes head, 1024x2048, OS8", 1, 19, 128, 256, 8, small=(16, 32)),
    *_head("cityscapes_upsample_n8", "Cityscapes head, 1024x2048, OS8", 8, 19, 128, 256, 8, small=(8, 16)),
    *_head("voc_upsample_n1", "PASCAL VOC head, 512 pixels, OS8", 1, 21, 64, 64, 8, small=(16, 16)),
    *_head("voc_upsample_n8", "PASCAL VOC head, 512 pixels, OS8", 8, 21, 64, 64, 8, small=(12, 12)),
]

_IN_TABLE = {case.name: case for case in OPERATORS}

# Depthwise layers and blocks: the table's rows and those of four families of networks, at 512 or 513 pixels.
# The rate-12 row has no batch norm in the table: its block is the one with.
LAYERS = [
    *_batches(_IN_TABLE["xception_middle_dw"]),
    *_batches(_IN_TABLE["mobilenetv2_dw144"]),
    _IN_TABLE["aspp_dw_d12"].replace(name="aspp_dw_d12_block", epilogue=_BN_RELU),
    *_batches(_depthwise("mobilenetv2_dw96_s2", "MobileNetV2 block 2", 96, 257, s=2,
                         small=48, epilogue=("bn", "relu6"))),
    *_batches(_depthwise("efficientnet_dw144_k5_s2", "EfficientNet-B0 stage 3, first block", 144, 128, 5, s=2,
                         small=72, epilogue=("bn", "silu"))),
    *_batches(_depthwise("efficientnet_dw672_k5", "EfficientNet-B0 stage 5", 672, 32, 5,
                         small=168, epilogue=("bn", "silu"))),
    *_batches(_depthwise("convnext_dw96_k7", "ConvNeXt-T stage 1", 96, 128, 7,
                         small=48, side=64, epilogue=("bias",))),
    *_batches(_depthwise("segformer_dw256", "SegFormer-B2 stage 1, Mix-FFN", 256, 128,
                         small=64, side=64, epilogue=("bias", "gelu"))),
    *_batches(_IN_TABLE["decoder_sep_256"]),
    *_batches(_IN_TABLE["middle_sep_728"]),
    *_batches(_projected(_IN_TABLE["mobilenetv2_dw144"], 24)),
]  # fmt: skip

# ASPPs and convolutions of ResNet-50 at output stride 8, U-Net at 572 pixels and VGG16 in FCN-8s at 500,
# inference's at batch 8 and 1, and alone what the table has with an epilogue.
_PYRAMIDS = [*(case for case in OPERATORS if case.op == "aspp")]
_PYRAMIDS.append(
    _aspp("aspp_n1_65", "DeepLabV3 ASPP, 513 pixels, OS8", 1, 65, (12, 24, 36), small=_small(64, 32))
)
_TABLED = [_IN_TABLE[name] for name in ("resnet_layer3_d2", "resnet_layer4_d4", "unet_down1_conv2")]
CONVOLUTIONS = [
    _PYRAMIDS[-1],
    *map(_branches, _PYRAMIDS),
    *map(_at_batch_1, _TABLED),
    *map(_alone, _TABLED),
    *_dense("resnet_layer1_3x3", "ResNet layer1 3x3", 64, 64, 129),
    *_dense("resnet_layer1_expand", "ResNet layer1 1x1", 64, 256, 129, 1, epilogue=_BN_ADD_RELU),
    *_dense("resnet_layer2_3x3", "ResNet OS8 layer2 3x3", 128, 128, 65),
    *_dense("resnet_layer3_reduce", "ResNet OS8 layer3 1x1", 1024, 256, 65, 1),
    *_dense("resnet_layer3_expand", "ResNet OS8 layer3 1x1", 256, 1024, 65, 1, epilogue=_BN_ADD_RELU),
    *_dense("resnet_layer4_expand", "ResNet OS8 layer4 1x1", 512, 2048, 65, 1, epilogue=_BN_ADD_RELU),
    *_dense("resnet_stem", "ResNet stem", 3, 64, 513, 7, s=2),
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
]  # fmt: skip

# Dense CRFs at more sizes, with more and fewer labels, and a part of one.
CRFS = further(frozenset(_IN_TABLE))

# kernels.md section 7: GFLOP of one image at full size.
_AT_BATCH_8 = [
    _model("unet_572", "U-Net, 572 pixels, unpadded", "unet", 572, 301, small=188),
    _model("fcn8s_vgg16_500", "FCN-8s, VGG16, 500 pixels", "fcn8s_vgg16", 500, 363, small=64),
    _model("deeplabv3_r50_513", "DeepLabV3, ResNet-50, OS8", "deeplabv3_resnet50", 513, 337, small=65),
    _model("deeplabv3_r50_769", "DeepLabV3, ResNet-50, OS8", "deeplabv3_resnet50", 769, 751, small=65),
    _model("deeplabv3plus_xception65_513", "DeepLabV3+, Xception65", "deeplabv3plus_xception65", 513, 108,
           small=65),
    _model("deeplabv3plus_mobilenetv2_513", "DeepLabV3+, MobileNetV2, dense decoder",
           "deeplabv3plus_mobilenetv2", 513, 54, small=65),
    _model("fcn_r50_513", "FCN, ResNet-50, OS8", "fcn_resnet50", 513, 285, small=65),
]  # fmt: skip
MODELS = [*_AT_BATCH_8, *map(_at_batch_1, _AT_BATCH_8)]

CASES = OPERATORS + BLOCKS + HEADS + LAYERS + CONVOLUTIONS + CRFS + MODELS


# Depthwise blocks with batch norm and activation, and the row of the layer alone.
ALONE = {case.name.removesuffix("_layer"): case.name for case in LAYERS if case.name.endswith("_layer")}
ALONE["aspp_dw_d12_block"] = "aspp_dw_d12"


def directions(case: Case) -> tuple[str, ...]:
    """The gradients that are measured besides the forward of `case`."""
    if case.op == "model" or is_crf(case) or is_head(case) or case.direction != "forward":
        return ()
    if case.family == _DILATED and case.op == "conv2d" and case.epilogue in ((), ("bias",)):
        return ("grad_input", "grad_weight", "train")
    if case.family != _DW:
        return ("backward", "train") if case.family != _DILATED or case.name in _IN_TABLE else ("train",)
    if case.name in _IN_TABLE or case.name.removesuffix("_layer") in _IN_TABLE:
        bare = case.op == "conv2d" and not case.epilogue
        return ("grad_input", "grad_weight", "train") if bare else ("backward", "train")
    return ("train",)


def headline() -> list[Case]:
    """The twelve rows that a GPU run measures first."""
    return [case for case in CASES if case.headline]


def find(name: str) -> Case:
    """The case of that name; KeyError lists the names there are."""
    for case in CASES:
        if case.name == name:
            return case
    raise KeyError(f"no case {name!r}; there are {', '.join(case.name for case in CASES)}")
