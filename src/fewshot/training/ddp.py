"""Tasks over ranks: each computes its share of a meta-batch, and all do the same outer update."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from fewshot.errors import RankGone, UserError, first_line
from fewshot.processes import ranks

T = TypeVar("T")


class TasksOverRanks(DDPStrategy):
    """Lightning's DDP without torch's wrapper, whose hooks would wait in vain for a backward pass through the module:
    the engines leave the outer gradient in .grad, and the module calls mean_over_ranks on it.
    """

    def configure_ddp(self) -> None:
        pass

    def barrier(self, *args: Any, **kwargs: Any) -> None:  # Lightning waits in it too, after a checkpoint for example
        with _others_there():
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: T, src: int = 0) -> T:
        with _others_there():
            return super().broadcast(obj, src)

    def _configure_launcher(self) -> None:
        pass  # ranks.start, torchrun or srun have started the processes


def mean_over_ranks(values: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks, in place, all in one message.

    Raises:
        RankGone: another rank is.
    """
    if not dist.is_initialized():
        return
    flat = torch.cat([value.flatten() for value in values])
    with _others_there():
        dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for value, mean in zip(values, flat.split([value.numel() for value in values]), strict=True):
        value.copy_(mean.view_as(value))


def of_all_ranks(values: list[T]) -> list[T]:
    """The lists of all ranks one after the other."""
    if not dist.is_initialized():
        return values
    lists: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    with _others_there():
        dist.all_gather_object(lists, values)
    return [value for own in lists for value in own]


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers, on all of them."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number, device=device)
    with _others_there():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's "connection closed by peer" and the like
        raise RankGone(f"another rank is gone ({first_line(error)})") from error


def cluster() -> ClusterEnvironment:
    """Where Lightning finds its rank; left to choose it would, under Slurm, put jobs back into the queue on its own."""
    if ranks.launcher() == "srun":
        if "SLURM_NTASKS_PER_NODE" not in os.environ and os.environ.get("SLURM_JOB_NUM_NODES") != "1":
            raise UserError("srun: give --ntasks-per-node, as many as trainer.devices")
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if ranks.launcher() else LightningEnvironment()
