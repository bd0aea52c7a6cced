"""The LightningModule: inner adaptation, outer step, metrics.

Shapes: B tasks, N inner steps.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor

from fewshot.data.task import Task
from fewshot.models.head import share_gradient
from fewshot.models.network import dropping
from fewshot.results.record_files import Scores
from fewshot.training.choose_engine import Engine, choose_engine
from fewshot.training.ddp import mean_over_ranks, of_all_ranks
from fewshot.training.evaluation import Evaluation, Measured
from fewshot.training.learner import Learner
from fewshot.training.outer_step import OuterStep


def step_weights(steps: int, done: float) -> list[float]:
    """v_1 .. v_N, the weight of the query loss after each inner step: equal at first, at last nearly all on the last.

    The annealing of MAML++ (Antoniou et al. 2019, section 4) as its code has it: straight lines, none below 0.03/N.

    done: share of the annealing that is over, 0 .. 1.
    """
    others = max((1 - done) / steps, 0.03 / steps)
    return [*[others] * (steps - 1), 1 - (steps - 1) * others]


class MetaLearner(pl.LightningModule):
    """MAML: theta <- theta - rho mean_n grad_theta L(theta_n, Q_n) (method.md section 0).

    Args:
        learner: its network has .encoder and .head, a linear layer, and its forward is head(encoder(images)); with
            zeroing, the callback ZeroHead sees to it that the head is zero when the inner loop begins.
        choose: gives the engine for a network, an inner loop and a trainer when a run begins; see choose_engine.
        evaluation: what validation and test measure; it keeps what the test has measured.
        outer: what becomes of the outer gradient.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        choose: Callable[..., Engine],
        evaluation: Evaluation,
        outer: OuterStep,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # the engine leaves the outer gradient in .grad
        self.network, self.loop, self.etas = learner.network, learner.loop, learner.etas
        self.choose, self.evaluation, self.outer = choose, evaluation, outer

    @classmethod
    def from_config(cls, cfg: DictConfig, engine: str) -> "MetaLearner":
        """The learner of a composed configuration; engine: cfg.engine, or the one that a continued run has."""
        choose = partial(choose_engine, asked=engine, tasks_at_once=cfg.tasks_at_once)
        evaluation, outer = Evaluation.from_config(cfg), OuterStep.from_config(cfg)
        return cls(Learner.from_config(cfg), choose=choose, evaluation=evaluation, outer=outer)

    def setup(self, stage: str) -> None:
        # Lightning does this only after it has loaded a checkpoint, which would round float64 weights to float32.
        self.trainer.precision_plugin.convert_module(self)
        self.engine = self.choose(network=self.network, loop=self.loop, trainer=self.trainer)
        self.choose = partial(self.choose, asked=self.engine.name)  # the test after training has the same
        self._tested = ([], [])
        self._step_weights = torch.zeros(self.loop.inner_steps, device=self.trainer.strategy.root_device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["engine"] = self.engine.name  # a run that goes on keeps it

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.outer.of(self.parameters())

    def training_step(self, tasks: Task, batch_idx: int) -> dict[str, Tensor]:
        """One outer update; tasks: this rank's share of the meta-batch.

        Returns loss, query_accuracy and what loop.measures names, means over the meta-batch; and the norm of the outer
        gradient, where it has a limit.
        """
        loop, v = self.loop, None
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        if loop.step_losses and self.global_step < loop.step_losses:
            # The same tensor every time: a CUDA graph reads it where it lay when it was recorded.
            weights = step_weights(loop.inner_steps, self.global_step / loop.step_losses)
            v = self._step_weights.copy_(torch.tensor(weights))
        position = self.global_step * self.trainer.world_size + self.global_rank
        remembers = not loop.first_order and not loop.recompute_steps and loop.inner_steps > 1
        remedy = "use recompute_steps=true, or " * (remembers and loop.adapted != "head")
        with self.engine.one_line_out_of_memory(tasks, remedy), dropping(self.network, position):
            measured = self.engine.meta_gradient(self.network, tasks, loop, self.etas, v)
        means = [of_tasks.mean() for of_tasks in measured]
        mean_over_ranks([*(parameter.grad for parameter in self.parameters()), *means])
        if loop.head == "shared":
            share_gradient(self.network.head)
        norm = self.outer.clip(optimizer, self.network, loop.zeroing)
        optimizer.step()  # theta <- theta - rho grad; with zeroing, ZeroHead follows: w <- 0
        self.outer.set_rate(optimizer, self.global_step)
        return dict(zip(("loss", "query_accuracy", *loop.measures), means, strict=True)) | norm

    @torch.enable_grad()
    def evaluate(self, batches: Iterable[Task]) -> dict[str, Scores]:
        """Accuracy after every inner step 0 .. T, with and without test-time zeroing; changes nothing in the module.

        batches: this rank's share; the scores are of all.
        """
        precision = self.trainer.precision_plugin
        with precision.forward_context():
            chunks = of_all_ranks([self._measured(precision.convert_input(tasks), final=False) for tasks in batches])
        return self.evaluation.scores(chunks)

    @torch.enable_grad()
    def test_step(self, tasks: Task, batch_idx: int, dataloader_idx: int) -> None:
        """The tasks of loader 0 are validation tasks, of loader 1 test tasks."""
        self._tested[dataloader_idx].append(self._measured(tasks, final=True))

    def on_test_epoch_end(self) -> None:
        for split, chunks in zip(("val", "test"), self._tested, strict=True):
            self.evaluation.keep(split, of_all_ranks(chunks), self.loop.inner_steps)

    def _measured(self, tasks: Task, final: bool) -> Measured:
        return self.evaluation.measure(self.engine, self.network, self.loop, self.etas, tasks, final=final)
