"""How a run ends between two outer updates: a signal, or trainer.max_time."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fewshot.paths import in_shell
from fewshot.processes.signals import Signals
from fewshot.training.ddp import max_over_ranks
from fewshot.training.record import Record

log = logging.getLogger(__name__)


class Listen(pl.Callback):
    """Takes SIGTERM back from Lightning, which would leave without a checkpoint. Comes before all other callbacks."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.install()

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.install()


class Stop(pl.Callback):
    """Obeys a signal between two outer updates, with last.ckpt written.

    Comes after all other callbacks: what is due after an update, such as validation, is done before the run ends.
    """

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.signals.training = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        noted = max_over_ranks(self.signals.noted or 0, module.device)  # on any of them
        if noted:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
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
            log.info(
                f"iteration {trainer.global_step}/{trainer.max_steps}  trainer.max_time is over; "
                f"python train.py {in_shell('checkpoint', last)} goes on"
            )
