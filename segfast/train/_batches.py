"""The batches of a training: read ahead by workers if wanted, bad images named and skipped if allowed."""

import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segfast._errors import UserError

from ._augment import PatchSampler
from ._parallel import Ranks
from ._progress import load_tqdm


class Batch:
    """Images and targets of this rank's patches, or the error; and what was skipped, a line each."""

    def __init__(self, items: Sequence[tuple[Any, list[str]]]) -> None:
        self.skipped = [line for _, lines in items for line in lines]
        self.error = next((found for found, _ in items if isinstance(found, UserError)), None)
        self.tensors: tuple[Tensor, Tensor] | None = None
        if self.error is None:
            images, targets = zip(*(found for found, _ in items), strict=True)
            self.tensors = torch.stack(images), torch.stack(targets)

    def pin_memory(self) -> "Batch":
        """For copies to a GPU that nobody waits for; `DataLoader` calls it."""
        if self.tensors is not None:
            self.tensors = self.tensors[0].pin_memory(), self.tensors[1].pin_memory()
        return self


class Skipped:
    """Names on stderr, once, each file that is skipped."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            load_tqdm().write(f"segfast: skipped: {line}", file=sys.stderr)  # above the bar, if there is one


class _Patches(Dataset):
    """The patches by number; an error comes as a value, so that it crosses processes as it is."""

    def __init__(self, sampler: PatchSampler, skip_bad: bool) -> None:
        self.sampler, self.skip_bad = sampler, skip_bad

    def __getitem__(self, number: int) -> tuple[Any, list[str]]:
        skipped: list[str] = []
        for instead in range(len(self.sampler.samples)):
            try:
                return self.sampler.patch(number, instead), skipped
            except UserError as error:
                if not self.skip_bad:
                    return error, skipped
                skipped.append(str(error))
        return UserError(f"no image is left that can be read; the last: {skipped[-1]}"), skipped


def batches(
    sampler: PatchSampler,
    ranks: Ranks,
    steps: range,
    skip_bad: bool = False,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's part of each step's batch; the patches of a step are the same for any number of ranks."""
    share = sampler.batch_size // ranks.world
    starts = (step * sampler.batch_size + ranks.rank * share for step in steps)
    numbers = [list(range(start, start + share)) for start in starts]
    loader = DataLoader(
        _Patches(sampler, skip_bad),
        batch_sampler=numbers,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        collate_fn=Batch,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # it would draw from torch's own
        worker_init_fn=_ignore_interrupts,
    )
    return iter(loader)


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches the workers too, but it is the training's to end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
