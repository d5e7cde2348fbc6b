"""The `segfast` command: a table of subcommands, each imported only when it runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__
from ._errors import UserError

__all__ = ["UserError", "main"]

# Each module has add_arguments(parser) and run(args) -> exit code.
COMMANDS = {
    "demo": (
        "segfast.commands.demo",
        "train a small U-Net on real nuclei, predict a held-out region, draw and measure; segment a portrait",
    ),
    "train": ("segfast.commands.train", "train a network on your images, or on the ones shipped"),
    "predict": ("segfast.commands.predict", "segment images with a trained checkpoint"),
    "segment": (
        "segfast.commands.segment",
        "find the person in photos with a pretrained network: mask and overlay",
    ),
    "crf-fit": (
        "segfast.commands.crf_fit",
        "search a dense CRF's parameters on a validation split; does it help?",
    ),
    "check": ("segfast.commands.check", "run a model before and after optimize: error, time, memory"),
    "profile": (
        "segfast.commands.profile",
        "time each layer of a model: what bounds it, how far from this device's roof, what could be gained",
    ),
    "export": ("segfast.commands.export", "a model as an ONNX file of standard operators, compared with it"),
    "doctor": (
        "segfast.commands.doctor",
        "versions, GPU, what is proven and measured on it, where caches are",
    ),
    "prove": ("segfast.commands.prove", "run every kernel on this GPU and remember which are right"),
    "tune": (
        "segfast.commands.tune",
        "measure what runs a model's calls fastest here, more thoroughly than optimize",
    ),
    "compile-report": (
        "segfast.commands.compile_report",
        "registers, spills, shared memory of every kernel, without a GPU",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `segfast` with `argv` (default: the process's arguments) and return the exit code.

    0 is success, 1 a result that misses its bar, 2 something the caller can put right, 130 an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except SystemExit as error:  # argparse: --help, or arguments it has complained about
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 2
    except UserError as error:
        print(f"segfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("segfast: interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"segfast {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    path, summary = COMMANDS[name]
    command = importlib.import_module(path)
    parser = argparse.ArgumentParser(prog=f"segfast {name}", description=summary)
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments[1:]))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: segfast [--version] COMMAND ...",
            "",
            "Triton kernels and drop-in torch.nn modules for segmentation networks.",
            "",
            *lines,
            "",
            "`segfast COMMAND --help` lists a command's options.",
        ]
    )
