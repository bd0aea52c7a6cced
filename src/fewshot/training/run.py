"""One run, from a checked configuration to its results; evidence builds and tests the same."""

# pyright: reportAttributeAccessIssue=false
# Lightning gives its Trainer attributes (datamodule, callbacks) where pyright does not see it.

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import callbacks as lightning

from fewshot.config.tree import settings
from fewshot.data.meta_batches import TaskDataModule
from fewshot.errors import UserError, reason_of
from fewshot.files import in_shell
from fewshot.processes import ranks
from fewshot.processes.signals import Signals
from fewshot.processes.surroundings import as_called, give_memory_back
from fewshot.results import record_files, task_scores
from fewshot.sweep.settings import tested_model
from fewshot.training.checkpoint import read
from fewshot.training.checkpoint_io import AtomicCheckpointIO
from fewshot.training.ddp import cluster, max_over_ranks
from fewshot.training.logger import log_results, logger_of
from fewshot.training.meta_learner import MetaLearner
from fewshot.training.record import Progress, Record
from fewshot.training.resume import Start, refuse_difference
from fewshot.training.runtime import prepare
from fewshot.training.zero_head import ZeroHead

log = logging.getLogger(__name__)

NOT_HERE = {  # callbacks of Lightning's that could not do here what they say, and what does it instead
    lightning.EarlyStopping: "no metric is given to it; stop_at_accuracy and +trainer.max_time end a training",
    lightning.ModelCheckpoint: "checkpoints/ has best.ckpt and last.ckpt without it; save_minutes says how often",
    lightning.WeightAveraging: "validation, which chooses best.ckpt, would be of other weights than are written there",
    lightning.StochasticWeightAveraging: "the test is of best.ckpt, which the averaged weights would not reach",
    lightning.GradientAccumulationScheduler: "meta_batch_size says how many tasks an outer update has",
    lightning.BatchSizeFinder: "meta_batch_size says how many tasks an outer update has",
    lightning.LearningRateFinder: "outer_lr is a knob, and a sweep or experiment=search tries its values",
}
TO_A_LOGGER = (lightning.LearningRateMonitor, lightning.DeviceStatsMonitor, lightning.ThroughputMonitor)
LATER = ("recompute_steps", "save_minutes", "figures", "trained")  # older results lack these, which change no number


@dataclass
class Run:
    """Tasks, learner and trainer of one call.

    checkpoint: what the trainer loads before it trains or tests; None for a new run.
    """

    start: Start
    tasks: TaskDataModule
    learner: MetaLearner
    trainer: pl.Trainer
    checkpoint: Path | None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(cls, start: Start, signals: Signals | None = None, began: float | None = None) -> "Run":
        """Seeds, reads the images, makes the network.

        Args:
            signals: end the training between two updates; None: a model is only measured, and nothing is recorded.
            began: when the call did, by time.monotonic().

        Raises:
            UserError: the checkpoint does not fit, or whatever is wrong with the files, the network or the logger.
        """
        cfg, began = start.cfg, time.monotonic() if began is None else began
        accelerator, precision = cfg.trainer.accelerator, cfg.trainer.precision
        precision = prepare(seed=cfg.seed, threads=cfg.threads, accelerator=accelerator, precision=precision)
        learner = MetaLearner.from_config(cfg, start.engine)
        tasks = TaskDataModule.from_config(cfg)
        checkpoint = start.restore(learner, tasks)
        logger, callbacks = False, []
        if signals is not None:
            own = in_order(_callback(name, config, cfg.logger) for name, config in cfg.callbacks.items())
            if cfg.fit:
                learner.configure_optimizers()  # one that cannot be made is refused before anything is written
            callbacks = [Listen(signals), *own, start.describe(tasks.manifest), Stop(signals, cfg.save_minutes)]
            logger = logger_of(start)
            record_files.write_splits(start.folder, tasks.manifest)
        trainer = instantiate(
            cfg.trainer,
            precision=precision,
            logger=logger,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(), cluster()],
            default_root_dir=start.folder,
        )
        return cls(start, tasks, learner, trainer, checkpoint, {"start": time.monotonic() - began, "train": 0.0})

    def fit(self) -> "Run":
        """Trains what is left to train; with fit=false that is nothing."""
        if self.start.cfg.fit:
            if not self.start.trained:
                began = time.monotonic()
                self.trainer.fit(self.learner, self.tasks, ckpt_path=self.checkpoint, weights_only=True)
                self.seconds["train"] = time.monotonic() - began
            self.checkpoint = self.start.folder / "checkpoints" / "best.ckpt"
        return self

    def test(self) -> "Run":
        """Evaluates the best model, or the one that the call names, on the fixed validation and test tasks."""
        began = time.monotonic()
        self.trainer.test(self.learner, self.tasks, ckpt_path=self.checkpoint, weights_only=True, verbose=False)
        self.seconds["test"] = time.monotonic() - began
        return self

    def write(self) -> dict[str, Any]:
        """Leaves tasks.csv.gz, results.json, the figures, the logger's summary and the table on the terminal.

        Returns what results.json holds.
        """
        give_memory_back()  # before figures are drawn, and torch's libraries are read once more at the process's end
        results = record_files.content(
            self.learner.evaluation.results,
            iterations=self.trainer.global_step or self.start.iteration,
            best_iteration=read(self.checkpoint)["global_step"],  # pyright: ignore[reportArgumentType]
            seconds=self.seconds,
            config=_recorded(self.start),
            splits=self.tasks.manifest,
        )
        if not ranks.rank():
            from fewshot.results import figures  # matplotlib takes seconds to import

            figures.write(self.start.folder, results)
            task_scores.write_tasks(self.start.folder, self.learner.evaluation.tested)
            record_files.write(self.start.folder, results)
            for logger in self.trainer.loggers:
                log_results(logger, results)
            record_files.show(results, self.start.folder)
        return results


