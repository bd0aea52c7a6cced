"""The test tasks of a dataset as a trained model takes them, and its accuracies on them.

Shapes: K ways, T inner steps of the test, M images of C channels.
"""

from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fewshot.across.settings import Setting
from fewshot.batched import engine as batched
from fewshot.batched.execution import copied
from fewshot.config.tree import MODES
from fewshot.data.meta_batches import MetaBatches, fixed_tasks, images_device, manifest
from fewshot.data.sampler import TaskSampler
from fewshot.data.splits import splits_of
from fewshot.data.task import Split
from fewshot.errors import UserError
from fewshot.files import EXPORTED
from fewshot.inner_loop import InnerLoop
from fewshot.predict import pretrained
from fewshot.predict.adapted import with_ways
from fewshot.predict.find import find
from fewshot.predict.pretrained import Pretrained
from fewshot.results.record_files import Scores, diverged
from fewshot.sweep.settings import tested_model
from fewshot.training.checkpoint import read
from fewshot.training.choose_engine import batched_engine


@dataclass(frozen=True)
class Row:
    """A dataset with one number of ways and shots.

    images: as in Setting. left_out: the reason for what was not measured; "" for nothing.
    tested: {mode: (tasks, T + 1)}; config: what results.json has of it; splits: the manifest of the images.
    """

    dataset: str
    images: str
    ways: int
    shots: int
    left_out: str = ""
    tested: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """E.g. "omniglot-5w1s"."""
        return f"{self.dataset}-{self.ways}w{self.shots}s"

    @property
    def scores(self) -> dict[str, Scores]:
        return {mode: Scores.of(accuracies) for mode, accuracies in self.tested.items()}


def possible_modes(loop: InnerLoop, rows: int, zero: bool, ways: int) -> tuple[tuple[str, ...], str]:
    """The modes of the test in which a model can be tested with so many ways, and why not in the others.

    rows: how many its head has; zero: whether they are all zero.
    """
    if ways == rows:
        return tuple(MODES), ""
    if loop.learned_inner_lr:
        return (), f"the model has learned an inner_lr for each of its {rows} ways, and takes no others"
    if loop.adapted == "encoder":
        return (), f"the model does not adapt its head, which has a row for each of {rows} ways, and takes no others"
    if zero or loop.head != "learned":
        return tuple(MODES), ""
    return ("zeroing_on",), f"the head has learned rows for {rows} ways; with others it is tested from zero alone"


def load(model: str | Path, trust: bool) -> tuple[Pretrained, dict[str, Any], str]:
    """A model, all that is known of the configuration that it was trained with, and the name of its file."""
    loaded, path = pretrained.load(model, trust=trust), find(model)
    if path.is_dir():
        return loaded, loaded.config, EXPORTED
    return loaded, read(path, "model")["fewshot"]["config"], path.name


class Tester:
    """Tests a model on whatever dataset. stored: all that it was trained with; file: the name of its file."""

    def __init__(self, model: Pretrained, stored: dict[str, Any], file: str) -> None:
        self.model, self.stored, self.file = model, stored, file
        self._read = cache(self._read_images)
        learner = model.learner
        self._zero = not learner.loop.makes_head and not any(w.any() for w in learner.network.head.parameters())

    def images(self, setting: Setting) -> dict[str, Split] | str:
        """The splits of its dataset; or why they have too few classes or images for it.

        Raises:
            UserError: they cannot be read.
        """
        try:
            return self._read(OmegaConf.to_yaml(setting.cfg.dataset.source, resolve=True))
        except UserError as error:
            if not str(error).startswith(("ways=", "shots+queries=")):
                raise
            return str(error)

    def _read_images(self, source: str) -> dict[str, Split]:
        splits = splits_of(OmegaConf.create(source))
        channels = self.model.preprocess.channels
        return {  # grey to colour without a copy; colour to grey is the source's
            name: replace(split, images=split.images.expand(-1, channels, -1, -1)) for name, split in splits.items()
        }

    def row(self, setting: Setting) -> Row:
        """Measures it, as far as the model and the dataset allow.

        Raises:
            UserError: the model's logits are not finite, or the images cannot be read.
        """
        cfg, data, splits = setting.cfg, setting.cfg.dataset, self.images(setting)
        row = Row(data.name, setting.images, cfg.ways, cfg.shots)
        modes, why = possible_modes(self.model.learner.loop, self.model.config["ways"], self._zero, cfg.ways)
        if isinstance(splits, str) or not modes:
            return replace(row, left_out=splits if isinstance(splits, str) else why)
        try:
            sampler = fixed_tasks(cfg, splits["test"], "test")
        except ValueError as error:
            return replace(row, left_out=str(error))
        row = replace(row, left_out=why, tested=self._accuracies(cfg, sampler, modes))
        if what := diverged(row.scores, cfg.inner_steps, "the images are not as in training"):
            raise UserError(f"{data.name} {cfg.ways}-way {cfg.shots}-shot: {what}")
        resolved: Any = OmegaConf.to_container(data, resolve=True)
        plain = {key: value for key, value in resolved.items() if key != "source"}
        knobs = {knob: cfg[knob] for knob in ("ways", "shots", "queries", "test_tasks", "test_steps")}
        config = self.stored | knobs | {"fit": False, "dataset": plain}
        config["evaluation"] = {"statistics": cfg.evaluation.statistics}
        config["trained"] = tested_model(self.stored, config, self.file)
        return replace(row, config=config, splits=manifest(splits))

    @torch.enable_grad()
    def _accuracies(self, cfg: DictConfig, sampler: TaskSampler, modes: tuple[str, ...]) -> dict[str, Tensor]:
        """{mode: (tasks, T + 1)}, as training/meta_learner.py evaluates; by the batched engine on any device."""
        one = self._zero or len(modes) == 1 or self.model.learner.loop.distance is not None  # both modes are the same
        learner = copied(with_ways(self.model.learner, cfg.ways, zeroing=one))
        zeroed = (True,) if one else (False, True)
        evaluations = [learner.loop.evaluation(cfg.test_steps, zeroing) for zeroing in zeroed]
        device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        sampler.to(device, images_device("auto", device, sampler.split.images.nbytes, free))
        network, dtype, chunks = learner.to(device).network, next(learner.parameters()).dtype, []
        together = partial(batched.default_tasks_at_once, network, cfg.tasks_at_once)
        engine = replace(batched_engine(), tasks_at_once=together)
        knobs = {"tasks_at_once": cfg.tasks_at_once, "statistics": (cfg.evaluation.statistics,)}
        measure = partial(engine.step_accuracies, eta=tuple(learner.etas), **knobs)
        size = cfg.tasks_at_once or cfg.meta_batch_size
        for tasks in MetaBatches(sampler, size=size, stride=size, stop=cfg.test_tasks, start=lambda: 0):
            tasks = tasks._replace(support=tasks.support.to(dtype), query=tasks.query.to(dtype))
            with engine.one_line_out_of_memory(tasks):
                chunks.append(measure(network, tasks, evaluations).cpu())
        both = torch.cat(chunks, dim=1).expand(-1, -1, cfg.test_steps + 1)  # a prototypical network takes no step
        return {mode: both[0 if mode == "zeroing_off" else -1] for mode in modes}
