"""The results of `optimize` for models on this CPU, kept in the user's cache for other processes.

It holds for the same operations on the same weights, which a listing of the model's forward and a digest of
its weights tell, with the same layers fused and the same implementations chosen for its calls.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._files import temporary_beside
from ..nn._fused.sequence import sequence_of, unfuse_some
from ..nn._fused.whole_model import keep_contiguous
from ..ops._backend import get_backend
from ..ops._call import AnyCall
from ..ops._choice import choices
from ..ops._choice_files import cache_folder, call_row, choice_row, machine, parsed, warn_unwritable
from .eligible import RECORD, qualified, record_of
from .fuse import Fusions
from .gain import Gain
from .graph import digest_of_values
from .measure import measures_anew

# Files in the cache, a few tens of kilobytes each. Those written the longest ago go first.
_MOST = 256


class Outcome:
    """Where what was found for a model is looked up and kept; `key` is all that it depends on but weights."""

    def __init__(self, key: dict[str, Any]) -> None:
        self._key = json.loads(json.dumps(key))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self._file = cache_folder() / "models" / f"{digest}.json"
        self._layers: dict[nn.Module, tuple[str, ...]] = {}
        self._last: list[str] | None = None
        self._disturbed: Gain | None = None  # what was measured while the machine was busy
        self._apart: list[nn.Module] = []

    def recall(self, model: nn.Module) -> Gain | None:
        """The gain, or None if that is not known; `note` says the rest."""
        try:
            found = json.loads(self._file.read_text())
            if found["key"] != self._key or not all(map(_still_chosen, found["calls"])):
                return None
            if found["weights"] != _digest_of_weights(model):
                return None
            gain = Gain(**{**found["gain"], "measured_on": str(found["date"])})
            if found["disturbed"]:
                self._disturbed = gain
                return None
            self._layers = {
                model.get_submodule(name): tuple(map(str, chosen)) for name, chosen in found["layers"].items()
            }
            self._last, self._apart = found["last"], [model.get_submodule(name) for name in found["apart"]]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"segfast: {self._file} cannot be read ({error}); it is ignored", stacklevel=2)
            return None
        return gain

    def note(self, model: nn.Module) -> None:
        """Note what runs each layer of the model that was recalled, and unfuse what was unfused."""
        for layer, chosen in self._layers.items():
            record_of(layer)["choices"] = chosen
        found = [sequence_of(layer) for layer in self._apart]
        unfuse_some(model, [sequence for sequence in found if sequence is not None])

    def lay_out(self, model: nn.Module) -> None:
        """Lay out the outputs of the model that was recalled as they were."""
        if self._last is not None:
            record_of(model)["last"] = self._last
            keep_contiguous(model, *map(model.get_submodule, self._last))

    def keep(self, model: nn.Module, gain: Gain, calls: Sequence[AnyCall], quiet: bool) -> None:
        """Remember what was gained by the choices of `calls`.

        Measured while the machine was not `quiet`, it holds once it was found twice. A cache that cannot be
        written is a warning, once.
        """
        measured = choices().measured
        if gain.unmeasured or gain.error > gain.allowed or not all(call in measured for call in calls):
            return
        records = {name: vars(module).get(RECORD, {}) for name, module in model.named_modules()}
        found = {
            "key": self._key,
            "date": datetime.date.today().isoformat(),
            "weights": _digest_of_weights(model),
            "disturbed": not quiet and not self._is_found_again(gain),
            "gain": dataclasses.asdict(gain),
            "calls": [{**call_row(call), **choice_row(measured[call])} for call in calls],
            "layers": {name: record["choices"] for name, record in records.items() if "choices" in record},
            "last": record_of(model).get("last"),
            "apart": record_of(model).get("apart", []),
        }
        try:
            with temporary_beside(self._file) as temporary:
                temporary.write_text(json.dumps(found))
            _drop_oldest(self._file.parent)
        except OSError as error:
            warn_unwritable(error)

    def _is_found_again(self, gain: Gain) -> bool:
        earlier = self._disturbed
        return earlier is not None and (earlier.kept, earlier.layout) == (gain.kept, gain.layout)


def outcome_of(
    model: nn.Module, fusions: Fusions, replaced: Sequence[str], dense: Sequence[str], dtype: Any
) -> Outcome | None:
    """The outcome for a model before anything is done to it; None where it is not known what it computes."""
    usual = dtype is None and get_backend() == "auto" and not torch.is_autocast_enabled("cpu")
    if fusions.digest is None or not usual or measures_anew():
        return None
    return Outcome(
        {
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "precision": [torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled],
            "segfast": _digest_of_package(),
            "forward": fusions.digest,
            "modules": [[name, qualified(type(module))] for name, module in model.named_modules()],
            "fused": [list(fusions.sequences), fusions.known, fusions.unknown],
            "replaced": [sorted(replaced), dense],
        }
    )


def _still_chosen(row: dict[str, Any]) -> bool:
    """True if the call of `row` still has the choice that is kept there."""
    call, choice = parsed(row, machine())
    now = choices().measured.get(call)
    return now is not None and choice_row(now) == choice_row(choice)


def _drop_oldest(folder: Path) -> None:
    """Leave the newest files in `folder`."""
    written = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            written.append((file.stat().st_mtime, file))
    for _, file in sorted(written)[:-_MOST]:
        file.unlink(missing_ok=True)


def _digest_of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for t in (*model.parameters(), *model.buffers()):
        digest.update(digest_of_values(t).encode())
    return digest.hexdigest()


@functools.cache
def _digest_of_package() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
