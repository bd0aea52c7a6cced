"""The process: threads, seeds, warnings."""

import logging
import warnings

import pytorch_lightning as pl
import torch


def prepare(*, seed: int, threads: int | None) -> None:
    """Sets the number of CPU threads, seeds the initial weights, and silences advice that does not apply here."""
    if threads is not None:
        torch.set_num_threads(threads)
    pl.seed_everything(seed, workers=True, verbose=False)
    # Lightning advises on data loaders and logging intervals; tasks are drawn in memory.
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
