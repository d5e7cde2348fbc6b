"""Segment an image of any size with a trained checkpoint.

python examples/predict_image.py IMAGE [CHECKPOINT]
"""

import sys
from pathlib import Path

from segfast.data import read_image, write_mask
from segfast.train import load_checkpoint, predict

image = Path(sys.argv[1])
checkpoint = sys.argv[2] if len(sys.argv) > 2 else "out/nuclei.safetensors"

model = load_checkpoint(checkpoint)
labels = predict(model, read_image(image, model.in_channels))
write_mask(f"out/{image.stem}.mask.png", labels)
print(f"{labels.bool().double().mean():.1%} of {image.name} is foreground: out/{image.stem}.mask.png")
