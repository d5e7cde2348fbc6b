"""Which operations the cases need tiles for, and the row each of them is filed as."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.cases import DIRECTIONS, Case, is_crf, is_depthwise, is_head, output_size
from benchmarks.timing import Measurement
from segfast._timing import Timing
from segfast._tune import Tuned
from segfast._tune_calls import FAMILIES, Family, is_gradient
from segfast._tune_layers import AnyLayer, Head, Image, Layer, Pyramid

# A head's case and direction that are, or are most of, what an operation of its family does.
_OF_A_HEAD = {
    "upsample_softmax_forward": ("upsample_cross_entropy", "forward"),
    "upsample_grad_logits": ("upsample_cross_entropy", "backward"),
    "upsample_argmax": ("upsample_argmax", "forward"),
    "upsample_dice_sums": ("upsample_dice", "forward"),
    "softmax_expectation": ("upsample_dice", "backward"),
}
_MOST_PAIRS = 1e11  # of an exact filter that ATen is timed at


class Item(NamedTuple):
    """One operation on one layer; `case` is that operation by itself."""

    family: Family
    operation: str
    layer: AnyLayer
    case: Case

    @property
    def dtype(self) -> torch.dtype:
        return self.case.torch_dtype


def work(cases: Sequence[Case], tiny: bool = False) -> list[Item]:
    """What to tune for `cases`, each operation of each layer once: what only training runs comes last.

    `tiny`: the first case of each kind only, small enough for Triton's interpreter.
    """
    if tiny:
        first = {(case.op, is_depthwise(case)): _tiny(case) for case in reversed(cases) if _tuned(case)}
        cases = [*first.values()][::-1]
    found: dict[tuple, Item] = {}
    for case in cases:
        for item in _items(case):
            key = (item.operation, item.family.layer_of(item.operation, item.layer), item.dtype)
            found.setdefault(key, item)
    return sorted(found.values(), key=lambda item: is_gradient(item.operation))


def _tuned(case: Case) -> bool:
    # A table holds for up to four times the pixels: batch 8 stands for 32.
    if case.params.get("n") == 32:
        return False
    convolutions = ("conv_transpose2d", "separable_conv2d", "conv2d", "aspp_branches")
    return case.op in convolutions or is_head(case) or is_crf(case)


def _items(case: Case) -> Iterator[Item]:
    if not _tuned(case):
        return
    family = FAMILIES[case.family]
    if is_head(case):
        head = Head(*(case[name] for name in ("n", "classes", "h", "w", "scale")))
        for operation, (op, direction) in _OF_A_HEAD.items():
            if case.op == op:
                alone = case.replace(name=f"{case.name}_bare", direction=direction, headline=False)
                yield Item(family, operation, head, alone)
        return
    if is_crf(case):
        image = Image(*(case[name] for name in ("n", "labels", "h", "w")))
        for operation in family.operations:
            # ATen computes every pair.
            if (
                operation != "gaussian_filter"
                or image.batch * (image.height * image.width) ** 2 <= _MOST_PAIRS
            ):
                yield Item(family, operation, image, case.replace(name=f"{case.name}_{operation}"))
        return
    if case.op == "aspp_branches":
        pyramid = Pyramid(*(case[name] for name in ("n", "ci", "co", "h", "w")), case["rates"][0])
        yield Item(family, "parallel_conv2d_forward", pyramid, case.replace(headline=False))
        return
    layer = Layer(
        *(case[name] for name in ("n", "ci", "co", "h", "w", "k", "s", "p")), case.params.get("d", 1)
    )
    for operation in family.operations:
        per_channel = operation in family.per_channel
        if not family.concerns(operation, layer) or (is_depthwise(case) and not per_channel):
            continue
        if operation in family.fused and case.activation is not None:
            # As the tuner has every epilogue, whatever the case's own.
            fused = case.replace(name=f"{case.name}_fused", epilogue=("bn", "relu"), headline=False)
            yield Item(family, operation, layer._replace(fused=1), fused)
        yield Item(family, operation, layer, _alone(case, operation))


def _alone(case: Case, operation: str) -> Case:
    """`operation` of `case` as a case."""
    direction = next(d for d in DIRECTIONS if operation.endswith(d))
    alone = case.replace(name=f"{case.name}_bare", epilogue=(), direction=direction, headline=False)
    kind = operation.partition("_")[0]
    if case.op != "separable_conv2d" or kind == "separable":
        return alone
    alone = alone.replace(op="conv2d", name=f"{case.name}_{kind}")
    if kind == "depthwise":
        return alone.replace(params={**case.params, "co": case["ci"], "g": case["ci"]})
    size = dict(zip(("h", "w"), output_size(case), strict=True))
    return alone.replace(params={**case.params, **size, "k": 1, "s": 1, "p": 0, "d": 1, "g": 1})


def _tiny(case: Case) -> Case:
    small = {"n": 1, "ci": 8, "co": 8, "classes": 5, "labels": 5, "h": 3, "w": 3, "scale": 2}
    small["g"] = 8 if is_depthwise(case) else 1
    params = {name: small.get(name, value) for name, value in case.params.items()}
    return case.replace(params=params, size="tiny", dtype="float32")


def tuning_tasks(items: Sequence[Item]) -> list[tuple]:
    """The work of `benchmarks.precompile` for them."""
    return [("tune", item.case.family, item.operation, item.layer, item.case.dtype) for item in items]


def tuned_rows(tuned: Tuned | None, dry: bool, log: Callable[[str], None]) -> list[Measurement]:
    """Rows of ATen and of the best configuration of one call."""
    if tuned is None:
        return [Measurement("segfast", True, "failed", "no configuration works")]
    for name, us in tuned.rows:
        log(f"  {tuned.kernel} {tuned.bucket} {name} {us:.1f} us")
    nan = float("nan")

    def row(name: str, ours_too: bool, us: float, note: str) -> Measurement:
        measured = (nan,) * 3 if dry else (us, nan, nan)
        wall = (us, nan, nan) if dry else (nan,) * 3
        return Measurement(name, ours_too, "ok", note, timing=Timing(*measured, *wall, 0))

    return [
        row("aten_nhwc", False, tuned.aten_us, ""),
        row("segfast_tuned", True, tuned.us, str(tuned.config)),
    ]
