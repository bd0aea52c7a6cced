"""What is measured, written down and shown of a run while it trains."""

# pyright: reportAttributeAccessIssue=false
# Lightning gives its Trainer attributes (datamodule, callbacks) where pyright does not see it.

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import rich.progress
import torch
from hydra.core.hydra_config import HydraConfig
from torch import Tensor

from fewshot.config.tree import MODES
from fewshot.errors import UserError
from fewshot.files import write_file
from fewshot.results.record_files import diverged, write_metrics
from fewshot.theory.features import Features, class_similarities
from fewshot.theory.probes import probes

if TYPE_CHECKING:
    from fewshot.training.meta_learner import MetaLearner

log = logging.getLogger(__name__)

TASKS, BINS = 20, 120  # the tasks whose inner products are counted, and the bins of the count


class Record(pl.Callback):
    """Evaluates the model as it is trained and writes down the run: metrics.csv, best.ckpt, last.ckpt, the logger.

    One order, at iteration 0, every val_every and at the end: validate, metrics.csv, best, last. What metrics.csv holds
    is part of the checkpoint, so a run that goes on from one writes the file that an uninterrupted run would have.

    Raises:
        UserError: a loss or weights that are not finite, with the iteration and the checkpoint that remains.
    """

    def __init__(
        self,
        *,
        val_every: int,
        select: str,
        val_tasks: int,
        test_every: int | None,
        test_curve_tasks: int,
        stop_at_accuracy: float | None,
        probes: bool,
    ) -> None:
        self.val_every, self.select, self.val_tasks = val_every, select, val_tasks
        self.test_every, self.test_curve_tasks = test_every, test_curve_tasks
        self.stop_at_accuracy, self.probes = stop_at_accuracy, probes
        self.rows: list[dict[str, float]] = []  # of metrics.csv
        self.best_accuracy = -1.0  # of validation, so far
        self.stopped = False  # stop_at_accuracy was reached
        self.pending: list[dict[str, Tensor]] = []  # training metrics since the last row, still on the device

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("rows", "best_accuracy", "stopped")}
        return state | {"pending": [{name: w.cpu() for name, w in metrics.items()} for metrics in self.pending]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("rows", "best_accuracy", "stopped", "pending"):
            setattr(self, name, state_dict[name])

    def on_save_checkpoint(self, trainer: pl.Trainer, module: "MetaLearner", checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            write_metrics(self._folder / "metrics.csv", self.rows)  # never older than a checkpoint
            for logger in trainer.loggers:
                logger.save()

    def on_train_start(self, trainer: pl.Trainer, module: "MetaLearner") -> None:
        self.pending = [{name: w.to(module.device) for name, w in metrics.items()} for metrics in self.pending]
        self._began, self._first, self._folder = time.monotonic(), trainer.global_step, Path(trainer.default_root_dir)
        self.stopped = False  # a run that goes on from there stops at another accuracy
        if not self.rows:
            self._record(trainer, module, {"iteration": 0})

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: "MetaLearner", outputs: dict[str, Tensor], *args: Any
    ) -> None:
        iteration = trainer.global_step
        self.pending.append(outputs)
        if any(self._due(trainer, every) for every in (self.val_every, self.test_every, trainer.log_every_n_steps)):
            self._record(trainer, module, {"iteration": iteration, **self._trained(iteration)})

    def _diverged(self, what: str) -> UserError:
        kept = self._folder / "checkpoints" / "last.ckpt"
        return UserError(what + (f"; the last good checkpoint is {kept}" if kept.exists() else ""))

    def _due(self, trainer: pl.Trainer, every: int | None) -> bool:
        return every is not None and (trainer.global_step % every == 0 or trainer.global_step == trainer.max_steps)

    def _record(self, trainer: pl.Trainer, module: "MetaLearner", row: dict[str, float]) -> None:
        validate = self._due(trainer, self.val_every)
        if not all(parameter.isfinite().all() for parameter in module.parameters()):
            remedy = "lower inner_lr or outer_lr" if row["iteration"] else "lower init_scale or inner_lr"
            raise self._diverged(f"the weights are not finite after iteration {row['iteration']}: {remedy}")
        if self._due(trainer, self.test_every):
            row |= self._evaluated("test", trainer, module, self.test_curve_tasks)
        if validate:
            row |= self._evaluated("val", trainer, module, self.val_tasks)
            if self.probes:
                probed = self._probed(trainer, module).items()  # NaN: one query in a class has no other of its class
                row |= {f"probe/{name}": value for name, value in probed if not math.isnan(value)}
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=int(row["iteration"]))
        if validate:
            self._write(trainer, row, row[f"val{MODES[self.select]}/query_accuracy/step_{module.loop.inner_steps}"])

    def _evaluated(self, split: str, trainer: pl.Trainer, module: "MetaLearner", tasks: int) -> dict[str, float]:
        """The per-step accuracies under the names of metrics.csv and W&B."""
        results = module.evaluate(trainer.datamodule.fixed(split, tasks))
        start = "lower outer_lr" if trainer.global_step else "lower init_scale, or check dataset.mean and dataset.std"
        if what := diverged(results, module.loop.inner_steps, start):
            raise self._diverged(f"{split} at iteration {trainer.global_step}: {what}")
        return {
            f"{split}{MODES[mode]}/query_accuracy/step_{step}": accuracy
            for mode, scores in results.items()
            for step, accuracy in enumerate(scores.accuracy)
        }

    def _probed(self, trainer: pl.Trainer, module: "MetaLearner") -> dict[str, float]:
        precision, loop = trainer.precision_plugin, module.loop
        with precision.forward_context():
            tasks = map(precision.convert_input, trainer.datamodule.fixed("val", self.val_tasks, shared=False))
            return probes(module.network, tasks, inner_lr=loop.inner_lr, inner_steps=loop.inner_steps)

    def _write(self, trainer: pl.Trainer, row: dict[str, float], accuracy: float) -> None:
        better = accuracy > self.best_accuracy  # the earliest wins ties
        self.best_accuracy = max(self.best_accuracy, accuracy)
        self.stopped = self.stop_at_accuracy is not None and accuracy >= self.stop_at_accuracy
        trainer.should_stop = trainer.should_stop or self.stopped
        for name in ("best", "last") if better else ("last",):
            trainer.save_checkpoint(self._folder / "checkpoints" / f"{name}.ckpt")
        done, seconds = row["iteration"] - self._first, time.monotonic() - self._began
        left = f"  {seconds / done * (trainer.max_steps - row['iteration']) / 60:.1f} min left" if done else ""
        loss = f"  loss {row['train/loss']:.4f}" if "train/loss" in row else ""
        log.info(f"iteration {row['iteration']}/{trainer.max_steps}{loss}  validation accuracy {accuracy:.4f}{left}")

    def _trained(self, iteration: int) -> dict[str, float]:
        """Means of the training metrics since the last row."""
        columns = {name: torch.stack([row[name] for row in self.pending]).tolist() for name in self.pending[0]}
        first = iteration - len(self.pending) + 1
        self.pending.clear()
        for number, loss in enumerate(columns["loss"], first):
            if not math.isfinite(loss):
                raise self._diverged(f"train/loss={loss} at iteration {number}: lower inner_lr or outer_lr")
        return {f"train/{name}": sum(values) / len(values) for name, values in columns.items()}


