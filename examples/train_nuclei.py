"""Train a small U-Net on the nuclei image that segfast ships, with a loop of your own.

python examples/train_nuclei.py [STEPS]
"""

import sys

import torch

from segfast.data import NUCLEI_TRAIN_COLUMNS, Sample, nuclei
from segfast.models import UNet
from segfast.train import PatchSampler, evaluate, save_checkpoint

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 350

image, labels = nuclei()
foreground = (labels > 0).long()
train = Sample(image[..., :NUCLEI_TRAIN_COLUMNS], foreground[:, :NUCLEI_TRAIN_COLUMNS])
test = Sample(image[..., NUCLEI_TRAIN_COLUMNS:], foreground[:, NUCLEI_TRAIN_COLUMNS:])

torch.manual_seed(0)
model = UNet(in_channels=1, num_classes=2, width=16, norm="batch")
batches = PatchSampler([train], size=128, batch_size=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(2, steps))

for step in range(1, steps + 1):
    images, targets = batches()
    loss = torch.nn.functional.cross_entropy(model(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

print(f"held-out foreground IoU {evaluate(model, [test], num_classes=2).iou[1]:.3f}")
save_checkpoint(model, "out/nuclei.safetensors")
