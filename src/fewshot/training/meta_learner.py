"""The LightningModule: inner adaptation, outer step, metrics.

Shapes: B tasks, N inner steps while training, T while testing.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from fewshot.batched import engine as batched
from fewshot.batched.execution import CudaGraphs, one_by_one
from fewshot.config.tree import MODES
from fewshot.data.task import Task
from fewshot.errors import UserError
from fewshot.maml import explicit_loss
from fewshot.models.head import share_gradient, share_rows
from fewshot.models.network import Network
from fewshot.models.resnet12 import dropping, drops
from fewshot.results.scores import Scores, diverged
from fewshot.theory import probes
from fewshot.training.ddp import mean_over_ranks, of_all_ranks

log = logging.getLogger(__name__)

LARGE = 4_000_000  # numbers; on a CPU threads give so large a tensor's memory back to the system every time


def step_weights(steps: int, done: float) -> list[float]:
    """v_1 .. v_N, what the query loss after each inner step counts: at first alike, at last the last one alone.

    The annealing of MAML++ (Antoniou et al. 2019, section 4) as its code has it: straight lines, none below 0.03/N.

    done: share of the annealing that is over, 0 .. 1.
    """
    others = max((1 - done) / steps, 0.03 / steps)
    return [*[others] * (steps - 1), 1 - (steps - 1) * others]


class MetaLearner(pl.LightningModule):
    """MAML: theta <- theta - rho mean_n grad_theta L(theta_n, Q_n), with Adam as outer optimiser (method.md section 0).

    Args:
        network: has .encoder and .head, a linear layer; its forward is head(encoder(images)).
        engine: "sequential" (learn2learn, task after task), "batched" (all at once) or "auto"; the same gradients.
        inner_lr: eta.
        inner_steps: N.
        test_steps: T >= N, steps of the evaluation.
        first_order: FOMAML; else SOMAML.
        zeroing: the head is zero whenever the inner loop begins, as callbacks.ZeroHead sees to; saves the first inner
            step's backward pass, and the head needs no outer gradient.
        adapted: what the inner loop adapts, "all", the "head" or the "encoder" alone.
        head: where it starts, "learned", "shared" (one learned row for all classes) or "prototypes".
        step_losses: outer updates until the last query loss alone counts, see `step_weights`; None: always.
        learned_inner_lr: each number that adapts has its own eta, learned in the outer loop.
        outer_lr: rho.
        noise, interference: the terms of the explicit contrastive loss, which then takes MAML's place; None: MAML.
        recompute_steps: of second order, in the memory of one inner step (recompute.py).
        tasks_at_once: of the batched engine; None: as many as there are CPU threads, or all on a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        engine: str,
        inner_lr: float,
        inner_steps: int,
        test_steps: int,
        first_order: bool,
        zeroing: bool,
        adapted: str,
        head: str,
        step_losses: int | None,
        learned_inner_lr: bool,
        outer_lr: float,
        recompute_steps: bool = False,
        tasks_at_once: int | None = None,
        noise: bool | None = None,
        interference: bool | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # the engine leaves the outer gradient in .grad
        self.network = network
        self.engine, self.tasks_at_once, self.recompute_steps = engine, tasks_at_once, recompute_steps
        self.inner_lr, self.inner_steps, self.test_steps = inner_lr, inner_steps, test_steps
        self.first_order, self.zeroing, self.step_losses = first_order, zeroing, step_losses
        self.adapted, self.head, self.outer_lr = adapted, head, outer_lr
        if head == "shared":
            share_rows(network.head)
        adapts = network if adapted == "all" else getattr(network, adapted)
        etas = (torch.full_like(p, inner_lr) for p in adapts.parameters() if learned_inner_lr)
        self.etas = nn.ParameterList(etas)
        self.noise, self.interference = noise, interference
        self.results: dict[str, dict[str, Scores]] = {}
        self.tested: dict[str, dict[str, Tensor]] = {}  # accuracies of the test by split and mode, (tasks, T + 1)
        self._tested: tuple[list, ...] = ()

    @classmethod
    def from_config(cls, cfg: DictConfig, engine: str) -> "MetaLearner":
        """The learner of a composed configuration; engine: cfg.engine, or what it has turned out to be."""
        network = instantiate(cfg.model.network)
        encoder, head = getattr(network, "encoder", None), getattr(network, "head", None)
        if not (isinstance(encoder, nn.Module) and isinstance(head, nn.Module) and hasattr(head, "weight")):
            raise UserError(f"model.network={cfg.model.network._target_}: makes no network with an encoder and a head")
        if type(network).forward is not Network.forward:
            images = torch.linspace(-1, 1, 2 * cfg.dataset.channels * cfg.dataset.size**2)
            images = images.view(2, cfg.dataset.channels, cfg.dataset.size, cfg.dataset.size)
            with torch.no_grad():
                if not torch.allclose(network(images), head(encoder(images))):
                    raise UserError(
                        f"model.network={cfg.model.network._target_}: its forward is not head(encoder(images)); "
                        "put what it does besides into the encoder"
                    )
        return cls(
            network,
            engine=engine,
            inner_lr=cfg.inner_lr,
            inner_steps=cfg.inner_steps,
            test_steps=cfg.test_steps,
            first_order=cfg.algo.first_order,
            zeroing=cfg.get("zeroing", cfg.algo.zeroing),
            adapted=cfg.algo.adapted,
            head=cfg.algo.head,
            step_losses=cfg.algo.step_losses,
            learned_inner_lr=cfg.algo.learned_inner_lr,
            noise=cfg.algo.get("noise"),
            interference=cfg.algo.get("interference"),
            outer_lr=cfg.outer_lr,
            recompute_steps=cfg.get("recompute_steps", False),  # older runs have none
            tasks_at_once=cfg.tasks_at_once,
        )

    def setup(self, stage: str) -> None:
        """Settles what engine=auto means, by a rule that docs/performance.md has the measurements for."""
        # Lightning does this only after it has loaded a checkpoint, which would round float64 weights to float32.
        self.trainer.precision_plugin.convert_module(self)
        device = self.trainer.strategy.root_device.type
        if self.engine == "auto":
            self.engine, reason = ("batched", device) if device != "cpu" else self._engine_on_a_cpu()
            log.info(f"engine=auto: {self.engine} ({reason})")
        if self.engine == "sequential":
            from fewshot.maml import sequential  # learn2learn takes its time to import

            how, engine = {}, sequential
        else:
            how = {"tasks_at_once": self.tasks_at_once, "execute": CudaGraphs() if device == "cuda" else None}
            engine = batched
        how |= {"adapted": self.adapted, "prototypes": self.head == "prototypes"}
        self._step_accuracies = partial(engine.step_accuracies, **how)
        recomputes = self.recompute_steps and not self.first_order
        if engine is batched and drops(self.network) and (device == "cpu" or recomputes):
            # Threads would draw from the one generator in any order, and a CUDA graph cannot set it back.
            how["execute"] = one_by_one
        how |= {"zeroing": self.zeroing, "recompute_steps": self.recompute_steps}
        self._meta_gradient = partial(engine.meta_gradient, **how)
        self._step_weights = torch.zeros(self.inner_steps, device=self.trainer.strategy.root_device)
        if self.noise is not None:
            terms = {"noise": self.noise, "interference": self.interference}
            self._meta_gradient = partial(explicit_loss.meta_gradient, **terms)

    def _engine_on_a_cpu(self) -> tuple[str, str]:
        """Which, and why: one task per thread, unless there is but one or its tensors are large."""
        data, precision, numbers = self.trainer.datamodule, self.trainer.precision_plugin, [0]
        if torch.get_num_threads() == 1 or data.meta_batch_size == 1:
            return "sequential", "one thread" if torch.get_num_threads() == 1 else "one task"
        hooks = [
            layer.register_forward_hook(lambda layer, given, output: numbers.append(output.numel()))
            for layer in self.network.modules()
        ]
        with torch.no_grad(), precision.forward_context():
            self.network(precision.convert_input(data.samplers["train"](0, 1)).query[0])
        for hook in hooks:
            hook.remove()
        if max(numbers) > LARGE:
            return "sequential", f"a layer's output has {max(numbers) / 1e6:.1f} million numbers, above {LARGE / 1e6:g}"
        return "batched", f"{torch.get_num_threads()} threads"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["engine"] = self.engine  # a run that goes on keeps it

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.outer_lr)

    @property
    def _inner_lr(self) -> float | tuple[Tensor, ...]:
        return tuple(self.etas) or self.inner_lr

    def training_step(self, tasks: Task, batch_idx: int) -> dict[str, Tensor]:
        """One outer update. Returns query loss and accuracy after the last inner step, means over the meta-batch.

        tasks: this rank's share of it.
        """
        optimizer = self.optimizers()
        optimizer.zero_grad()
        knobs = {"inner_lr": self._inner_lr, "inner_steps": self.inner_steps, "first_order": self.first_order}
        if self.step_losses and self.global_step < self.step_losses:
            weights = step_weights(self.inner_steps, self.global_step / self.step_losses)
            # The same tensor every time: a CUDA graph reads it where it lay when it was recorded.
            knobs["step_losses"] = self._step_weights.copy_(torch.tensor(weights))
        position = self.global_step * self.trainer.world_size + self.global_rank
        remember = not self.first_order and not self.recompute_steps and self.inner_steps > 1
        remedy = "use recompute_steps=true, or " * (remember and self.adapted != "head")
        with self._one_line_out_of_memory(tasks, remedy), dropping(self.network, position):
            loss, accuracy = self._meta_gradient(self.network, tasks, **knobs)
        means = loss.mean(), accuracy.mean()
        mean_over_ranks([*(parameter.grad for parameter in self.parameters()), *means])
        if self.head == "shared":
            share_gradient(self.network.head)
        optimizer.step()
        return dict(zip(("loss", "query_accuracy"), means, strict=True))

    @torch.enable_grad()
    def evaluate(self, batches: Iterable[Task]) -> dict[str, Scores]:
        """Accuracy after every inner step 0 .. T, with and without test-time zeroing; changes nothing in the module.

        batches: this rank's share; the scores are of all.
        """
        precision = self.trainer.precision_plugin
        with precision.forward_context():
            accuracies = of_all_ranks([self._accuracies(precision.convert_input(tasks)) for tasks in batches])
        return {mode: Scores.of(torch.cat([each[mode] for each in accuracies])) for mode in MODES}

    @torch.enable_grad()
    def logits_after(self, tasks: Task, *, steps: int, zeroing: bool) -> Tensor:
        """The queries' logits after the last of `steps` inner steps, (B, Q, K), one task after the other.

        zeroing: adapt from a copy whose head is zeroed. Changes nothing in the module; needs no trainer.
        """
        from fewshot.maml import sequential

        knobs = {"inner_lr": self._inner_lr, "adapted": self.adapted, "prototypes": self.head == "prototypes"}
        with self._one_line_out_of_memory(tasks):
            return sequential.step_logits(self.network, tasks, steps=steps, zeroing=zeroing, first=steps, **knobs)[:, 0]

    def probes(self, batches: Iterable[Task]) -> dict[str, float]:
        """What evidence/probes.py measures; changes nothing in the module."""
        precision = self.trainer.precision_plugin
        with precision.forward_context():
            tasks = (precision.convert_input(each) for each in batches)
            return probes.probes(self.network, tasks, inner_lr=self.inner_lr, inner_steps=self.inner_steps)

    def on_test_start(self) -> None:
        self._tested = ([], [])

    @torch.enable_grad()
    def test_step(self, tasks: Task, batch_idx: int, dataloader_idx: int) -> None:
        """The tasks of loader 0 are validation tasks, of loader 1 test tasks."""
        self._tested[dataloader_idx].append(self._accuracies(tasks))

    def on_test_epoch_end(self) -> None:
        for split, chunks in zip(("val", "test"), self._tested, strict=True):
            chunks = of_all_ranks(chunks)
            self.tested[split] = {mode: torch.cat([each[mode] for each in chunks]) for mode in MODES}
            self.results[split] = {mode: Scores.of(each) for mode, each in self.tested[split].items()}
            if what := diverged(self.results[split], self.inner_steps, "check dataset.mean and dataset.std"):
                raise UserError(f"{split}_tasks={len(self.tested[split]['zeroing_on'])}: {what}")

    def _accuracies(self, tasks: Task) -> dict[str, Tensor]:
        """{mode: (B, T + 1); the two are one computation where the head they begin with is zero already}"""
        zero = self.head != "prototypes" and not any(parameter.any() for parameter in self.network.head.parameters())
        accuracies = partial(self._step_accuracies, self.network, tasks, inner_lr=self._inner_lr, steps=self.test_steps)
        with self._one_line_out_of_memory(tasks):
            modes = accuracies(zeroing=(True,) if zero else (False, True)).cpu()
        return {"zeroing_off": modes[0], "zeroing_on": modes[-1]}

    @contextmanager
    def _one_line_out_of_memory(self, tasks: Task, remedy: str = "") -> Iterator[None]:
        """remedy: what may help besides, first."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(
                error
            ):
                raise
            default = torch.get_num_threads() if tasks.support.device.type == "cpu" else sys.maxsize
            together = 1 if self.engine == "sequential" else min(len(tasks.support), self.tasks_at_once or default)
            lower = f"tasks_at_once (now {together})" if together > 1 else "queries, shots or model.width"
            where = f"out of memory on {tasks.support.device}"
            raise UserError(f"engine={self.engine}: {where}; {remedy}lower {lower}") from error
