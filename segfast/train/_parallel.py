"""Ranks that train together: as torchrun starts them, or a single one."""

import atexit
import contextlib
import gc
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from segfast._errors import UserError
from segfast.nn._fused.folding import PooledBatchNorm2d

Result = TypeVar("Result")
_groups: list[Any] = []


@atexit.register
def _drop_groups() -> None:
    """Drop the groups that were joined, when nothing else has them and Python still runs.

    Whoever is the last to drop one waits for its threads, which may wait for Python: it must be Python's own
    reference, which lets them have it, and not that of DDP's C++, which does not.
    """
    gc.collect()
    _groups.clear()


class Ranks(NamedTuple):
    """This process among those that train together; a single one is rank 0 of 1."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.world == 1:
            return number
        tensor = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        values = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], Result]) -> Result:
        """`work()`, which does not talk to other ranks; an error of one ends all, and is told once.

        Raises:
            UserError: that of the first rank that had one; on rank 0.
            SystemExit: with code 2, on the others.
        """
        error, result = None, None
        try:
            result = work()
        except UserError as caught:
            if self.world == 1:
                raise
            error = str(caught)
        if self.largest(error is not None):
            if self.rank == 0:
                raise UserError(next(text for text in self.gather(error) if text is not None))
            self.gather(error)
            raise SystemExit(2)
        return result  # type: ignore[return-value]


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the process group if torchrun started us; this rank and its device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Ranks(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _groups.append(torch.distributed.group.WORLD)
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device), device
    finally:
        torch.distributed.destroy_process_group()


class _RankSum(torch.autograd.Function):
    """The sum over all ranks, in whose gradient every rank's use of it counts."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        total = grads[0].contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


class _SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks; torch's own, `nn.SyncBatchNorm`, is for GPUs."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.track_running_stats):
            return super().forward(input)
        dtype = torch.promote_types(input.dtype, torch.float32)
        count = input.numel() // input.shape[1] * torch.distributed.get_world_size()
        mean = _RankSum.apply(input.sum((0, 2, 3), dtype=dtype)) / count
        centered = input - mean[:, None, None]
        variance = _RankSum.apply(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), share)
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return (centered * scale[:, None, None]).to(input.dtype)
        normal = centered * (scale * self.weight)[:, None, None] + self.bias[:, None, None]
        return normal.to(input.dtype)


def sync_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let batch norms within the model take all ranks' batches in training; its state_dict stays the same."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if type(module) in (nn.BatchNorm2d, PooledBatchNorm2d):
            module.__class__ = _SyncBatchNorm2d


def parallel(
    model: nn.Module, average: nn.Module | None, device: torch.device, sharded: Sequence[str] | None
) -> nn.Module:
    """The caller of the model on every rank: it, sharded in place like its average (FSDP2), or DDP around it.

    Args:
        model: with equal weights on every rank.
        average: see `Trainer`; or None.
        device: this rank's.
        sharded: names of the submodules whose weights are gathered together, each when it runs; the rest are
            gathered for the whole pass. None for DDP, where every rank keeps all.
    """
    if sharded is None:
        return nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh  # not with torch; it takes its time
    from torch.distributed.fsdp import fully_shard  # the same

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for each in (model, average):
        if each is not None:
            each.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # it takes no other
            for name in sharded:
                fully_shard(each.get_submodule(name), mesh=mesh)
            fully_shard(each, mesh=mesh)
    return model


def units(model: nn.Module, called: Collection[str]) -> list[str]:
    """The names of the largest submodules with parameters that are among the `called`, none within another.

    `called` are those that a pass called as functions: others' weights are read from outside of them, and
    must be whole there.
    """
    found: list[str] = []

    def look(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            if prefix + name in called and next(child.parameters(), None) is not None:
                found.append(prefix + name)
            else:
                look(f"{prefix}{name}.", child)

    look("", model)
    return found
