"""The zeroing trick (docs/method.md, section 2.6)."""

from typing import Any

import pytorch_lightning as pl

from fewshot.models.head import zero_head


class ZeroHead(pl.Callback):
    """The zeroing trick: w <- 0 before the loop and after every outer update, before anything else sees the model."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled

    def on_train_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        if self.enabled:
            zero_head(module.network.head)

    on_train_batch_end = on_train_start  # pyright: ignore[reportAssignmentType]
