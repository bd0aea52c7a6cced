"""The Weights & Biases run: offline unless an API key says otherwise, never a prompt."""

import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from pytorch_lightning.loggers import Logger, WandbLogger

from fewshot.config import UserError

log = logging.getLogger(__name__)

METRICS = ("train/*", "val/*", "val_zeroed/*", "test/*", "test_zeroed/*", "probe/*")


def wandb_logger(
    *,
    project: str,
    mode: str | None,
    group: str | None,
    name: str | None,
    folder: Path,
    run_id: str,
    values: dict[str, Any],
) -> WandbLogger:
    """Starts the run in `folder`/wandb with every metric against `iteration`; a continued run keeps its run_id.

    Raises:
        UserError: mode="online" without an API key.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        sweep = Path(HydraConfig.get().sweep.dir).resolve()
        by_time = re.fullmatch(r"\d\d-\d\d-\d\d", sweep.name)  # multirun/DATE/TIME
        group = group or (f"{sweep.parent.name}_{sweep.name}" if by_time else sweep.name)
        name = name or (folder.name if len(folder.name) <= 128 else folder.name[:119] + folder.name[-9:])  # W&B's limit
    mode = mode or os.environ.get("WANDB_MODE")
    try:
        if mode in (None, "online"):
            has_key = wandb.login(prompt=False, verify=False)
            if mode == "online" and not has_key:
                raise UserError("logger.mode=online: no API key; set WANDB_API_KEY or use logger.mode=offline")
            mode = "online" if has_key else "offline"
        run = wandb.init(
            project=project,
            group=group,
            name=name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=folder,
            mode=mode,
            config=values,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            reinit="finish_previous",
        )
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(f"logger.mode={mode}: {error}; use logger.mode=offline") from error
    logger = WandbLogger(experiment=run, save_dir=folder)
    run.define_metric("iteration", hidden=True)
    for pattern in METRICS:
        run.define_metric(pattern, step_metric="iteration")
    return logger


@contextmanager
def finished_run() -> Iterator[None]:
    """Finishes the W&B run, if one was started, as failed or not; an offline one says how to upload it."""
    failed = True
    try:
        yield
        failed = False
    finally:
        if wandb.run is not None:
            folder, offline = Path(wandb.run.dir).parent, wandb.run.settings.mode == "offline"
            wandb.finish(exit_code=int(failed))
            if offline:
                log.info(f"W&B run kept offline; to upload it: wandb sync {shlex.quote(str(folder))}")


def summarise(logger: Logger, results: dict[str, Any]) -> None:
    """The final test: a table and a line plot, and in the summary final_test/query_accuracy/step_K and the rest."""
    if not isinstance(logger, WandbLogger):
        return
    summary = {"best_iteration": results["best_iteration"], "iterations": results["iterations"]}
    rows = []
    for mode, suffix in (("zeroing_off", ""), ("zeroing_on", "_zeroed")):
        scores = results["test"][mode]
        for step, (accuracy, ci95) in enumerate(zip(scores["accuracy"], scores["ci95"], strict=True)):
            summary[f"final_test{suffix}/query_accuracy/step_{step}"] = accuracy
            rows.append([step, accuracy, ci95, mode.removeprefix("zeroing_")])
    table = wandb.Table(columns=["inner_step", "query_accuracy", "ci95", "test_zeroing"], data=rows)
    plot = wandb.plot.line(table, "inner_step", "query_accuracy", "test_zeroing", "query accuracy by inner step")
    logger.experiment.log({"query_accuracy_by_inner_step": plot})
    logger.experiment.summary.update(summary)
