"""Train a small U-Net in two processes, each on its own patches: DistributedDataParallel on a CPU (gloo).

python examples/train_ddp.py [STEPS]     (40)

On GPUs: backend "nccl", `.to(rank)` for the model and the batches, `device_ids=[rank]` for DDP.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from segfast.data import NUCLEI_TRAIN_COLUMNS, Sample, nuclei
from segfast.models import UNet
from segfast.train import Options, PatchSampler, evaluate, fit

PROCESSES = 2


def train(rank: int, file: str, steps: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)

    image, labels = nuclei()
    foreground = (labels > 0).long()
    left = Sample(image[..., :NUCLEI_TRAIN_COLUMNS], foreground[:, :NUCLEI_TRAIN_COLUMNS])
    right = Sample(image[..., NUCLEI_TRAIN_COLUMNS:], foreground[:, NUCLEI_TRAIN_COLUMNS:])

    torch.manual_seed(0)
    model = UNet(in_channels=1, num_classes=2, width=8, depth=2, norm="batch")
    batches = PatchSampler([left], size=64, batch_size=2, seed=rank)  # other patches in each process
    losses = fit(DistributedDataParallel(model), batches, Options(steps=steps))

    # All processes have the same weights: their gradients were averaged in every step.
    weight = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    gathered = [torch.empty_like(weight) for _ in range(PROCESSES)]
    dist.all_gather(gathered, weight)
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; same weights: {torch.equal(*gathered)}")
        print(f"held-out foreground IoU {evaluate(model, [right], num_classes=2).iou[1]:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, args=(f"{folder}/rendezvous", steps), nprocs=PROCESSES)
