"""`segfast export`: a model as an ONNX file of standard operators, compared with the model itself."""

import argparse
import importlib.util
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import UserError, describe
from .._files import atomic_write
from .._optimize.verify import leaves
from ._difference import Difference, error_line, roundoff, worst
from ._load_model import FORMS, input_channels, load_model, parse_size
from ._output import claim

# By which `claim` knows such a file again: the start of a model's bytes names who made it.
PRODUCER = "segfast"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast export`."""
    parser.add_argument("model", metavar="MODEL", help=f"one of {FORMS}")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.onnx", help="the file to write")
    parser.add_argument("--size", required=True, metavar="HxW", help="height and width of the input")
    parser.add_argument("--batch", type=int, default=1, help="images a call (1)")
    parser.add_argument("--channels", type=int, help="of the input (the first Conv2d's)")
    parser.add_argument("--dynamic", action="store_true", help="leave height and width open")
    parser.add_argument("--force", action="store_true", help="replace a file that segfast did not write")


def run(args: argparse.Namespace) -> int:
    """Run `segfast export`: 0 if the file computes what the model does or nothing can run it, 1 if not."""
    height, width = parse_size(args.size)
    for name in ("batch", "channels"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if Path(args.output).suffix.lower() != ".onnx":
        raise UserError(f"--output {args.output}: expected a name ending in .onnx")
    output = claim(args.output, force=args.force)
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"exporting needs what is not installed: pip install {' '.join(missing)}")
    torch.manual_seed(0)
    model = load_model(args.model).cpu().eval()
    channels = args.channels or input_channels(model)
    # Multiples, for the model may need some.
    sizes = [(height, width), (2 * height, 3 * width)][: 2 if args.dynamic else 1]
    images = [torch.randn(args.batch, channels, *size) for size in sizes]
    expected = list(_outputs_of(model, images))
    program = to_onnx(model, images[0], dynamic=args.dynamic)
    differences = _differences(program, images, expected)
    with atomic_write(output) as temporary:
        program.save(temporary)
    shape = [args.batch, channels, *(("height", "width") if args.dynamic else sizes[0])]
    print(f"segfast export {args.model}: wrote {output}, input [{', '.join(map(str, shape))}]")
    for size, difference in zip(sizes, differences, strict=False):
        print(error_line(f"{size[0]}x{size[1]}: largest error of the output in onnxruntime", difference))
    if not differences:
        why = "it returns labels" if _has_onnxruntime() else "onnxruntime is not installed"
        print(f"Not compared with the model: {why}.")
    limit = math.sqrt(roundoff(torch.float32, torch.device("cpu")))
    if all(d.relative <= limit for d in differences):
        return 0
    print("DIFFERENT: the file does not compute what the model does.")
    return 1


def to_onnx(model: nn.Module, images: Tensor, *, dynamic: bool) -> Any:
    """The model as a `torch.onnx.ONNXProgram` of standard operators, whose input is called "images".

    Args:
        model: any module, in eval.
        images: float32 `[N, C, H, W]`.
        dynamic: leave height and width open.

    Raises:
        UserError: torch cannot export it.
    """
    shapes: Any = ({2: "height", 3: "width"},) if dynamic else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the exporter's own use of torch
            program = torch.onnx.export(
                model, (images,), dynamo=True, input_names=["images"], dynamic_shapes=shapes, verbose=False
            )
    except Exception as error:
        size = "images of any size" if dynamic else f"images {list(images.shape)}"
        raise UserError(f"torch cannot export the model for {size}: {describe(_first(error))}") from error
    assert program is not None  # as it is without `dynamo`
    program.model.producer_name = PRODUCER
    return program


def _first(error: BaseException) -> BaseException:
    """The error at the root of this one: torch's own message begins with its strategies."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _outputs_of(model: nn.Module, images: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    """The model's tensors for each, by their place."""
    for image in images:
        try:
            with torch.no_grad():
                outputs = model(image)
        except Exception as error:
            what = f"an input of shape {list(image.shape)}, float32"
            raise UserError(f"the model does not accept {what}: {describe(error)}") from error
        found = {path: leaf for path, leaf in leaves(outputs) if isinstance(leaf, Tensor)}
        if not found:
            raise UserError(f"the model returned {type(outputs).__name__} without a tensor in it")
        yield found


def _differences(program: Any, images: list[Tensor], expected: list[dict[str, Tensor]]) -> list[Difference]:
    """The errors of onnxruntime's outputs for each; none of labels, or where it is not installed."""
    floating = {path for path, tensor in expected[0].items() if tensor.is_floating_point()}
    if not floating or not _has_onnxruntime():
        return []
    import onnxruntime  # optional

    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    [given] = session.get_inputs()
    found = []
    for image, reference in zip(images, expected, strict=True):
        results = map(torch.from_numpy, session.run(None, {given.name: image.numpy()}))
        result = dict(zip(reference, results, strict=False))
        found.append(
            worst(*({p: t for p, t in side.items() if p in floating} for side in (reference, result)))
        )
    return found


def _has_onnxruntime() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None
