"""The theory put to a trained model: python -m fewshot.evidence checkpoint=RUN"""

import argparse
import copy
import logging
import time
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fewshot.config.check import check, check_learn2learn, processes
from fewshot.config.command import Command, Parameter, one_line_errors
from fewshot.config.hydra_call import hydra_command
from fewshot.config.tree import given_overrides, settings, statistics
from fewshot.errors import UserError, shown
from fewshot.inner_loop import THEORY, InnerLoop

log = logging.getLogger(__name__)

FEATURE_TASKS = 32  # the first of the test tasks, on which features and predictions are measured, in float64
GRADIENT_TASKS = 8  # and those of them whose second-order gradients are taken, again and again


COMMAND = Command(
    "evidence",
    "puts the theory to a trained model, and trains nothing. Left out, a knob is as in training.",
    {
        "checkpoint=PATH": Parameter(
            "The folder of a run, whose best model is taken, or one file, such as RUN/checkpoints/last.ckpt."
        ),
        "hydra.run.dir=FOLDER": Parameter(
            "Writes report.html, evidence.json and the pictures into FOLDER/evidence/ instead of RUN/evidence/."
        ),
        "test_tasks=N": Parameter("Tasks of the test; features are measured on the first 32 of them."),
        "test_steps=N": Parameter("Inner steps of the test."),
        "dataset=NAME": Parameter("Another dataset of the same image size, with dataset.other_split=true."),
        "threads=N": Parameter("CPU threads."),
        "trainer=cpu": Parameter("Leaves a GPU alone."),
    },
    knobs=True,
)


def _refuse(asked: argparse.Namespace) -> None:
    if asked.multirun:
        raise UserError("-m: one model is measured at a time; call it once for each checkpoint")
    if fit := [word for word in asked.overrides if word.startswith("fit=")]:
        raise UserError(f"{fit[0]}: nothing is trained here; leave it out")
    if not [word for word in asked.overrides if word.startswith("checkpoint=") and word != "checkpoint=null"]:
        raise UserError("checkpoint=null: which model? Give checkpoint=RUN, the folder of a run")
    check_learn2learn("evidence")


# Hydra is to write no log into the folder of the run that is measured.
@partial(hydra_command, first=_refuse, command=COMMAND, added="hydra/job_logging=stdout")
def main(cfg: DictConfig) -> None:
    with one_line_errors():
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise UserError("hydra.mode=MULTIRUN: one model is measured at a time; call it once for each checkpoint")
        cfg.fit = False
        overrides = [*given_overrides(HydraConfig.get()), "fit=false"]
        run(cfg, overrides, Path(HydraConfig.get().runtime.output_dir) / "evidence")


def run(cfg: DictConfig, overrides: list[str], folder: Path) -> None:
    """Measures the model of cfg.checkpoint; writes evidence.json, pictures and report.html into `folder`."""
    began = time.monotonic()
    # Torch and Lightning take seconds to import, and a mistake in the call should not have to wait for them.
    from fewshot.training.choose_engine import sequential_engine

    sequential_engine("evidence")  # it can be imported
    from fewshot.evidence import report
    from fewshot.evidence.model import Model
    from fewshot.evidence.page import Shown
    from fewshot.results.record_files import versions
    from fewshot.training.resume import find_start
    from fewshot.training.run import Run
    from fewshot.training.runtime import inner_loop

    start = find_start(cfg, overrides, folder)
    cfg = start.cfg
    check(cfg)
    if processes(cfg) > 1:
        raise UserError(f"trainer.devices={cfg.trainer.devices}: one process measures; add trainer=auto or trainer=cpu")
    if "task" not in (asked := statistics(cfg)):
        raise UserError(f"evaluation.statistics={shown(list(asked))}: evidence measures as models train; use task")
    loop = inner_loop(cfg)
    assert start.path is not None and start.content is not None  # _refuse has asked for a checkpoint
    _refuse_beyond_theory(loop, start.path)
    measured = Run.build(start)
    initial, network = (copy.deepcopy(measured.learner.network).double() for _ in range(2))
    network.load_state_dict({name.removeprefix("network."): w for name, w in start.content["state_dict"].items()})
    tasks = measured.tasks.samplers["test"](0, min(FEATURE_TASKS, cfg.test_tasks))
    tasks = tasks._replace(support=tasks.support.double(), query=tasks.query.double())
    log.info(f"testing on {cfg.test_tasks} tasks")
    measured.test()
    few = min(GRADIENT_TASKS, len(tasks.support))
    log.info(f"measuring the identities on {few} tasks, the features on {len(tasks.support)}")
    tested = measured.learner.evaluation.tested["task"]["test"]
    model = Model(network, initial, loop, cfg.test_steps, tasks, few, tested)
    evidence = {
        **report.measure(model),
        "tasks": {"features": len(tasks.support), "gradients": few},
        "model": {
            "checkpoint": str(start.path),
            "iteration": start.iteration,
            "trained_with": start.content["fewshot"]["config"],
        },
        "seconds": round(time.monotonic() - began, 2),
        "config": settings(cfg),
        "versions": versions(),
    }
    report.write(folder, evidence, Shown.first_of(tasks, evidence["config"]["dataset"]))
    checks = evidence["identities"].values()
    print(f"{sum(check['pass'] for check in checks)} of {len(checks)} identities hold. Read {folder / 'report.html'}")


def _refuse_beyond_theory(loop: InnerLoop, path: Path) -> None:
    if loop.beyond_theory:
        raise UserError(f"checkpoint={path}: the theory covers {THEORY}; this model has {loop.beyond_theory}")


if __name__ == "__main__":
    main()
