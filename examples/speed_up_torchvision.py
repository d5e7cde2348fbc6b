"""Make one of torchvision's segmentation networks faster on this machine, with its own weights.

python examples/speed_up_torchvision.py [NAME [SIZE]]     (deeplabv3_resnet50, 256)

Needs torchvision. With weights of your own: `model.load_state_dict(...)` before `optimize`.
"""

import sys

import torch
import torchvision

import segfast

name = sys.argv[1] if len(sys.argv) > 1 else "deeplabv3_resnet50"
size = int(sys.argv[2]) if len(sys.argv) > 2 else 256

model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
image = torch.randn(1, 3, size, size)

# Measures what runs each call fastest, for a minute at most; the second time it is remembered.
fast = segfast.optimize(model, image)

report = segfast.report(fast)
print(report)  # layer by layer: replaced, fused, or why not; what runs it
print(report.gain)  # the whole model before and after; a model that is not faster is left as it was

with torch.inference_mode():
    expected, scores = model(image)["out"], fast(image)["out"]
print(
    f"largest difference: {(scores - expected).abs().max() / expected.abs().max():.1e} of the largest score"
)

# Nothing about the weights has changed: they go back into torchvision's network.
model.load_state_dict(fast.state_dict())
