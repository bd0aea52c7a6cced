"""Meta-batches for training, chunks of fixed tasks for evaluation.

Shapes: B tasks per meta-batch.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from fewshot.data.sampler import TaskSampler
from fewshot.data.splits import splits_of
from fewshot.data.task import SPLITS, Split, Task
from fewshot.errors import UserError, first_line

log = logging.getLogger(__name__)

EVALUATION_SEED = 0  # every run is validated and tested on the same tasks, whatever its own seed


@dataclass(frozen=True)
class MetaBatches:
    """Yields `size` tasks from position start(), from start() + stride, ... below stop; fewer where stop is nearer.

    `start` is called when iteration begins, because a resumed run starts at the outer updates done, not at zero. There
    is no length: Lightning would end the epoch when the batches since the resumption reach it.
    """

    draw: TaskSampler
    size: int
    stride: int
    stop: int
    start: Callable[[], int]

    def __iter__(self) -> Iterator[Task]:
        for first in range(self.start(), self.stop, self.stride):
            yield self.draw(first, min(self.size, self.stop - first))


def fixed_tasks(cfg: DictConfig, split: Split, name: str) -> TaskSampler:
    """Draws the tasks of validation or test, "val" or "test", which are the same for every seed of a run.

    They are mutually exclusive, unless training has fixed blocks of classes: then they are blocks too, as in the
    paper's released code.

    Raises:
        ValueError: as TaskSampler does.
    """
    kind = "fixed_blocks" if cfg.dataset.tasks == "fixed_blocks" else "mutually_exclusive"
    return TaskSampler(split, seed=EVALUATION_SEED, stream=SPLITS.index(name), kind=kind, **_shape(cfg))


def _shape(cfg: DictConfig) -> dict[str, Any]:
    shape = {knob: cfg[knob] for knob in ("ways", "shots", "queries")}
    return shape | {knob: tuple(cfg.dataset[knob]) for knob in ("mean", "std")}


def manifest(splits: dict[str, Split]) -> dict[str, Any]:
    """What a run was given: the class names of every split, and a SHA-256 over names, numbers of images and pixels.

    It depends neither on where the files lie nor on how they are packed.
    """
    content = [[name, splits[name].names, splits[name].offsets.tolist(), splits[name].sha256] for name in SPLITS]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"sha256": digest, **{name: list(splits[name].names) for name in SPLITS}}


def images_device(asked: str, compute: torch.device, size: int, free: int) -> torch.device:
    """Where the images are kept: "auto" means on the GPU if they fill at most half of its free memory, else on the CPU.

    asked: dataset.device, where "cuda" is a UserError if the run is on another; compute: the device of the run.
    size, free: bytes of all images, and bytes free on a GPU.
    """
    if asked == "cuda" and compute.type != "cuda":
        raise UserError(f"dataset.device=cuda: the run is on {compute.type}; use dataset.device=auto or trainer=gpu")
    if asked == "cpu" or (asked == "auto" and compute.type == "cuda" and 2 * size > free):
        return torch.device("cpu")
    return compute


def augmentation(transforms: list[Callable[[Tensor], Tensor]], pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """The transforms one after another, once they were tried on some of the images, (M, C, H, W) uint8.

    Raises:
        UserError: they fail, change the shape of images, mix them, or draw random numbers elsewhere than from torch.
    """

    def augment(images: Tensor) -> Tensor:
        for transform in transforms:
            images = transform(images)
        return images

    images = pixels[:8].float().div_(255)
    beside_others = torch.cat([images[:1], (1 - images[1:]) / 2])
    shape = tuple(images.shape[1:])
    for seed in range(16):  # some act seldom
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                after = augment(images.clone())
                torch.manual_seed(seed)
                first = augment(beside_others.clone())[0]
            is_kept = (after.shape, after.dtype) == (images.shape, images.dtype)
        except Exception as error:  # whatever it makes of images that it is not made for
            raise UserError(
                f"augment: fails on images of {shape} ({first_line(error)}); use other transforms"
            ) from error
        if not is_kept:
            turned = f"{tuple(after.shape[1:])} {after.dtype}"
            raise UserError(f"augment: turns images of {shape} into {turned}; use transforms that keep the shape")
        if not torch.equal(after[0], first):
            raise UserError(
                "augment: what becomes of an image depends on those beside it, or on random numbers that torch did "
                "not draw; use transforms of each image alone"
            )
    return augment


class TaskDataModule(pl.LightningDataModule):
    """Turns the splits of a dataset into meta-batches on the compute device.

    splits: train, val and test images, (M, C, H, W) uint8; cfg: the composed configuration.
    """

    def __init__(self, splits: dict[str, Split], cfg: DictConfig) -> None:
        super().__init__()
        self.manifest = manifest(splits)
        self.device, self._placed = cfg.dataset.device, False
        self.meta_batch_size, self.iterations = cfg.meta_batch_size, cfg.iterations
        self.tasks_at_once = cfg.tasks_at_once or cfg.meta_batch_size
        self.tasks = {"val": cfg.val_tasks, "test": cfg.test_tasks}
        transforms = list(instantiate(cfg.augment).values()) if cfg.augment else []
        trained_on = splits["test" if cfg.dataset.tasks == "one_task" else "train"]
        augment = augmentation(transforms, trained_on.images) if transforms else None
        try:
            training = TaskSampler(trained_on, seed=cfg.seed, kind=cfg.dataset.tasks, augment=augment, **_shape(cfg))
            self.samplers = {"train": training}
            self.samplers |= {name: fixed_tasks(cfg, splits[name], name) for name in ("val", "test")}
        except ValueError as error:
            raise UserError(str(error)) from None

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "TaskDataModule":
        """The tasks of a composed configuration; reads the images."""
        data = cfg.dataset
        return cls(splits_of(data.source, (data.channels, data.size, data.size)), cfg)

    def setup(self, stage: str) -> None:
        """Puts the images where tasks are gathered from them by index, once for training and test."""
        if self._placed:
            return
        compute = self._attached.strategy.root_device
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

    @property
    def _attached(self) -> pl.Trainer:
        """The trainer, once there is one."""
        assert self.trainer is not None
        return self.trainer

    def train_dataloader(self) -> MetaBatches:
        """One Task per outer update still to do: this rank's share of its meta_batch_size tasks."""
        whole, ranks = self.meta_batch_size, self._attached.world_size
        share = whole // ranks
        return MetaBatches(
            self.samplers["train"],
            size=share,
            stride=whole,
            stop=self.iterations * whole,
            start=lambda: self._attached.global_step * whole + self._attached.global_rank * share,
        )

    def test_dataloader(self) -> list[MetaBatches]:
        """This rank's share of the fixed validation tasks, then of the fixed test tasks."""
        return [self.fixed("val", self.tasks["val"]), self.fixed("test", self.tasks["test"])]

    def fixed(self, split: str, tasks: int, shared: bool = True) -> MetaBatches:
        """The first `tasks` tasks of the split's stream, the same in every run; shared: each rank gets a part."""
        ranks, rank = (self._attached.world_size, self._attached.global_rank) if shared else (1, 0)
        first, stop = tasks * rank // ranks, tasks * (rank + 1) // ranks
        size = self.tasks_at_once
        return MetaBatches(self.samplers[split], size=size, stride=size, stop=stop, start=lambda: first)
