"""Meta-batches for training, chunks of fixed tasks for evaluation.

Shapes: B tasks per meta-batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torchvision.transforms import v2

from fewshot.config import UserError
from fewshot.tasks import SPLITS, Split, Task, TaskSampler

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


class MetaData(pl.LightningDataModule):
    """Turns the splits of a dataset into meta-batches on the compute device.

    Args:
        splits: train, val and test images, (M, C, H, W) uint8.
        seed: of the training tasks; validation and test tasks are the same for every seed.
        kind: of the training tasks, as TaskSampler has them; validation and test tasks are mutually exclusive.
        augment: of the training tasks' images, as TaskSampler has it.
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
    ) -> None:
        super().__init__()
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
            augment=v2.Compose(list(instantiate(cfg.augment).values())) if cfg.augment else None,
            seed=cfg.seed,
            meta_batch_size=cfg.meta_batch_size,
            iterations=cfg.iterations,
            val_tasks=cfg.val_tasks,
            test_tasks=cfg.test_tasks,
            tasks_at_once=cfg.tasks_at_once,
        )

    def setup(self, stage: str) -> None:
        """The images move to the compute device, where tasks are gathered from them by index."""
        for sampler in self.samplers.values():
            sampler.to(self.trainer.strategy.root_device)

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
