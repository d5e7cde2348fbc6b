"""The parameters of a dense CRF as the commands pass them on: applied to probabilities, kept in a JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from .._errors import UserError
from .._files import atomic_write
from ..functional import mean_field
from ..ops.dense_crf.filters import METHODS

# The least probability a network is taken to mean: pydensecrf's `unary_from_softmax` clips there too.
LEAST = 1e-5


class Parameters(NamedTuple):
    """Parameters of `segfast.functional.mean_field`: thetas in pixels, and in 255ths of the colors."""

    theta_alpha: float
    theta_beta: float
    theta_gamma: float
    bilateral_weight: float
    spatial_weight: float
    iterations: int

    def scaled(self, factor: float) -> "Parameters":
        """The same for an image `factor` times as large."""
        return self._replace(theta_alpha=self.theta_alpha * factor, theta_gamma=self.theta_gamma * factor)


# Changes nothing.
NO_CRF = Parameters(80.0, 13.0, 3.0, 0.0, 0.0, 0)
# The example of pydensecrf's manual, which scripts copy.
TEXTBOOK = Parameters(80.0, 13.0, 3.0, 10.0, 3.0, 10)


@torch.no_grad()
def refine(probabilities: Tensor, image: Tensor, parameters: Parameters, method: str = "auto") -> Tensor:
    """Mean field from a network's probabilities.

    Args:
        probabilities: float32 `[K, H, W]`.
        image: `[C, H, W]`, in 0..255.

    Returns:
        float32 `[K, H, W]`.
    """
    if parameters.iterations == 0:
        return probabilities
    energies = -probabilities.clamp_min(LEAST).log()
    return mean_field(energies, image.to(energies.device), method=method, **parameters._asdict())


def write_parameters(
    path: str | os.PathLike, parameters: Parameters, method: str, channels: int, **about: Any
) -> None:
    """Write a JSON whose "parameters" are keyword arguments of `mean_field`.

    Args:
        channels: of the image that they are for.
        about: whatever else a reader may want to know.

    Raises:
        UserError: the file cannot be written.
    """
    content = {
        "written by": f"segfast {__version__}",
        "parameters": {**parameters._asdict(), "method": method},
        "channels": channels,
        **about,
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_parameters(path: str | os.PathLike, channels: int) -> tuple[Parameters, str]:
    """The parameters and the method of a JSON that `segfast crf-fit` wrote, for images of so many channels.

    Raises:
        UserError: no such file, not one of these, values out of range, or for other images.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not a readable JSON ({reason})") from error
    found = content.get("parameters") if isinstance(content, dict) else None
    names = [*Parameters._fields, "method"]
    if not isinstance(found, dict) or sorted(found) != sorted(names):
        raise UserError(f'{path}: expected "parameters" with {", ".join(names)}; `segfast crf-fit` writes it')
    if content.get("channels") != channels:
        raise UserError(
            f"{path}: fitted to images with channels={content.get('channels')}, these have {channels}"
        )
    method = found.pop("method")
    if method not in METHODS:
        raise UserError(f"{path}: method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value in found.items():
        if not _in_range(name, value):
            raise UserError(f"{path}: {name} is {value!r}")
    return Parameters(**found), method


def _in_range(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, or one of JSON's unlimited integers
        return False
    if name == "iterations":
        return isinstance(value, int) and value >= 0
    return value > 0 if name.startswith("theta") else True
