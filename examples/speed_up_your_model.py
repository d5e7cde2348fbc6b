"""Make a network of your own faster: written in plain torch.nn, optimized, kept by its weights, and undone.

python examples/speed_up_your_model.py [SIZE]     (128)
"""

import sys
from pathlib import Path

import torch
from torch import nn

import segfast


class Segmenter(nn.Module):
    """An encoder, a dilated block and a decoder with one skip: [N, 3, H, W] to [N, classes, H, W]."""

    def __init__(self, classes: int = 4, width: int = 32):
        super().__init__()
        self.stem = self.block(3, width, stride=2)
        self.down = self.block(width, 2 * width, stride=2)
        self.context = self.block(2 * width, 2 * width, dilation=4)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.mix = self.block(2 * width, width)
        self.head = nn.ConvTranspose2d(width, classes, 2, stride=2)

    @staticmethod
    def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.stem(x)
        deep = self.up(self.context(self.down(skip)))
        return self.head(self.mix(torch.cat([skip, deep], 1)))


size = int(sys.argv[1]) if len(sys.argv) > 1 else 128
image = torch.randn(1, 3, size, size)
model = Segmenter().eval()

fast = segfast.optimize(model, image)
print(segfast.report(fast))

# The keys of the state_dict are the model's own, before and after.
file = Path("out/your_model.pt")
file.parent.mkdir(exist_ok=True)
torch.save(fast.state_dict(), file)
model.load_state_dict(torch.load(file))

with torch.inference_mode():
    print(f"largest difference: {(fast(image) - model(image)).abs().max():.1e}")
print(f"after restore the head is a {type(segfast.restore(fast).head).__module__}.ConvTranspose2d again")
