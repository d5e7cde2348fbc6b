"""Make `selfie_segmenter.safetensors` from the TensorFlow Lite file it was taken from.

    npm pack @mediapipe/selfie_segmentation@0.1.1675465747
    tar xzf mediapipe-selfie_segmentation-0.1.1675465747.tgz package/selfie_segmentation.tflite
    pip install ai-edge-litert safetensors
    python -m segfast.data.convert_selfie package/selfie_segmentation.tflite selfie_segmenter.safetensors

The float16 values are copied unchanged; names and the order of the axes differ. See README.md beside this
file for the source.
"""

import argparse
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from segfast._files import atomic_write
from segfast.models import SelfieSegmenter
from segfast.nn import Conv2d, ConvTranspose2d, DepthwiseConv2d

# Each kind of layer with the name of its tensors in the file and the axes that make its kernel torch's.
# The file numbers the layers of a kind in the order they run, in which `SelfieSegmenter` declares them; its
# kernels are [out, H, W, in], those of depthwise layers [1, H, W, channels].
KINDS: list[tuple[tuple[type[nn.Module], ...], str, tuple[int, ...]]] = [
    ((nn.Conv2d, Conv2d), "conv2d", (0, 3, 1, 2)),
    ((DepthwiseConv2d,), "depthwise_conv2d", (3, 0, 1, 2)),
    ((ConvTranspose2d,), "segment", (3, 0, 1, 2)),
]


def tflite_constants(path: str | os.PathLike) -> Callable[[str], np.ndarray]:
    """Look up a constant tensor of a .tflite file by name, in its own dtype and order of axes."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(os.fspath(path))
    index = {tensor["name"]: tensor["index"] for tensor in interpreter.get_tensor_details()}
    return lambda name: interpreter.get_tensor(index[name])


def convert(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights of the .tflite file as a float16 state_dict of `SelfieSegmenter`.

    Raises:
        KeyError: the file lacks a layer.
        RuntimeError: one has another shape.
    """
    constant = tflite_constants(path)
    model = SelfieSegmenter()
    state = {}
    for kinds, source, axes in KINDS:
        names = [name for name, module in model.named_modules() if type(module) in kinds]
        for number, name in enumerate(names):
            layer = f"{source}_{number}" if number else source
            state[f"{name}.weight"] = torch.from_numpy(constant(f"{layer}/Kernel").transpose(axes).copy())
            state[f"{name}.bias"] = torch.from_numpy(constant(f"{layer}/Bias").copy())
    model.load_state_dict(state)  # every name and shape
    return state


def main(argv: list[str] | None = None) -> None:
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tflite", help="selfie_segmentation.tflite")
    parser.add_argument("output", help="the .safetensors to write")
    args = parser.parse_args(argv)
    state = convert(args.tflite)
    with atomic_write(args.output) as path:
        save_file(state, path)
    print(f"{args.output}: {len(state)} tensors, {sum(t.numel() for t in state.values())} values")


if __name__ == "__main__":
    main()
