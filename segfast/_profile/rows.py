"""The rows of a profile: what each layer of a model took, did and could do, in the order of the calls."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One call of a layer or a fused group, one copy or cast, or the time between the layers.

    `us`, `p20_us`, `p80_us` are the median and percentiles of the repeated passes in microseconds, `start_us`
    the median start within its pass; a backward pass begins at 0 again. `flops` are floating-point operations
    (a multiply-add is two), `bytes` what must move at least: inputs, parameters and outputs, once each.
    """

    # Qualified name of the module; "" where it is no layer.
    name: str
    # conv2d, conv_transpose2d, batch_norm, activation, pool, resize, cat, add, layout copy, cast,
    # between layers, other, or what kind of fused group it is.
    kind: str
    # "forward" or "backward".
    direction: str
    start_us: float
    us: float
    p20_us: float
    p80_us: float
    flops: int = 0
    bytes: int = 0
    # What limits it: "compute", "memory", "launch" or "layout copy"; "" if that is not known.
    bound: str = ""
    # The part that it reaches of the roof that limits it: the device's rate at this intensity.
    roof_share: float | None = None
    # Shape of the output; () where there is no single one.
    output: tuple[int, ...] = ()
    # The dtype of the output, such as "float32"; of a cast "float32 to bfloat16".
    dtype: str = ""
    # "contiguous" or "channels_last"; "" of what has no layout.
    memory_format: str = ""
    # The most memory held during the call, above what was held before it.
    peak_bytes: int | None = None
    # Numbers that are learned in it.
    parameters: int = 0
    # What could run it, and the microseconds of each, where that was measured.
    candidates: tuple[tuple[str, float], ...] = ()
    # One sentence of what segfast would do; "" if nothing.
    advice: str = ""

    @property
    def intensity(self) -> float:
        """Floating-point operations a byte; 0 where nothing moves."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Roof:
    """The rates that were measured on a device: matrix products by dtype, and a copy (read and write).

    `call_us` are the microseconds of a call that computes next to nothing.
    """

    # The GPU's or the CPU's name.
    device: str
    # Of a CPU, else None.
    threads: int | None
    # By a dtype's name, such as "float32".
    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    call_us: float = 0.0


@dataclass(frozen=True)
class Profile:
    """The findings of `segfast.profile`: rows that add up to `whole_us`, the roof, and what could be gained.

    `whole_us` is the median of whole passes with hooks, `plain_us` that of passes without: their difference
    is what measuring cost. `expected_gain` is how many times as fast the whole is expected to become, where
    that is known. `kernels` are the operators and kernels that ran, with calls and microseconds a pass, where
    they were asked for. `remarks` are sentences on what could not be measured. `str()` is a table.
    """

    title: str
    rows: tuple[Row, ...]
    roof: Roof
    whole_us: float
    plain_us: float
    train: bool
    # Images in a call.
    batch: int
    expected_gain: float | None = None
    # The same model after `segfast.optimize`, where that was asked for.
    optimized: "Profile | None" = None
    kernels: tuple[tuple[str, int, float], ...] = ()
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        from .table import profile_text  # which imports this module

        return profile_text(self)

    def save(self, folder: str | os.PathLike, *, force: bool = False) -> list[Path]:
        """Write a page, a table, a trace and a picture into `folder`; returns their paths.

        Raises:
            UserError: a file exists that segfast did not write, and `force` is not set; or it cannot be
                written.
        """
        from .save import save  # which imports this module

        return save(self, folder, force=force)
