"""`segfast tune`: measure what `segfast.optimize` does, with all tiles of each kernel and more time."""

import argparse
import math

import torch

from .._errors import UserError, describe
from .._optimize.measure import thoroughly
from .._optimize.optimize import optimize, report
from ._load_model import FORMS, add_device, input_channels, load_model, parse_device, parse_dtype, parse_size

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `segfast tune`."""
    parser.add_argument("model", help=FORMS)
    parser.add_argument(
        "--size", default="512x512", metavar="HxW", help="of the images (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: %(default)s)")
    parser.add_argument("--channels", type=int, help="of the images (the first layer's)")
    parser.add_argument("--train", action="store_true", help="the calls of a training step too")
    parser.add_argument(
        "--dtype", default="float32", help=f"{', '.join(DTYPES)}, or bf16, ... (default: %(default)s)"
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds at most (default: %(default)s)")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print what was chosen for each layer and what the model gained. Exit code 0."""
    size = parse_size(args.size)
    dtype = parse_dtype(args.dtype, DTYPES)
    device = parse_device(args.device)
    for name, value in (("--batch", args.batch), ("--channels", args.channels), ("--budget", args.budget)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} must be positive and finite, got {value}")
    model = load_model(args.model).eval().to(device, dtype)
    channels = args.channels or input_channels(model)
    images = torch.randn(args.batch, channels, *size, device=device, dtype=dtype)
    try:
        with thoroughly():
            model = optimize(model, images, inplace=True, budget=args.budget, train=args.train)
    except Exception as error:  # the model's own
        raise UserError(
            f"{args.model} does not run on images {list(images.shape)}: {describe(error)}"
        ) from error
    print(report(model))
    return 0
