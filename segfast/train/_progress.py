"""The progress bars of the commands."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from segfast._errors import UserError


@contextlib.contextmanager
def progress(steps: int, shown: bool = True, done: int = 0) -> Iterator[Callable[[int, float], None]]:
    """Yield an `on_step` for `fit` that moves a bar on stderr and shows the loss and the time left.

    The first `done` steps were taken before.

    Raises:
        UserError: the package tqdm is missing.
    """
    tqdm = load_tqdm()
    options = {"desc": "training", "unit": "step", "disable": not shown, "mininterval": 0.5}
    with tqdm(total=steps, initial=done, **options) as bar:

        def on_step(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()

        yield on_step


def load_tqdm() -> Any:
    """The class `tqdm.tqdm`.

    Raises:
        UserError: the package is missing.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise UserError("the progress bar needs the package tqdm (the extra 'demo' has it)") from error
    return tqdm
