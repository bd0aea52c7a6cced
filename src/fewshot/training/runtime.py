"""What comes before anything is trained: imports, threads and seeds."""

import logging
import os
import random
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from fewshot.errors import UserError
from fewshot.processes import ranks

THREADS = torch.get_num_threads()  # torch's choice
# Metrics that nothing here computes need these; Lightning imports torchmetrics, and that imports them all at once.
FOR_OTHER_METRICS = ("matplotlib", "scipy", "torchvision")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # Lightning sets it for +trainer.deterministic
OURS = ("fewshot.", "pytorch_lightning.", "kornia.", "torch.", "torchvision.")


def import_lightning(cfg: DictConfig, folder: Path) -> None:
    """Imports Lightning without FOR_OTHER_METRICS, which torchmetrics would import, too: that halves the time.

    Nothing is hidden where the configuration names a class of the user's own, or where a checkpoint may, for that class
    may compute one of these metrics. In a sweep the first job decides for all that follow in its process.

    Raises:
        UserError: the device that is asked for is not there, unless the folder has results, which any machine can show.
    """
    if not (folder / "results.json").exists():
        check_device(cfg.trainer.accelerator, cfg.trainer.precision)
    called = re.findall(r"_target_: (?!null)(\S+)", OmegaConf.to_yaml(cfg))
    own = cfg.checkpoint is not None or not all(name.startswith(OURS) for name in called)
    with not_found(*(() if own else FOR_OTHER_METRICS)):
        import_module("pytorch_lightning")


@contextmanager
def not_found(*packages: str) -> Iterator[None]:
    """Inside, these packages are as if they were not installed, except for those that were imported before."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.meta_path[:] = [_Without(finder, hidden) for finder in sys.meta_path]
    try:
        yield
    finally:
        sys.meta_path[:] = [one.finder if isinstance(one, _Without) else one for one in sys.meta_path]


class _Without:
    """Finds modules and the versions of packages as another finder does, except for those that are hidden."""

    def __init__(self, finder: Any, hidden: list[str]) -> None:
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in self.hidden else self.finder.find_spec(name, path, target)

    def find_distributions(self, context: Any) -> Any:
        find = getattr(self.finder, "find_distributions", lambda context: ())
        return () if context.name in self.hidden else find(context)


@contextmanager
def torch_kept() -> Iterator[None]:
    """Afterwards all that `prepare` and Lightning set for the whole process is as it was before.

    That is random states, CPU threads, TF32, and what +trainer.deterministic and +trainer.benchmark say; and whether
    attention takes the path that has no derivative, which the batched engine turns off.
    """
    threads, gpus = torch.get_num_threads(), range(torch.cuda.device_count())
    cudnn: Any = torch.backends.cudnn
    matmul, workspace = torch.backends.cuda.matmul, os.environ.get(WORKSPACE)
    flags = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    states, fast = (random.getstate(), np.random.get_state()), torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fast)
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = flags
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        os.environ.pop(WORKSPACE, None)
        os.environ |= {} if workspace is None else {WORKSPACE: workspace}


def check_device(accelerator: str, precision: str) -> None:
    """Raises UserError where a GPU, or what only a GPU has, is asked for and there is none."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={accelerator}: there is no CUDA GPU here; use trainer=cpu")
    if precision == "tf32" and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise UserError("trainer.precision=tf32: only a CUDA GPU has it; use 32-true")


def prepare(*, seed: int, threads: int | None, accelerator: str, precision: str) -> str:
    """Returns the precision that Lightning is to be told.

    Sets the number of CPU threads and whether a GPU may use TF32, seeds the initial weights, and silences advice that
    does not apply here, and all ranks but the first.

    Raises:
        UserError: as check_device does.
    """
    import pytorch_lightning as pl

    check_device(accelerator, precision)
    ranks.follow_parent()
    if ranks.rank():
        logging.getLogger("fewshot").setLevel(logging.WARNING)
    # An earlier job of a sweep may have had another number.
    torch.set_num_threads(threads or max(1, THREADS // ranks.local_world_size()))
    # Of these torch's default is True for cuDNN.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    pl.seed_everything(seed, workers=True, verbose=False)
    # Lightning advises on data loaders, logging intervals and srun; tasks are drawn in memory.
    for name in ("pytorch_lightning", "lightning_fabric"):
        warnings.filterwarnings("ignore", module=name)
        logging.getLogger(name).setLevel(logging.WARNING)
    return "32-true" if precision == "tf32" else precision
