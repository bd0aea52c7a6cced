"""The progress bar."""

import logging
import sys
from typing import Any

import pytorch_lightning as pl
import rich.progress
from hydra.core.hydra_config import HydraConfig
from torch import Tensor


def _side_by_side() -> bool:
    """Whether other jobs of the sweep may write to the same terminal."""
    return HydraConfig.initialized() and not HydraConfig.get().launcher._target_.endswith("BasicLauncher")


class Progress(pl.Callback):
    """A bar with loss, accuracy and time left, on a terminal; elsewhere the lines of Record say it."""

    def __init__(self) -> None:
        self._bar: rich.progress.Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
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
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: dict[str, Tensor], *args: Any
    ) -> None:
        if self._bar is None:
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:  # reading a loss waits for the device
            metrics = f"loss {outputs['loss'].item():.3f}  accuracy {outputs['query_accuracy'].item():.3f}"
            self._bar.update(self._bar.task_ids[0], metrics=metrics)
        self._bar.update(self._bar.task_ids[0], completed=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is None:
            return
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.__stdout__)
        self._bar.stop()
        self._bar = None
