"""`segfast profile`: how long each layer of a model takes, what bounds it, what could be done about it."""

import argparse
import math

import torch

from .._errors import UserError, describe
from .._optimize.verify import arguments, run_once
from .._profile.profile import profile
from .._profile.save import claim_files
from ._load_model import FORMS, add_device, input_channels, load_model, parse_device, parse_dtype, parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `segfast profile`."""
    parser.add_argument("model", metavar="MODEL", help=f"one of {FORMS}")
    parser.add_argument("--size", required=True, metavar="HxW", help="height and width of the input")
    parser.add_argument("--batch", type=int, default=1, help="images a call (1)")
    parser.add_argument("--channels", type=int, help="of the input (the first Conv2d's)")
    parser.add_argument("--train", action="store_true", help="forward and backward, in train mode")
    parser.add_argument(
        "--dtype", default="float32", help="float32, float16, bfloat16 or float64, or fp32, ... (float32)"
    )
    add_device(parser)
    parser.add_argument("--optimize", action="store_true", help="the model after segfast.optimize as well")
    parser.add_argument(
        "--compile", action="store_true", help="under torch.compile: the kernels and operators of its graphs"
    )
    parser.add_argument("--kernels", action="store_true", help="list the kernels that run (CPU: operators)")
    parser.add_argument("--nvtx", action="store_true", help="an NVTX range a layer, for Nsight Systems")
    parser.add_argument("--seconds", type=float, default=5.0, help="time to spend on timed passes (5)")
    parser.add_argument(
        "--budget",
        type=float,
        default=30.0,
        help="seconds to spend on measuring what segfast.optimize would do; 0: leave that out (30)",
    )
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="also write a page, a table, a trace and a picture there"
    )
    parser.add_argument("--force", action="store_true", help="replace files that segfast did not write")


def run(args: argparse.Namespace) -> int:
    """Print a model's profile, and write it to a folder. Exit code 0."""
    height, width = parse_size(args.size)
    dtype, device = parse_dtype(args.dtype), parse_device(args.device)
    for name in ("batch", "channels"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds must be positive and finite, got {args.seconds}")
    if not 0 <= args.budget < math.inf:
        raise UserError(f"--budget must be a number of seconds, 0 or more, got {args.budget}")
    if args.output is not None:
        claim_files(args.output, force=args.force)
    torch.manual_seed(0)
    model = load_model(args.model).to(device, dtype)
    channels = args.channels or input_channels(model)
    images = torch.randn(args.batch, channels, height, width, dtype=dtype, device=device)
    try:
        run_once(model, arguments(images))
    except Exception as error:  # the model's own
        shape = list(images.shape)
        raise UserError(f"{args.model} does not run on images {shape}: {describe(error)}") from error
    try:
        found = profile(
            model,
            images,
            args.train,
            optimize=args.optimize,
            compile=args.compile,
            kernels=args.kernels,
            nvtx=args.nvtx,
            seconds=args.seconds,
            budget=args.budget,
        )
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    print(f"segfast profile {args.model}: {found}")
    if args.output is not None:
        for path in found.save(args.output, force=args.force):
            print(f"wrote {path}")
    return 0