def _callback(name: str, config: DictConfig, logger: DictConfig | None) -> pl.Callback:
    asked = f"callbacks.{name}._target_={config._target_}"
    try:
        callback = instantiate(config)
    except Exception as error:  # whatever the class and its arguments make of it
        raise UserError(f"{asked}: cannot be made ({reason_of(error)})") from None
    if not isinstance(callback, pl.Callback):
        raise UserError(f"{asked}: must be a pytorch_lightning.Callback")
    for kind, why in NOT_HERE.items():
        if isinstance(callback, kind):
            raise UserError(f"{asked}: has no place in these runs; {why}")
    if isinstance(callback, TO_A_LOGGER) and not logger:
        raise UserError(f"{asked}: writes to the logger, and there is none; use logger=csv, tensorboard or wandb")
    return callback


def in_order(callbacks: Iterable[pl.Callback]) -> list[pl.Callback]:
    """Puts callbacks in order: the one that zeroes the head first, last those that record the model and move the bar.

    The order of the YAML files does not matter. So nothing sees a head that is still to be zeroed, and a checkpoint
    holds what every callback has done by then.
    """

    def place(callback: pl.Callback) -> int:
        return next((place for kind, place in places.items() if isinstance(callback, kind)), 1)

    places = {ZeroHead: 0, Record: 2, Progress: 3}
    return sorted(callbacks, key=place)


def finished(start: Start) -> dict[str, Any] | None:
    """Shows the results of this very configuration again if the folder holds them; None if it does not.

    None also for a run that a limit ended before its last iteration: it goes on.

    Raises:
        UserError: they are of another configuration.
    """
    path = start.folder / "results.json"
    if not path.exists():
        return None
    results, asked = record_files.read(start.folder), _recorded(start)
    if results["config"]["fit"] and asked["fit"]:
        refuse_difference(start.cfg, results["config"], path)
        reached = results["iterations"] if start.content else results["config"]["iterations"]
        if reached < asked["iterations"] and not start.trained:
            return None
    elif results["config"] | {key: asked.get(key) for key in LATER} != asked:
        raise UserError(f"hydra.run.dir={start.folder}: holds the results of another call; name another folder")
    record_files.show(results, start.folder)
    record_files.tell_result(results)
    return results


def _recorded(start: Start) -> dict[str, Any]:
    """The configuration that results.json has; that of a test also says what was tested."""
    config = settings(start.cfg)
    if not start.cfg.fit and start.content and start.path:
        config["trained"] = tested_model(start.content["fewshot"]["config"], config, start.path.name)
    return config


class Listen(pl.Callback):
    """Takes SIGTERM back from Lightning, which would leave without a checkpoint. Comes before all other callbacks."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.install()

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.install()


class Stop(pl.Callback):
    """Obeys a signal between two outer updates, with last.ckpt written, which it also writes every save_minutes.

    Comes after all other callbacks: what is due after an update, such as validation, is done before the run ends.
    """

    def __init__(self, signals: Signals, save_minutes: float | None) -> None:
        self.signals, self.save_minutes, self._saved = signals, save_minutes, time.monotonic()

    def on_save_checkpoint(self, *args: Any) -> None:
        self._saved = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.training, self._saved = True, time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        due = self.save_minutes is not None and time.monotonic() - self._saved >= 60 * self.save_minutes
        word = max_over_ranks(2 * (self.signals.noted or 0) + due, module.device)  # on any of them, in one message
        if word:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
        if noted := word // 2:
            log.info(f"iteration {trainer.global_step}/{trainer.max_steps}  last.ckpt written")
            self.signals.obey(noted)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.signals.training = False

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.training = False
        if noted := max_over_ranks(self.signals.noted or 0, module.device):  # after the last update
            self.signals.obey(noted)
        if trainer.global_step < trainer.max_steps and not any(
            isinstance(callback, Record) and callback.stopped for callback in trainer.callbacks
        ):
            last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
            trainer.save_checkpoint(last)
            timers = [callback for callback in trainer.callbacks if isinstance(callback, lightning.Timer)]
            timed = any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)
            why = "trainer.max_time is over" if timed else "a callback ended the training"
            log.info(
                f"iteration {trainer.global_step}/{trainer.max_steps}  {why}; "
                f"{as_called('train')} {in_shell('checkpoint', last)} goes on"
            )
