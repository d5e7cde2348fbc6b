"""Train a dense CRF together with the network below it (CRF-as-RNN), on patches of the nuclei.

python examples/crf_as_rnn.py [STEPS [SIZE]]     (60, 64)

The loss goes through the CRF's iterations: the network learns, and so do the CRF's weights, its compatibility
and its standard deviations. Whether a CRF helps on your data is another question, which `segfast crf-fit`
answers.
"""

import sys

import torch
import torch.nn.functional as F

import segfast
from segfast.data import NUCLEI_TRAIN_COLUMNS, Sample, nuclei
from segfast.models import UNet
from segfast.train import PatchSampler

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
size = int(sys.argv[2]) if len(sys.argv) > 2 else 64

image, labels = nuclei()
foreground = (labels > 0).long()
train = Sample(image[..., :NUCLEI_TRAIN_COLUMNS], foreground[:, :NUCLEI_TRAIN_COLUMNS])
batches = PatchSampler([train], size=size, batch_size=2)

torch.manual_seed(0)
network = UNet(in_channels=1, num_classes=2, width=8, depth=2, norm="batch")
crf = segfast.nn.DenseCRF(
    2,
    theta_alpha=20,
    theta_beta=20,
    bilateral_weight=1,
    spatial_weight=1,
    method="lattice",
    learn_thetas=True,
)
thetas = [crf.theta_alpha, crf.theta_beta, crf.theta_gamma]
rest = [parameter for name, parameter in crf.named_parameters() if not name.startswith("theta")]
optimizer = torch.optim.Adam(
    [
        {"params": [*network.parameters(), *rest], "lr": 3e-3},
        {"params": thetas, "lr": 0.1},  # of other units: pixels, and gray levels
    ]
)

for step in range(1, steps + 1):
    images, targets = batches()
    gray = 255 * images.expand(-1, 3, -1, -1)  # theta_beta is in the units of this image: 0..255
    loss = F.nll_loss(crf(network(images), gray), targets)  # the CRF returns log-probabilities
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == steps:
        print(f"step {step}: loss {loss.item():.4f}")

print("learned:", *(f"{name} {value.tolist()}" for name, value in crf.named_parameters()), sep="\n  ")
