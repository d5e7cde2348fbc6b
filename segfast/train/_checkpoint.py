"""A trained model in one safetensors file: weights, and in the header its name and constructor arguments."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from segfast._errors import UserError, describe
from segfast._files import atomic_write
from segfast.models import SegmentationModel, create, model_name

HEADER = "segfast"
# What to do with another program's checkpoint.
_FOREIGN = "other weights: segfast.models.remap_state_dict, load_state_dict, segfast.train.save_checkpoint"


def save_checkpoint(model: SegmentationModel, path: str | os.PathLike) -> None:
    """Write `model` to `path`, whole or not at all.

    Raises:
        ValueError: `model` is not one of `segfast.models`.
        UserError: the package safetensors is missing, or the file cannot be written.
    """
    safetensors = _safetensors()
    # One entry: safetensors writes several in random order, and equal models should be equal files.
    metadata = {HEADER: json.dumps({"model": model_name(model), "config": model.config})}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as temporary:
        try:
            safetensors.torch.save_file(state, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # so it tells of a write that failed
            raise OSError(describe(error)) from error


def load_checkpoint(path: str | os.PathLike, device: str | torch.device = "cpu") -> SegmentationModel:
    """The model that `save_checkpoint` wrote, in evaluation mode on `device`.

    Raises:
        UserError: no such file, not a checkpoint of ours, or damaged.
    """
    safetensors = _safetensors()
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # SafetensorError, OSError
        raise UserError(f"{path}: not a readable safetensors file ({describe(error)}); {_FOREIGN}") from error
    if HEADER not in metadata:
        seen = ", ".join(sorted(state)[:3]) or "nothing"
        raise UserError(f"{path}: no segfast model in the file's header, but {seen}, ...; {_FOREIGN}")
    try:
        header = json.loads(metadata[HEADER])
        model = create(header["model"], **header["config"])
        model.load_state_dict(state)
    except Exception as error:  # of the JSON, of the constructor, of the sizes
        raise UserError(
            f"{path}: the weights do not fit the model in the header ({describe(error)})"
        ) from error
    return model.eval().to(device)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("checkpoints need the package safetensors (the extra 'demo' has it)") from error
    return safetensors
