"""A report of what `segfast.optimize` did to a model, or would do."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .._table import format_table
from ..nn._fused.layers import is_depthwise
from ..nn._fused.residual_block import contents, is_block
from ..nn._fused.sequence import sequence_of
from .eligible import RECORD, check_model, qualified, rule_for, type_name
from .fuse import OTHER_LAYERS, has_its_layers, has_known_forward, is_fused_whole, is_whole
from .gain import Gain


@dataclass(frozen=True)
class Row:
    """One layer that `optimize` considered.

    `name` is its path in the model ("" for the model itself), `shared` its other paths if it has any,
    `fused` whether it computes layers that follow it or are in it as well.
    """

    name: str
    type: str
    replaced: bool
    reason: str
    shared: tuple[str, ...] = ()
    fused: bool = False


@dataclass(frozen=True)
class Report:
    """The layers `optimize` considered. Iterates over its rows; `str()` is a table.

    `remarks` says why a fusion that the model as a whole stood against was not made. `gain` is how long the
    model took before and after, where that was measured.
    """

    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    gain: Gain | None = None

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def replaced(self) -> list[str]:
        """The names of the layers replaced."""
        return [row.name for row in self.rows if row.replaced]

    @property
    def fused(self) -> list[str]:
        """The names of the layers that compute others as well."""
        return [row.name for row in self.rows if row.fused]

    def __str__(self) -> str:
        note = "A functional call in a forward method is not replaced, and seen only where it is named there."
        note = "\n".join([note, *self.remarks])
        if not self.rows:
            return f"No layer of a kind that segfast serves.\n{note}"
        cells = [
            (" = ".join(name or "(the model)" for name in (row.name, *row.shared)), row.type, row.reason)
            for row in self.rows
        ]
        count = f"{len(self.replaced)} of {len(self.rows)} layers replaced."
        if self.fused:
            count += f" {len(self.fused)} fused with others."
        if self.gain is not None:
            note += f"\n{self.gain}"
        return f"{format_table(['layer', 'type', 'replaced, or why not'], cells)}\n{count} {note}"


def report(model: nn.Module) -> Report:
    """List each layer that `optimize` considers, whether it is replaced, and if not, why.

    Works before `optimize` too, and then says what it would do.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> import torch, segfast
        >>> for row in segfast.report(torch.nn.Sequential(torch.nn.ConvTranspose3d(8, 4, 2))):
        ...     print(row.name, row.type, row.replaced)
        0 ConvTranspose3d False
    """
    check_model(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    rows = []
    remarks: dict[str, None] = {}
    for module, (name, *shared) in names.items():
        rule, reason = rule_for(module)
        record = vars(module).get(RECORD, {})
        why_not = record.get("not_fused", "")
        if why_not.startswith(("undone: ", "its forward cannot be listed")):
            remarks[f"Not fused: {why_not}"] = None
        fused, fusion = _fusion(name, module)
        if record.get("left_out"):
            reason = "left out by filter_fn"
        elif rule is not None:
            reason = f"not yet: optimize would make it {qualified(rule.target)}"
        if reason is not None or fused or is_whole(module):
            parts = (reason, fusion, *record.get("choices", ()))
            why = "; ".join(part for part in parts if part is not None)
            row = Row(name, type_name(module), "rule" in record, why, tuple(shared), fused)
            rows.append(row)
    own = vars(model).get(RECORD, {})
    if "slower" in own:
        remarks[_computed_as_given(own["slower"])] = None
    return Report(tuple(rows), tuple(remarks), own.get("gain"))


def _computed_as_given(slower: Gain) -> str:
    """The remark on a model that was asked to compute in another dtype and was slower in it."""
    times = f"{slower.before_ms:.1f} ms before, {slower.layout}, {slower.after_ms:.1f} ms in {slower.dtype}"
    error = "" if slower.error is None else f", outputs changed by {slower.error:.2g} of the largest value"
    return f"Not faster in {slower.dtype}, so not computed in it: {times}{error}."


def _fusion(name: str, module: nn.Module) -> tuple[bool, str | None]:
    """The layers fused with this one, or why there are none."""
    sequence = sequence_of(module)
    if sequence is not None and sequence.layers[0] is module:
        parent = name.rpartition(".")[0]
        return True, f"fused with {', '.join([n.removeprefix(f'{parent}.') for n in sequence.names[1:]])}"
    if is_fused_whole(module):
        return True, f"its layers fused{f': {contents(module)}' if is_block(module) else ''}"
    why = vars(module).get(RECORD, {}).get("not_fused")
    whole = is_whole(module)
    if why is None and whole:
        return False, _unfused_whole(module)
    # A dense convolution is not expected to be fused with anything.
    tells = why is not None and (whole or is_depthwise(module))
    return False, f"not fused: {why}" if tells else None


def _unfused_whole(module: nn.Module) -> str:
    if type(module).__module__.startswith("segfast."):
        return "segfast's own already"
    if not has_its_layers(module):
        return f"not fused: {OTHER_LAYERS}"
    if not has_known_forward(module):
        return "not yet: give example_inputs"
    return "not yet: optimize would fuse its layers"
