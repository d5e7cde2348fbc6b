"""The arguments of commands that run a model: MODEL by name, size, dtype, device."""

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._errors import UserError, describe

FORMS = (
    "unet or another of segfast.models.list_models(), path/to/file.py:factory, package.module:factory, "
    "torchvision:NAME, smp:NAME, timm:NAME, or a checkpoint of segfast train, file.safetensors"
)
DTYPES = ("float32", "float16", "bfloat16", "float64")
# Both spellings are taken wherever a dtype is.
SHORT_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def load_model(spec: str) -> nn.Module:
    """Build the model `spec` names, with weights as its factory leaves them; nothing is downloaded.

    The name of a checkpoint gives the model in it.

    Raises:
        UserError: no such form, package, file or factory; the factory failed, or returned no module or one
            without values.
    """
    if spec.endswith(".safetensors"):
        from ..train._checkpoint import load_checkpoint  # which takes as long as the rest

        return load_checkpoint(spec)
    source, colon, name = spec.rpartition(":")
    if not colon and spec.isidentifier():
        source = "segfast"
    if not source or not name:
        raise UserError(f"MODEL must be one of {FORMS}; got {spec!r}")
    if source in _LIBRARIES:
        build: Callable[[], Any] = _LIBRARIES[source](name)
    elif source.endswith(".py"):
        build = _factory(_imported_file(Path(source)), source, name)
    elif all(part.isidentifier() for part in source.split(".")):
        build = _factory(_imported_module(source), source, name)
    else:
        raise UserError(f"MODEL must be one of {FORMS}; got {spec!r}")
    # Whatever the factory raises is its author's to read.
    try:
        model = build()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{spec} raised {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{spec} returned {type(model).__name__}, not a torch.nn.Module")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise UserError(f"{spec} has parameters or buffers on the meta device, which have no values")
    return model


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of "HxW".

    >>> parse_size("256x320")
    (256, 320)
    """
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--size must be HxW, two positive whole numbers such as 256x320; got {text!r}")
    return int(height), int(width)


def input_channels(model: nn.Module) -> int:
    """The input channels of the first convolution in `model.modules()`.

    Raises:
        UserError: it has none.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise UserError("the model has no Conv2d to tell its input channels by; give --channels")


def _segfast(name: str) -> Callable[[], Any]:
    from .. import models  # which takes as long as the rest

    try:
        models.check_name(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    return lambda: models.create(name)


def _torchvision(name: str) -> Callable[[], Any]:
    models = _installed("torchvision.models")
    if name not in models.list_models():
        raise UserError(f"torchvision has no model {name!r}")
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    return lambda: models.get_model(name, **options)


def _smp(name: str) -> Callable[[], Any]:
    smp = _installed("segmentation_models_pytorch")
    builder = getattr(smp, name, None)
    if not (isinstance(builder, type) and issubclass(builder, nn.Module)):
        raise UserError(f"segmentation_models_pytorch has no model {name!r}")
    return lambda: builder(encoder_weights=None)


def _timm(name: str) -> Callable[[], Any]:
    timm = _installed("timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}")
    return lambda: timm.create_model(name, pretrained=False)


_LIBRARIES = {"segfast": _segfast, "torchvision": _torchvision, "smp": _smp, "timm": _timm}


def import_torchvision(module: str = "torchvision") -> Any:
    """torchvision, or what imports it; also where its compiled operators do not fit this torch.

    That is so of PyPI's wheel, which is for CUDA, beside a CPU build of torch: the import fails at two
    operators that it describes to the compiler. Declared here, they can be described; networks call neither.
    """
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    return importlib.import_module(module)


def _installed(module: str) -> Any:
    try:
        return import_torchvision(module)
    except Exception as error:  # also a RuntimeError, where a compiled library does not go with this torch
        remedy = ""
        if "torchvision" in str(error) and not isinstance(error, ModuleNotFoundError):
            remedy = (
                f"; torchvision must be built for this torch, {torch.__version__}: install both from one "
                "index, for CPUs https://download.pytorch.org/whl/cpu"
            )
        raise UserError(f"cannot import {module.partition('.')[0]}: {describe(error)}{remedy}") from error


def _imported_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"_segfast_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    with _importing_from(path.resolve().parent):
        sys.modules[spec.name] = module  # where pickle and dataclasses look classes up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"{path} could not be imported: {describe(error)}") from error
    return module


def _imported_module(name: str) -> Any:
    """Import a module of an installed package or of the working directory."""
    with _importing_from(Path.cwd()):
        try:
            return importlib.import_module(name)
        except Exception as error:
            raise UserError(
                f"{name} could not be imported: {describe(error)}; MODEL must be one of {FORMS}"
            ) from error


def _factory(module: Any, source: str, name: str) -> Callable[[], Any]:
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{source} has no {name!r}; it has {', '.join(public) or 'nothing callable'}")
    found = getattr(module, name)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise UserError(f"{source}:{name} is a {type(found).__name__}, neither a factory nor a module")
    return found


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let the file import its neighbors, and write no bytecode beside it."""
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.dont_write_bytecode = written
        sys.path.remove(str(folder))


def parse_dtype(text: str, known: Sequence[str] = DTYPES, option: str = "--dtype") -> torch.dtype:
    """The floating-point dtype of that name, in either spelling; `known` has the long one.

    >>> parse_dtype("bf16")
    torch.bfloat16
    """
    return getattr(torch, dtype_name(text, known, option))


def dtype_name(text: str, known: Sequence[str], option: str = "--dtype") -> str:
    """That of `known` which is `text`, or its other spelling ("bf16" for "bfloat16", and so on).

    Raises:
        UserError: none is.
    """
    for long, short in SHORT_DTYPES.items():
        for name in (long, short):
            if text in (long, short) and name in known:
                return name
    if text in known:
        return text
    choice = known[0] if len(known) == 1 else f"one of {', '.join(known)}"
    raise UserError(f"{option} must be {choice}; got {text!r}")


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be from 0 to 2**63 - 1, got {seed}")


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def add_device(parser: argparse._ActionsContainer) -> None:
    """The option of every command that runs a model, for `parse_device`."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto: cuda where there is a GPU, else cpu (auto)"
    )


def parse_device(text: str | None) -> torch.device:
    """The device of that name; of "auto" or None the default one."""
    if text is None or text == "auto":
        return default_device()
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu, cuda or auto, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {text}: there are {torch.cuda.device_count()} CUDA GPUs")
    return device
