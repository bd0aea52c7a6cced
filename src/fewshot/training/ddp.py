"""Tasks over ranks: each computes its share of a meta-batch, and all do the same outer update."""

import os
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from fewshot.errors import RankGone, Unreachable, UserError, first_line
from fewshot.processes import ranks

T = TypeVar("T")
NAMING = 30  # seconds in which the name of rank 0's machine has to be known


class TasksOverRanks(DDPStrategy):
    """Lightning's DDP without torch's wrapper, whose hooks would wait in vain for a backward pass through the module:
    the engines leave the outer gradient in .grad, and the module calls mean_over_ranks on it.

    timeout: seconds that a rank waits for the others, at the start and in every message.
    """

    def __init__(self, timeout: float, **knobs: Any) -> None:
        super().__init__(timeout=timedelta(seconds=timeout), **knobs)
        self.seconds = timeout

    def setup_distributed(self) -> None:
        if ranks.machines() > 1 and (place := self.cluster_environment):
            _meet(place.main_address, place.main_port, self.seconds)
        with _others_there():
            super().setup_distributed()

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


def mean_over_ranks(values: Sequence[Any]) -> None:
    """Replaces each tensor by its mean over the ranks, in place, all in one message.

    Raises:
        RankGone: another rank has ended.
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
    except RuntimeError as error:  # gloo's "connection closed by peer", "Timed out waiting" and the like
        reason = first_line(error).split("] ", 1)[-1]
        if ranks.machines() > 1 or "timed out" in reason.lower():
            what = f"rank {ranks.rank()} of {ranks.world_size()} on {platform.node()} lost the others ({reason})"
            remedy = "the same call goes on from last.ckpt, or begins again where there is none"
            raise Unreachable(f"{what}; {remedy}; trainer.strategy.timeout is how long it waits") from error
        raise RankGone(f"another rank is gone ({reason})") from error


def _meet(host: str, port: int, seconds: float) -> None:
    """Waits until rank 0's machine takes a connection; torch would warn again and again until its time is over.

    Raises:
        Unreachable: its name is not known, or it does not answer within so many seconds.
    """
    began, here = time.monotonic(), f"rank {ranks.rank()} of {ranks.world_size()} on {platform.node()}"
    while True:
        try:
            if ranks.rank():
                socket.create_connection((host, port), timeout=5).close()
            else:
                socket.getaddrinfo(host, port)
            return
        except socket.gaierror:
            if time.monotonic() - began > min(seconds, NAMING):
                known = f"{here}: rank 0 is on {host}, which is no name that is known here"
                name = (
                    "torchrun --local-addr=ADDRESS there" if ranks.launcher() == "torchrun" else "MASTER_ADDR=ADDRESS"
                )
                raise Unreachable(f"{known}; give {name}") from None
        except OSError as error:
            if time.monotonic() - began > seconds:
                reason = f"trainer.strategy.timeout={seconds:g} seconds ({error.strerror or error})"
                raise Unreachable(f"{here}: rank 0 at {host}:{port} did not answer within {reason}") from None
        time.sleep(0.5)


def cluster() -> ClusterEnvironment:
    """Tells Lightning where to find its rank; by its own choice it would put jobs of Slurm back into the queue."""
    if ranks.launcher() == "srun":
        if "SLURM_NTASKS_PER_NODE" not in os.environ and os.environ.get("SLURM_JOB_NUM_NODES") != "1":
            raise UserError("srun: give --ntasks-per-node, as many as trainer.devices")
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if ranks.launcher() else LightningEnvironment()
