"""The colors of the kinds of rows, the same in the page and in the figure."""

from collections.abc import Sequence

from .facts import BETWEEN, CAST, LAYOUT_COPY
from .quantities import kind_of, label, sums
from .rows import Row

# On a light and on a dark ground. Work has hues of its own, what a user can avoid is red, the rest gray.
COLORS = {
    "conv2d": ("#2a78d6", "#3987e5"),
    "conv_transpose2d": ("#1baf7a", "#199e70"),
    "batch_norm": ("#eda100", "#c98500"),
    "activation": ("#7a5fd0", "#9085e9"),
    "pool": ("#d55181", "#e87ba4"),
    "resize": ("#008300", "#37a037"),
    "cat": ("#eb6834", "#d95926"),
    "add": ("#a0622d", "#b98050"),
    LAYOUT_COPY: ("#c3202f", "#f06a6a"),
    CAST: ("#8c1d5b", "#c9689c"),
    BETWEEN: ("#b5b4ad", "#6f6e69"),
    "other": ("#85847e", "#8f8e88"),
}
# Of other kinds (fused layers), in the order of their time; what comes after these is "other".
_FUSED = (
    ("#12406f", "#86b6ef"),
    ("#17a2b8", "#3bb3c6"),
    ("#7a5900", "#e0b84d"),
    ("#4a3aa7", "#b3abf2"),
    ("#0f5c3f", "#6ccfa4"),
)


def colors(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """A light and a dark ground's color of each kind there is, the kinds that take the longest first."""
    kinds = [kind for kind, _ in sums(rows, kind_of)]
    fused = dict(zip([kind for kind in kinds if kind not in COLORS], _FUSED, strict=False))
    return {kind: COLORS.get(kind) or fused.get(kind, COLORS["other"]) for kind in kinds}


def layers(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each layer, forward and backward together, those that take the longest first.

    Rows that are no layer's (copies, casts, the rest between the layers) are put together by their kind.
    """
    return sums(rows, label)
