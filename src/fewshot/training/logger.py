"""Where a run's numbers go besides metrics.csv: W&B, or any logger of Lightning's or of one's own."""

import inspect
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from fewshot.config.tree import MODES, settings
from fewshot.errors import UserError, of_extra, reason_of
from fewshot.training import wandb_run
from fewshot.training.resume import Start


def logger_of(start: Start) -> Logger | bool | None:
    """The logger that the configuration names, told what a continued run has logged before.

    False where it names none. None on all ranks but the first where it is W&B's.

    Raises:
        UserError: it cannot be made, or is none of Lightning's kind.
    """
    config = start.cfg.logger
    if not config:
        return False
    if config._target_.startswith("fewshot."):
        logger = instantiate(config, _partial_=True)  # Hydra would read what follows as configurations
        return logger(folder=start.folder, run_id=start.run_id, values=settings(start.cfg), rows=start.rows)
    rows = start.rows
    try:
        takes = inspect.signature(get_class(config._target_)).parameters
        folder = {"save_dir": str(start.folder)} if "save_dir" in takes and "save_dir" not in config else {}
        logger = instantiate(config, **folder)
        if rows and _has_events(logger):  # it goes on after the checkpoint, and what was logged beyond does not count
            logger, rows = instantiate(config, **folder, purge_step=start.iteration + 1), []
        hasattr(logger, "experiment")  # which TensorBoard makes only now, and W&B
    except Exception as error:  # whatever the class and its arguments make of it
        reason, package = reason_of(error), config._target_.rsplit(".", 1)[-1]
        lacks = package == "TensorBoardLogger" and "tensorboard" in reason
        extra = f"; it needs {of_extra('tensorboard', 'tensorboard')}" * lacks
        raise UserError(f"logger._target_={config._target_}: cannot be made ({reason}){extra}") from None
    if not isinstance(logger, Logger):
        raise UserError(f"logger._target_={config._target_}: must be a pytorch_lightning.loggers.Logger")
    logger.log_hyperparams(settings(start.cfg))
    for row in rows:
        logger.log_metrics(row, step=int(row["iteration"]))
    return logger


def _has_events(logger: Any) -> bool:
    """Whether TensorBoard will find there what the run logged before."""
    return isinstance(logger, TensorBoardLogger) and any(Path(logger.log_dir).glob("events.out.tfevents.*"))


def log_results(logger: Logger, results: dict[str, Any]) -> None:
    """The final test as final_test/query_accuracy/step_K and final_test_zeroed/..., and a table of it in W&B."""
    summary = {"best_iteration": results["best_iteration"], "iterations": results["iterations"]}
    for mode, suffix in MODES.items():
        for step, accuracy in enumerate(results["test"][mode]["accuracy"]):
            summary[f"final_test{suffix}/query_accuracy/step_{step}"] = accuracy
    if isinstance(logger, WandbLogger):
        wandb_run.summarise(logger, summary, results)
    else:
        logger.log_metrics(summary, step=results["iterations"])
        logger.save()
