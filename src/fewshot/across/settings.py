"""What a test on many datasets asks for: which datasets, and for each what a test of the model there is called with.

This file needs no torch.
"""

import copy
import re
from itertools import product
from typing import Any, NamedTuple

from omegaconf import DictConfig, open_dict

from fewshot.config.advice import configuration
from fewshot.config.check import check_files, check_knobs, processes
from fewshot.config.tree import STATISTICS, choices, key_of, statistics
from fewshot.errors import UserError, shown
from fewshot.files import override, user_path

# The knobs of training that a call may name: none of them makes another model, or other tasks than a test would have.
OF_THE_CALL = ("test_tasks", "test_steps", "queries", "evaluation.statistics", "tasks_at_once", "threads", "trainer")
OF_THE_CALL += ("dataset.cache", "figures.format")
# Of the dataset that the model was trained on, these are as they were then: they say which classes are in which split.
OF_THE_SPLIT = ("split", "split_seed", "rotations", "resample", "fractions", "labels", "tasks")
OF_THE_SPLIT += ("subset", "image_column", "label_column")


class Place(NamedTuple):
    """A dataset as a call names it, NAME or NAME:ROOT."""

    name: str
    root: str | None

    @property
    def overrides(self) -> list[str]:
        return [f"dataset={self.name}"] + ([override("dataset.root", self.root)] if self.root else [])


def places(text: str) -> list[Place]:
    """The datasets in "omniglot,cifarfs:PATH,folder:PATH"; a path may have commas, but not before such a name.

    Raises:
        UserError: there is no dataset of a name.
    """
    known = choices("dataset")
    words = re.split(rf",(?=(?:{'|'.join(known)})(?:[:,]|$))", text)
    for word in words:
        if word.partition(":")[0] not in known:
            raise UserError(f"datasets={text}: {word!r} must be NAME or NAME:ROOT, with NAME one of {', '.join(known)}")
    named = [word.partition(":") for word in words]
    return [Place(name, str(user_path("dataset.root", root)) if root else None) for name, _, root in named]


class Setting(NamedTuple):
    """A dataset with one number of ways and shots. images: how they become the network's, in words."""

    cfg: DictConfig
    images: str


def settings(place: Place, model: dict[str, Any], knobs: list[str], ways: list[int], shots: list[int]) -> list[Setting]:
    """The settings of a model's tests on this dataset: the dataset's YAML, adjusted to the network's images.

    model: the configuration that it was trained with.

    Raises:
        UserError: a knob that is not of this call, or whatever is wrong with one.
    """
    for knob in knobs:
        if not any(f"{key_of(knob)}.".startswith(f"{key}.") for key in OF_THE_CALL):
            raise UserError(f"{knob}: with datasets= only {', '.join(OF_THE_CALL)} may be given; leave it out")
    steps, tasks = model.get("test_steps", model["inner_steps"]), model.get("test_tasks", 600)
    own = [f"queries={model['queries']}", f"inner_steps={model['inner_steps']}", f"test_steps={steps}"]
    own += [f"test_tasks={tasks}", f"evaluation.statistics={statistics(model)[0]}"]
    own += [f"dataset.size={model['dataset']['size']}"]
    latest = {key_of(word): word for word in [*place.overrides, *own, *knobs]}
    cfg = configuration(list(latest.values()))
    data, trained = cfg.dataset, model["dataset"]
    words = {1: "grey", 3: "colour"}
    images = "to " * (data.channels != trained["channels"]) + words[trained["channels"]]
    with open_dict(cfg):
        for key in OF_THE_SPLIT if data.name == trained["name"] else ():
            if key in trained and key in data:
                data[key] = trained[key]
        if "channels" in data.source:
            data.channels = trained["channels"]
        data.mean, data.std = trained["mean"], trained["std"]
    check_files(cfg)
    if processes(cfg) > 1:
        raise UserError(f"trainer.devices={cfg.trainer.devices}: one process tests many datasets; leave it out")
    if (precision := cfg.trainer.precision) != "32-true":
        words = "with datasets= a model computes in the precision of its weights; leave it out"
        raise UserError(f"trainer.precision={precision}: {words}")
    if cfg.evaluation.statistics not in STATISTICS:
        words = f"with datasets= it must be one of {', '.join(STATISTICS)}"
        raise UserError(f"evaluation.statistics={shown(cfg.evaluation.statistics)}: {words}")
    if cfg.test_steps < cfg.inner_steps:
        raise UserError(f"test_steps={cfg.test_steps}: must be at least inner_steps={cfg.inner_steps}")
    made = []
    for cfg.ways, cfg.shots in product(ways, shots):
        check_knobs(cfg)
        made.append(Setting(copy.deepcopy(cfg), images))
    return made
