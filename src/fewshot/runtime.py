"""The process: threads, seeds, warnings."""

import logging
import warnings

import pytorch_lightning as pl
import torch

from fewshot.config import UserError


def prepare(*, seed: int, threads: int | None, accelerator: str) -> None:
    """Sets the number of CPU threads, seeds the initial weights, and silences advice that does not apply here.

    Raises:
        UserError: a GPU is asked for where there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={accelerator}: there is no CUDA GPU here; use trainer=cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    pl.seed_everything(seed, workers=True, verbose=False)
    # Lightning advises on data loaders and logging intervals; tasks are drawn in memory.
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
