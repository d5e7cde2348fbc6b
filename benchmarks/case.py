"""A measured case: sizes, dtype, direction, epilogue; its FLOPs and the bytes it has to move."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

DIRECTIONS = ("forward", "grad_input", "grad_weight", "backward", "train")
PYRAMIDS = ("aspp", "aspp_branches")
TILE_M, TILE_N = 128, 256  # the largest tile an implicit GEMM is expected to run with


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator call, or one whole model.

    `op` names the formula in problems.py, `family` the operator family that serves it, `epilogue` what
    follows the product (`bias`, `bn` in eval mode, `add` of a residual, an activation). `small` replaces
    entries of `params` on a CPU.
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
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def activation(self) -> str | None:
        return next((name for name in self.epilogue if name not in ("bias", "bn", "add")), None)

    @property
    def key(self) -> str:
        return f"{self.name}/{self.dtype}/{self.direction}/{self.size}"

    @property
    def work(self) -> tuple:
        """All that tells what is computed: the name and the layer's words aside."""
        return self.op, frozenset(self.params.items()), self.dtype, self.direction, self.epilogue

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
        """exp2 evaluations: an exact dense CRF's for each pair of pixels, a softmax's for each logit."""
        if is_crf(self):
            return self["n"] * (self["h"] * self["w"]) ** 2 * self["iterations"]
        if not is_head(self) or self.op == "upsample_argmax":
            return 0.0
        passes = {"train": 2, "backward": 1}.get(self.direction, 1)
        return passes * self["n"] * self["classes"] * self["h"] * self["w"] * self["scale"] ** 2

    @property
    def l2_bytes(self) -> float:
        """Bytes an implicit GEMM with 128 x 256 tiles reads from L2: each input tile again for every tap."""
        width = _gemm_width(self)
        if width == 0:
            return 0.0
        n = min(TILE_N, 2 ** math.ceil(math.log2(width)))
        return self.useful_flops * _itemsize(self) / 2 * (TILE_M + n) / (TILE_M * n)


def is_depthwise(case: Case) -> bool:
    """True if it is a convolution with a filter a channel."""
    return case.op == "conv2d" and case["g"] == case["ci"] > 1


def is_head(case: Case) -> bool:
    """True if it upsamples logits on the way to a loss or to labels."""
    return case.op.startswith("upsample_")


def is_crf(case: Case) -> bool:
    """True if it filters pixels by their places and colours."""
    return case.op in ("dense_crf", "gaussian_filter")


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
    if case.op == "networks":
        return math.nan  # not counted
    if case.op == "model":
        times = 3 if case.direction == "train" else 1
        scale = (case["h"] * case["w"]) / (case["full_h"] * case["full_w"])
        return case["gflop"] * 1e9 * case["n"] * times * scale
    if is_crf(case):
        # Exponent and filter, each a dot over 32 columns.
        return 128.0 * case.exponentials
    if is_head(case):
        return 0.0
    n, ci, co = case["n"], case["ci"], case["co"]
    if case.op == "separable_conv2d":
        pixels = math.prod(output_size(case))
        work = 2.0 * n * pixels * ci * co
    elif case.op in PYRAMIDS:
        products = sum(_products(case, useful, 3, rate, rate) for rate in case["rates"])
        pixels = case["h"] * case["w"]
        projected = (len(case["rates"]) + 2) * co if case.op == "aspp" else 0
        work = 2.0 * n * co * (ci * (products + pixels) + pixels * projected)
    else:
        d, p = case.params.get("d", 1), case.params.get("p", 0)
        work = 2.0 * n * ci * co / case.params.get("g", 1) * _products(case, useful, case["k"], d, p)
    return work * {"backward": 2, "train": 3}.get(case.direction, 1)


def _bytes(case: Case) -> float:
    if case.op in ("model", "networks") or is_crf(case):
        return 0.0
    n, item = case["n"], _itemsize(case)
    if is_head(case):
        # Logits and labels, which an argmax writes; a gradient reads both again and writes the logits' size.
        pixels = case["h"] * case["w"]
        logits, labels = case["classes"] * pixels * item, pixels * case["scale"] ** 2 * 8.0
        passes = {"backward": 2 * logits + labels, "train": 3 * logits + 2 * labels}
        return n * passes.get(case.direction, logits + labels)
    ci, co, pixels = case["ci"], case["co"], case["h"] * case["w"]
    out = math.prod(output_size(case)) if case.op not in PYRAMIDS else pixels
    weight = ci * co * case.params.get("k", 1) ** 2 / case.params.get("g", 1)
    if case.op == "separable_conv2d":
        weight = ci * case["k"] ** 2 + ci * co
    if case.op == "aspp":
        branches = len(case["rates"]) + 2
        weight = co * (ci * (9 * len(case["rates"]) + 2) + branches * co)
    x, y = n * pixels * ci, n * out * co
    if case.op == "aspp_branches":
        weight = co * ci * (9 * len(case["rates"]) + 1)
        y *= len(case["rates"]) + 1
    if "add" in case.epilogue:
        x += n * out * co
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
    if case.op in ("conv2d", *PYRAMIDS, "separable_conv2d"):
        return case["co"] if case.params.get("g", 1) == 1 or case.op == "separable_conv2d" else 0
    return 0
