"""Meta-batches for training, chunks of fixed tasks for evaluation.

Shapes: B tasks per meta-batch.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fewshot.data.sampler import TaskSampler
from fewshot.data.task import SPLITS, Split, Task
from fewshot.errors import UserError

log = logging.getLogger(__name__)

EVALUATION_SEED = 0  # every run is validated and tested on the same tasks, whatever its own seed


@dataclass(frozen=True)
class MetaBatches:
    """Yields `size` tasks at positions start(), start() + stride, ... below stop; fewer where stop is nearer.

    start is asked when iteration begins: a resumed run starts at the outer updates done, not at zero. It has no
    length: Lightning would end an epoch where a resumed run's count of batches reaches it.
    """

    draw: TaskSampler
    size: int
    stride: int
    stop: int
    start: Callable[[], int]

    def __iter__(self) -> Iterator[Task]:
        for first in range(self.start(), self.stop, self.stride):
            yield self.draw(first, min(self.size, self.stop - first))


def manifest(splits: dict[str, Split]) -> dict[str, Any]:
    """What a run uses: the class names of every split, and a SHA-256 over names, numbers of images and pixels.

    It depends neither on where the files lie nor on how they are packed.
    """
    content = [[name, splits[name].names, splits[name].offsets.tolist(), splits[name].sha256] for name in SPLITS]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"sha256": digest, **{name: list(splits[name].names) for name in SPLITS}}


def images_device(asked: str, compute: torch.device, size: int, free: int) -> torch.device:
    """Where the images lie: with "auto" on the GPU if they fill at most half of its free memory, else in the CPU's.

    Args:
        asked: dataset.device.
        compute: the device of the run.
        size, free: bytes of all images, and free on a GPU.

    Raises:
        UserError: "cuda" where the run is not on one.
    """
    if asked == "cuda" and compute.type != "cuda":
        raise UserError(f"dataset.device=cuda: the run is on {compute.type}; use dataset.device=auto or trainer=gpu")
    if asked == "cpu" or (asked == "auto" and compute.type == "cuda" and 2 * size > free):
        return torch.device("cpu")
    return compute


def _in_turn(transforms: list[Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
    for transform in transforms:
        images = transform(images)
    return images


class MetaData(pl.LightningDataModule):
    """Turns the splits of a dataset into meta-batches on the compute device.

    Args:
        splits: train, val and test images, (M, C, H, W) uint8.
        seed: of the training tasks; validation and test tasks are the same for every seed.
        kind: of the training tasks, as TaskSampler has them; validation and test tasks are mutually exclusive.
        augment: of the training tasks' images, as TaskSampler has it.
        device: of the images, "auto", "cpu" or "cuda"; see images_device.
    """

    def __init__(
        self,
        splits: dict[str, Split],
        *,
        ways: int,
        shots: int,
        queries: int,
        mean: list[float],
        std: list[float],
        seed: int,
        meta_batch_size: int,
        iterations: int,
        val_tasks: int,
        test_tasks: int,
        tasks_at_once: int | None,
        kind: str,
        augment: Callable[[Tensor], Tensor] | None = None,
        device: str = "auto",
    ) -> None:
        super().__init__()
        self.manifest = manifest(splits)
        self.device, self._placed = device, False
        self.meta_batch_size, self.iterations = meta_batch_size, iterations
        self.tasks_at_once = tasks_at_once or meta_batch_size
        self.tasks = {"val": val_tasks, "test": test_tasks}
        trained_on = splits["test" if kind == "one_task" else "train"]
        try:
            self.samplers = {
                name: TaskSampler(
                    trained_on if name == "train" else splits[name],
                    ways=ways,
                    shots=shots,
                    queries=queries,
                    mean=tuple(mean),
                    std=tuple(std),
                    seed=seed if name == "train" else EVALUATION_SEED,
                    stream=SPLITS.index(name),
                    kind=kind if name == "train" else "mutually_exclusive",
                    augment=augment if name == "train" else None,
                )
                for name in SPLITS
            }
        except ValueError as error:
            raise UserError(str(error)) from None

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "MetaData":
        """The tasks of a composed configuration; reads the images."""
        return cls(
            instantiate(cfg.dataset.source),
            ways=cfg.ways,
            shots=cfg.shots,
            queries=cfg.queries,
            mean=cfg.dataset.mean,
            std=cfg.dataset.std,
            kind=cfg.dataset.tasks,
            augment=partial(_in_turn, list(instantiate(cfg.augment).values())) if cfg.augment else None,
            device=cfg.dataset.device,
            seed=cfg.seed,
            meta_batch_size=cfg.meta_batch_size,
            iterations=cfg.iterations,
            val_tasks=cfg.val_tasks,
            test_tasks=cfg.test_tasks,
            tasks_at_once=cfg.tasks_at_once,
        )

    def setup(self, stage: str) -> None:
        """Puts the images where tasks are gathered from them by index, once for training and test."""
        if self._placed:
            return
        compute = self.trainer.strategy.root_device
        size = sum(sampler.split.images.nbytes for sampler in self.samplers.values())
        free = torch.cuda.mem_get_info(compute)[0] if compute.type == "cuda" else 0
        images = images_device(self.device, compute, size, free)
        if images != compute:
            log.info(
                f"dataset.device={self.device}: the images, {size / 2**30:.2f} GiB, stay in CPU memory "
                f"({free / 2**30:.2f} GiB are free on {compute})"
            )
        for sampler in self.samplers.values():
            sampler.to(compute, images)
        self._placed = True

    def train_dataloader(self) -> MetaBatches:
        """One Task per outer update still to do: this rank's share of its meta_batch_size tasks."""
        whole, ranks = self.meta_batch_size, self.trainer.world_size
        share = whole // ranks
        return MetaBatches(
            self.samplers["train"],
            size=share,
            stride=whole,
            stop=self.iterations * whole,
            start=lambda: self.trainer.global_step * whole + self.trainer.global_rank * share,
        )

    def test_dataloader(self) -> list[MetaBatches]:
        """This rank's share of the fixed validation tasks, then of the fixed test tasks."""
        return [self.fixed("val", self.tasks["val"]), self.fixed("test", self.tasks["test"])]

    def fixed(self, split: str, tasks: int, shared: bool = True) -> MetaBatches:
        """The first `tasks` tasks of the split's stream, the same in every run; shared: out over the ranks."""
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if shared else (1, 0)
        first, stop = tasks * rank // ranks, tasks * (rank + 1) // ranks
        size = self.tasks_at_once
        return MetaBatches(self.samplers[split], size=size, stride=size, stop=stop, start=lambda: first)
