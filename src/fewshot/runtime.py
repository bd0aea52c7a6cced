"""The process: threads, seeds, warnings."""

import logging
import warnings

import pytorch_lightning as pl
import torch

from fewshot import ranks
from fewshot.errors import UserError

THREADS = torch.get_num_threads()  # torch's choice


def prepare(*, seed: int, threads: int | None, accelerator: str, precision: str) -> str:
    """Returns the precision that Lightning is to be told.

    Sets the number of CPU threads and whether a GPU may use TF32, seeds the initial weights, and silences advice that
    does not apply here, and all ranks but the first.

    Raises:
        UserError: a GPU, or what only a GPU has, is asked for where there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={accelerator}: there is no CUDA GPU here; use trainer=cpu")
    if precision == "tf32" and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise UserError("trainer.precision=tf32: only a CUDA GPU has it; use 32-true")
    ranks.follow_parent()
    if ranks.rank():
        logging.getLogger("fewshot").setLevel(logging.WARNING)
    # An earlier job of a sweep may have had another number.
    torch.set_num_threads(threads or max(1, THREADS // ranks.here()))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"  # torch lets cuDNN
    pl.seed_everything(seed, workers=True, verbose=False)
    # Lightning advises on data loaders, logging intervals and srun; tasks are drawn in memory.
    for name in ("pytorch_lightning", "lightning_fabric"):
        warnings.filterwarnings("ignore", module=name)
        logging.getLogger(name).setLevel(logging.WARNING)
    return "32-true" if precision == "tf32" else precision
