"""Export an optimized network: to ONNX with free height and width, run by onnxruntime, and as a program.

python examples/export_onnx.py [WIDTH [SIZE]]     (32, 128)

Needs onnx, onnxscript and onnxruntime. `segfast export MODEL -o FILE.onnx` does it from the command line.
"""

import sys
from pathlib import Path

import onnxruntime
import torch

import segfast

width = int(sys.argv[1]) if len(sys.argv) > 1 else 32
size = int(sys.argv[2]) if len(sys.argv) > 2 else 128

image = torch.randn(1, 3, size, size)
model = segfast.models.UNet(in_channels=3, num_classes=2, width=width, depth=2, norm="batch").eval()
fast = segfast.optimize(model, image)

out = Path("out")
out.mkdir(exist_ok=True)
free = {2: "height", 3: "width"}
torch.onnx.export(fast, (image,), dynamo=True, dynamic_shapes=(free,)).save(out / "unet.onnx")
session = onnxruntime.InferenceSession(out / "unet.onnx")
(name,) = (given.name for given in session.get_inputs())
for height, wide in ((size, size), (size + 16, size - 8)):
    other = torch.randn(1, 3, height, wide)
    (scores,) = session.run(None, {name: other.numpy()})
    with torch.inference_mode():
        error = (torch.from_numpy(scores) - fast(other)).abs().max()
    print(f"onnxruntime at {height}x{wide}: largest difference {error:.1e}")

program = torch.export.export(fast, (image,))
torch.export.save(program, out / "unet.pt2")
same = torch.export.load(out / "unet.pt2").module()(image)
with torch.inference_mode():
    print(f"the program, loaded again: largest difference {(same - fast(image)).abs().max():.1e}")
