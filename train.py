"""Trains, validates, tests and reports: python train.py algo=somaml +zeroing=true

Composes, checks, seeds, instantiates, fits, tests, reports; decides nothing.
"""

import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fewshot.config.check import check, processes
from fewshot.config.command import how_to_go_on, one_line_errors
from fewshot.config.refusals import hydra_command, refuse
from fewshot.config.tree import given_overrides, settings
from fewshot.paths import at_home
from fewshot.processes import ranks
from fewshot.processes.signals import Signals
from fewshot.processes.surroundings import lenient, settle
from fewshot.sweep.hydra_callbacks import announce, nothing_left, record


@hydra_command
def main(cfg: DictConfig) -> float:
    lenient()
    folder = Path(HydraConfig.get().runtime.output_dir)
    job = folder if HydraConfig.get().mode == RunMode.MULTIRUN else None
    with one_line_errors(job, how_to_go_on), nothing_left(folder), ranks.locked(folder), Signals() as signals:
        overrides = given_overrides(HydraConfig.get())
        refuse(cfg, overrides)
        record(folder, cfg)
        announce(folder, cfg)
        return run(cfg, overrides, folder, signals)
    return 0.0  # a job of a sweep that failed: to a search, the worst there is


def run(cfg: DictConfig, overrides: list[str], folder: Path, signals: Signals) -> float:
    """One run in `folder`: new, continued from its last.ckpt, or, with fit=false, a test of a checkpoint.

    Returns the validation accuracy of the model that was tested, after inner_steps.
    """
    began = time.monotonic()
    # Torch and Lightning take seconds to import, and a mistake in the configuration should not have to wait for them.
    from hydra.utils import instantiate

    from fewshot.training.runtime import check_device, import_lightning, prepare

    if not (folder / "results.json").exists():  # which a machine without a GPU can show again
        check_device(cfg.trainer.accelerator, cfg.trainer.precision)
    import_lightning(cfg)
    from fewshot.data.meta_batches import MetaData
    from fewshot.results import record_files
    from fewshot.training import checkpoint
    from fewshot.training import run as run_files
    from fewshot.training.ddp import cluster
    from fewshot.training.meta_learner import MetaLearner
    from fewshot.training.stop import Listen, Stop
    from fewshot.training.wandb_run import finished_run

    start = checkpoint.find_start(cfg, overrides, folder)
    cfg = start.cfg
    check(cfg)
    if results := run_files.finished(folder, start):
        return record_files.validation_accuracy(results)
    if processes(cfg) > 1 and not ranks.launcher():
        ranks.start(__file__, overrides, folder, processes(cfg))
        return record_files.validation_accuracy(record_files.read(folder))
    precision = prepare(
        seed=cfg.seed, threads=cfg.threads, accelerator=cfg.trainer.accelerator, precision=cfg.trainer.precision
    )
    module = MetaLearner.from_config(cfg, start.engine)
    start.check_fits(module)
    data = MetaData.from_config(cfg)
    start.check_split(data.manifest)
    record_files.write_splits(folder, data.manifest)
    describe = start.describe(data.manifest)
    with finished_run():
        start_logger = instantiate(cfg.logger, _partial_=True) if cfg.logger else lambda **_: False
        trainer = instantiate(
            cfg.trainer,
            precision=precision,
            logger=start_logger(folder=folder, run_id=start.run_id, values=settings(cfg), rows=start.rows),
            callbacks=[Listen(signals), *instantiate(cfg.callbacks).values(), describe, Stop(signals)],
            plugins=[checkpoint.AtomicCheckpointIO(), cluster()],
            default_root_dir=folder,
        )
        ready = time.monotonic()
        if cfg.fit and not start.trained:
            trainer.fit(module, data, ckpt_path=start.path, weights_only=True)
        trained = time.monotonic()
        tested = folder / "checkpoints" / "best.ckpt" if cfg.fit else start.path
        trainer.test(module, data, ckpt_path=tested, weights_only=True, verbose=False)
        results = run_files.write(
            folder,
            module.results,
            iterations=trainer.global_step or start.iteration,
            best_iteration=checkpoint.read(tested)["global_step"],
            seconds={"start": ready - began, "train": trained - ready, "test": time.monotonic() - trained},
            config=settings(cfg),
            splits=data.manifest,
            loggers=trainer.loggers,
        )
    return record_files.validation_accuracy(results)


if __name__ == "__main__":
    settle()
    sys.argv[1:] = at_home(sys.argv[1:])
    main()
