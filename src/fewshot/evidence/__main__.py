"""The theory put to a trained model: python -m fewshot.evidence checkpoint=RUN

It trains nothing, and takes every knob of train.py but fit; those that the model was trained with hold if left out.
"""

import argparse
import copy
import logging
import sys
import time
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fewshot.config.check import check, processes
from fewshot.config.command import Command, Parameter, one_line_errors
from fewshot.config.refusals import hydra_command
from fewshot.config.tree import given_overrides, settings
from fewshot.errors import UserError

log = logging.getLogger(__name__)

FEATURE_TASKS = 32  # the first of the test tasks, on which features and predictions are measured, in float64
GRADIENT_TASKS = 8  # and those of them whose second-order gradients are taken, again and again


COMMAND = Command(
    "python -m fewshot.evidence",
    "puts the theory to a trained model, and trains nothing. Left out, a knob is as in training.",
    {
        "checkpoint=PATH": Parameter(
            "The folder of a run, whose best model is taken, or one file, such as RUN/checkpoints/last.ckpt."
        ),
        "hydra.run.dir=FOLDER": Parameter(
            "Writes report.html, evidence.json and the pictures into FOLDER/evidence/ instead of RUN/evidence/."
        ),
        "test_tasks=N": Parameter("Tasks of the test; the first 32 of them are measured."),
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
    if fit := [each for each in asked.overrides if each.startswith("fit=")]:
        raise UserError(f"{fit[0]}: nothing is trained here; leave it out")
    if not [each for each in asked.overrides if each.startswith("checkpoint=") and each != "checkpoint=null"]:
        raise UserError("checkpoint=null: which model? Give checkpoint=RUN, the folder of a run")


@partial(hydra_command, first=_refuse, command=COMMAND)
def main(cfg: DictConfig) -> None:
    with one_line_errors():
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise UserError("hydra.mode=MULTIRUN: one model is measured at a time; call it once for each checkpoint")
        cfg.fit = False
        overrides = [*given_overrides(HydraConfig.get()), "fit=false"]
        run(cfg, overrides, Path(HydraConfig.get().runtime.output_dir) / "evidence")


def run(cfg: DictConfig, overrides: list[str], folder: Path) -> None:
    """Measures the model of cfg.checkpoint and writes figures, evidence.json and report.html into `folder`."""
    began = time.monotonic()
    # Torch and Lightning take seconds to import, and a mistake in the call should not have to wait for them.
    from fewshot.data.task import Task
    from fewshot.evidence import write
    from fewshot.evidence.identities import identities, limits
    from fewshot.evidence.measures import measure
    from fewshot.training.resume import find_start
    from fewshot.training.run import Run

    start = find_start(cfg, overrides, folder)
    cfg = start.cfg
    check(cfg)
    if processes(cfg) > 1:
        raise UserError(f"trainer.devices={cfg.trainer.devices}: one process measures; add trainer=auto or trainer=cpu")
    if cfg.algo.head == "prototypes" or cfg.algo.adapted == "encoder" or cfg.algo.learned_inner_lr:
        raise UserError(f"checkpoint={start.path}: the theory is of a learned head that adapts with one inner_lr")
    measured = Run.build(start)
    initial, network = (copy.deepcopy(measured.learner.network).double() for _ in range(2))
    network.load_state_dict({name.removeprefix("network."): w for name, w in start.content["state_dict"].items()})
    tasks = measured.tasks.samplers["test"](0, min(FEATURE_TASKS, cfg.test_tasks))
    tasks = tasks._replace(support=tasks.support.double(), query=tasks.query.double())
    few, knobs = Task(*(field[:GRADIENT_TASKS] for field in tasks)), {"inner_lr": cfg.inner_lr}
    log.info(f"measuring the identities on {len(few.support)} tasks, the features on {len(tasks.support)}")
    steps = {"inner_steps": cfg.inner_steps, "steps": cfg.test_steps}
    found = {
        "identities": identities(network, few, **knobs, inner_steps=cfg.inner_steps),
        "limits": limits(network, few, **knobs, inner_steps=max(2, cfg.inner_steps)),
        **measure(network, tasks, initial=initial, **knobs, **steps, adapted=cfg.algo.adapted),
    }
    log.info(f"testing on {cfg.test_tasks} tasks")
    measured.test()
    write.write(
        folder,
        found,
        measured.learner.tested["test"],
        tasks,
        start=start,
        gradient_tasks=len(few.support),
        seconds=time.monotonic() - began,
        config=settings(cfg),
    )


if __name__ == "__main__":
    # Hydra is to write no log into the folder of the run that is measured. It takes overrides in one row.
    overrides = (place for place, given in enumerate(sys.argv) if place and "=" in given and not given.startswith("-"))
    first = next(overrides, len(sys.argv))
    sys.argv[first:first] = ["hydra/job_logging=stdout"]
    main()
