"""The theory put to a trained model: python -m fewshot.evidence checkpoint=RUN, or an exported model in RUN's place."""

import argparse
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from fewshot.config.check import check, check_learn2learn, processes
from fewshot.config.command import Command, Parameter, one_line_errors, unquoted
from fewshot.config.hydra_call import hydra_command, nothing_left
from fewshot.config.tree import choices, given_overrides, key_of, settings, statistics
from fewshot.errors import UserError, shown
from fewshot.files import EXPORTED, EXPORTED_CONFIG, override
from fewshot.inner_loop import THEORY, InnerLoop
from fewshot.predict.find import find

log = logging.getLogger(__name__)

FEATURE_TASKS = 32  # the first of the test tasks, on which features and predictions are measured, in float64
GRADIENT_TASKS = 8  # the first of these, on which gradients are taken, again and again
MODEL = "checkpoint=RUN, the folder of a run, or an exported model's folder or name, as checkpoint=omniglot-5w1s-zero"

COMMAND = Command(
    "evidence",
    "puts the theory to a trained model, and trains nothing. Left out, a knob is as in training.",
    {
        "checkpoint=PATH": Parameter(
            "The folder of a run, whose best model is taken; a file, such as RUN/checkpoints/last.ckpt; the folder of "
            "an exported model; the name of one that comes with this program, such as omniglot-5w1s-zero; or "
            "hf://ORG/NAME."
        ),
        "dataset.root=PATH": Parameter("Where the images are, which an exported model does not say."),
        "hydra.run.dir=FOLDER": Parameter(
            "Writes report.html, evidence.json and the pictures into FOLDER/evidence/; left out: into RUN/evidence/, "
            "those of an exported model into a new folder in outputs/."
        ),
        "test_tasks=N": Parameter("Tasks of the test; features are measured on the first 32 of them."),
        "test_steps=N": Parameter("Inner steps of the test."),
        "dataset=NAME": Parameter("Another dataset of the same image size, with dataset.other_split=true."),
        "threads=N": Parameter("CPU threads."),
        "trainer=cpu": Parameter("Leaves a GPU alone."),
    },
    knobs=True,
)


def _settle(asked: argparse.Namespace) -> None:
    """Refuses what cannot be measured, and gives Hydra the words of the call as it takes them."""
    if asked.multirun:
        raise UserError("-m: one model is measured at a time; call it once for each checkpoint")
    if fit := [word for word in asked.overrides if word.startswith("fit=")]:
        raise UserError(f"{fit[0]}: nothing is trained here; leave it out")
    keys = [key_of(word) for word in asked.overrides]
    named = [word for word in asked.overrides if word.startswith("checkpoint=") and word != "checkpoint=null"]
    if not named:
        network = "; model= is the network here" * ("model" in keys)
        raise UserError(f"checkpoint=null: which model? Give {MODEL}{network}")
    check_learn2learn("evidence")
    path = find(unquoted(named[-1].partition("=")[2]), "checkpoint")
    if path.is_dir():
        path = path / EXPORTED
        place = sys.argv.index(named[-1])
        sys.argv[place] = override("checkpoint", os.path.abspath(path))
        sys.argv[place:place] = [] if "dataset" in keys else _dataset(path.with_name(EXPORTED_CONFIG))


def _dataset(path: Path) -> list[str]:
    """The override with an exported model's dataset, whose knobs, such as dataset.root, the call can then name."""
    from fewshot.config import stored  # pydantic takes a third of a second to import

    config = stored.read_yaml(path)
    stored.check(f"checkpoint={path}", config, stored.form({"dataset": stored.form({"name": stored.NAME})}))
    name = config["dataset"]["name"]
    return [f"dataset={name}"] if name in choices("dataset") else []


# Hydra is to write no log into the folder of the run that is measured.
@partial(hydra_command, first=_settle, command=COMMAND, added="hydra/job_logging=stdout")
def main(cfg: DictConfig) -> None:
    with one_line_errors():
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise UserError("hydra.mode=MULTIRUN: one model is measured at a time; call it once for each checkpoint")
        cfg.fit = False
        overrides = [*given_overrides(HydraConfig.get()), "fit=false"]
        folder = Path(HydraConfig.get().runtime.output_dir)
        with nothing_left(folder):
            run(cfg, overrides, folder / "evidence")


def run(cfg: DictConfig, overrides: list[str], folder: Path) -> None:
    """Measures the model of cfg.checkpoint; writes evidence.json, pictures and report.html into `folder`."""
    began = time.monotonic()
    # Torch and Lightning take seconds to import, and a mistake in the call should not have to wait for them.
    from fewshot.training.choose_engine import sequential_engine

    sequential_engine("evidence")  # it can be imported
    from fewshot.batched.execution import copied
    from fewshot.evidence import exported, report
    from fewshot.evidence.model import Model
    from fewshot.evidence.page import Shown
    from fewshot.results.record_files import versions
    from fewshot.training import checkpoint
    from fewshot.training.learner import inner_loop
    from fewshot.training.resume import find_start
    from fewshot.training.run import Run

    def read(path: Path) -> dict[str, Any]:
        return exported.content(path, overrides) if path.name == EXPORTED else checkpoint.read(path)

    start = find_start(cfg, overrides, folder, read)
    cfg = start.cfg
    check(cfg)
    if processes(cfg) > 1:
        raise UserError(f"trainer.devices={cfg.trainer.devices}: one process measures; add trainer=auto or trainer=cpu")
    if "task" not in (asked := statistics(cfg)):
        raise UserError(f"evaluation.statistics={shown(list(asked))}: evidence measures as models train; use task")
    loop = inner_loop(cfg)
    assert start.path is not None and start.content is not None  # _settle has asked for a checkpoint
    _refuse_beyond_theory(loop, start.path)
    measured = Run.build(start)
    initial, network = (copied(measured.learner.network).double() for _ in range(2))
    weights = start.content["state_dict"]
    network.load_state_dict({name.removeprefix("network."): w for name, w in weights.items()})
    measured.learner.load_state_dict(weights)
    measured.checkpoint = None  # the test is of the weights that the learner has now
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