class Measurement(pl.Callback):
    """What is measured after some outer updates, in a file of its own.

    What it holds is part of the checkpoint. It comes before Record, which writes checkpoints: so what a checkpoint
    holds is already in the file, and a run that goes on writes the same file.
    """

    file: str

    def __init__(self, every: int, content: dict[str, list]) -> None:
        self.every, self.content = every, content

    def state_dict(self) -> dict[str, Any]:
        return self.content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.content = state_dict

    def _add(self, trainer: pl.Trainer, measured: dict[str, list]) -> None:
        for name, value in {"updates": trainer.global_step, **measured}.items():
            self.content[name].append(value)
        if trainer.is_global_zero:
            write_file(Path(trainer.default_root_dir) / self.file, json.dumps(self.content))


class CosineSimilarity(Measurement):
    """How alike the classes of the one task are to the unadapted encoder, after outer updates 1, 1 + every, ...

    Needs training tasks of kind "one_task"; the classes stay in its own order, whatever labels training gives them.
    """

    file = "cosine_similarity.json"

    def __init__(self, *, every: int) -> None:
        super().__init__(every, {"updates": [], "query_support": [], "query_query": []})

    def on_train_batch_end(self, trainer: pl.Trainer, module: "MetaLearner", *args: Any) -> None:
        if (trainer.global_step - 1) % self.every:
            return
        precision = trainer.precision_plugin
        with precision.forward_context():
            task = precision.convert_input(trainer.datamodule.samplers["train"].one_task())
            matrices = class_similarities(module.network, task)
        self._add(trainer, matrices)


