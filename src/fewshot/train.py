"""Trains, validates, tests and reports: python train.py algo=somaml +zeroing=true, likewise python -m fewshot.train"""

import time
from pathlib import Path

from omegaconf import DictConfig

from fewshot.config.check import check, processes
from fewshot.config.output_folder import calling
from fewshot.config.refusals import hydra_command
from fewshot.processes import ranks
from fewshot.processes.signals import Signals
from fewshot.results.record_files import announce, read, validation_accuracy


@hydra_command
def main(cfg: DictConfig) -> float:
    with calling(cfg) as (overrides, folder, signals):  # mistakes in one line, the folder's lock, signals
        announce(folder, cfg)
        return run(cfg, overrides, folder, signals)
    return 0.0  # a job of a sweep that failed: to a search, the worst there is


def run(cfg: DictConfig, overrides: list[str], folder: Path, signals: Signals) -> float:
    """Returns the validation accuracy of the model that was tested, after inner_steps."""
    began = time.monotonic()
    from fewshot.training.runtime import import_lightning  # torch takes seconds, for which no mistake has to wait

    import_lightning(cfg, folder)
    from fewshot.training.resume import find_start
    from fewshot.training.run import Run, finished
    from fewshot.training.wandb_run import finished_run

    start = find_start(cfg, overrides, folder)  # a new run, one that goes on, or the test of a checkpoint
    check(start.cfg)
    if results := finished(start):  # and shown again
        return validation_accuracy(results)
    if processes(start.cfg) > 1 and not ranks.launcher():
        ranks.start("fewshot.train", overrides, folder, processes(start.cfg))  # this program, once for each
        return validation_accuracy(read(folder))
    with finished_run():
        built = Run.build(start, signals, began)  # tasks, learner and trainer; evidence builds the same
        if start.cfg.fit:
            built.fit()
        return built.test().write()


if __name__ == "__main__":
    main()
