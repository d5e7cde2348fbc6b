"""Profile a network: where a pass spends its time, what bounds each layer, what segfast would do about it.

python examples/profile_model.py [SIZE [SECONDS]]     (256, 2)

`segfast profile MODEL --size HxW -o FOLDER` does the same from the command line and writes a page.
"""

import sys

import torch

import segfast

size = int(sys.argv[1]) if len(sys.argv) > 1 else 256
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 2.0

model = segfast.models.UNet(in_channels=3, num_classes=2, width=16, depth=3, norm="batch")
image = torch.randn(1, 3, size, size)

found = segfast.profile(model, image, seconds=seconds, budget=seconds)
print(found)

print("\nThe five longest rows:")
for row in sorted(found.rows, key=lambda row: row.us, reverse=True)[:5]:
    rate = f"{row.flops / row.us / 1e3:.1f} GFLOP/s" if row.flops else "no FLOPs counted"
    print(f"  {row.name or '-'} ({row.kind}): {row.us:.0f} us, {rate}, bound by {row.bound}")

training = segfast.profile(model, image, train=True, seconds=seconds, budget=0)
backward = sum(row.us for row in training.rows if row.direction == "backward")
print(f"\nIn training, {backward / sum(row.us for row in training.rows):.0%} of the time is backward")