class InnerProducts(Measurement):
    """How the inner products eta phi(q).phi(s) of validation tasks are distributed, after 0, every, 2 every .. updates.

    From a zero head, by the squared error and in one step, they are the logits (docs/method.md 2.1), which the outer
    loss wants to be 1 within a class and 0 across.
    """

    file = "inner_products.json"

    def __init__(self, *, every: int) -> None:
        # What lies beyond is counted at the edge.
        super().__init__(every, {"between": [-1.0, 2.0], "updates": [], "same_class": [], "other_class": []})

    def on_train_start(self, trainer: pl.Trainer, module: "MetaLearner") -> None:
        if not self.content["updates"]:
            self._measure(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: "MetaLearner", *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._measure(trainer, module)

    @torch.no_grad()
    def _measure(self, trainer: pl.Trainer, module: "MetaLearner") -> None:
        precision, counts = trainer.precision_plugin, torch.zeros(2, BINS)
        for tasks in trainer.datamodule.fixed("val", TASKS, shared=False):
            with precision.forward_context():
                features = Features.of(module.network, precision.convert_input(tasks))
            products = module.loop.inner_lr * features.query @ features.support.mT  # in the head's precision
            for row, which in enumerate((features.same_class(), ~features.same_class())):
                inside = products[which].float().cpu().clamp(*self.content["between"])
                counts[row] += torch.histc(inside, BINS, *self.content["between"])
        same_class, other_class = counts.int().tolist()
        self._add(trainer, {"same_class": same_class, "other_class": other_class})


class Progress(pl.Callback):
    """A bar with loss, accuracy and time left, on a terminal; elsewhere the lines of Record say it."""

    def __init__(self) -> None:
        self._bar: rich.progress.Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, module: "MetaLearner") -> None:
        if not (sys.stdout.isatty() and trainer.is_global_zero) or _side_by_side():
            return
        columns = ("{task.description}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn())
        times = (rich.progress.TimeElapsedColumn(), rich.progress.TimeRemainingColumn(), "left ")
        self._bar = rich.progress.Progress(*columns, *times, "{task.fields[metrics]}")
        self._bar.add_task("training", total=trainer.max_steps, completed=trainer.global_step, metrics="")
        self._bar.start()
        for handler in logging.getLogger().handlers:  # log lines go above the bar, not through it
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stdout__:
                handler.setStream(sys.stdout)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: "MetaLearner", outputs: dict[str, Tensor], *args: Any
    ) -> None:
        if self._bar is None:
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:  # reading a loss waits for the device
            metrics = f"loss {outputs['loss'].item():.3f}  accuracy {outputs['query_accuracy'].item():.3f}"
            self._bar.update(self._bar.task_ids[0], metrics=metrics)
        self._bar.update(self._bar.task_ids[0], completed=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: "MetaLearner") -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: "MetaLearner", exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is None:
            return
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.__stdout__)
        self._bar.stop()
        self._bar = None


def _side_by_side() -> bool:
    """Whether other jobs of the sweep may write to the same terminal."""
    return HydraConfig.initialized() and not HydraConfig.get().launcher._target_.endswith("BasicLauncher")
