"""How a run goes on: from its last.ckpt, or from a checkpoint that is named, and when it must not."""

import os
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from fewshot.config.check import check_overrides
from fewshot.config.stored import compared, is_simple
from fewshot.config.tree import GROUPS, OF_TRAINING, entries, key_of, leaves, settings
from fewshot.data.meta_batches import TaskDataModule
from fewshot.data.task import SPLITS
from fewshot.errors import UserError, first_few, first_line, one_line, shown
from fewshot.files import checkpoint_file
from fewshot.training.checkpoint import read, refuse_misfit
from fewshot.training.checkpoint_io import Describe

# Never taken from the checkpoint that is tested: where the test runs, in how many processes, and what may be read.
OF_THIS_CALL = (
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("dataset.trust", "dataset.other_split"),
)
# May differ between a run and its continuation: where things lie and are reported to, when it stops, its memory.
PLACES = ("name", "root", "mini_root", "cache", "archive", "labels", "largest_image", "source", "device", "origin")
PLACES += ("other_split", "trust")
FREE = (
    *("checkpoint", "fit", "logger", "figures", "recompute_steps", "iterations", "save_minutes", "calibration"),
    *("stop_at_accuracy", "callbacks.record.stop_at_accuracy"),
    *(f"dataset.{knob}" for knob in PLACES),
    *("trainer.max_steps", "trainer.max_time", "trainer.profiler", "trainer.strategy.timeout"),
)
# Their defaults were other numbers at commit a43819a: where no call names one, a run of that time keeps its own.
CHANGED_DEFAULTS = ("algo.step_losses",)
REFERRING = 4  # knobs of a checkpoint's call that may refer to another knob, where it is tested


@dataclass(frozen=True)
class Start:
    """Where a call begins: anew, or from a checkpoint.

    cfg: the configuration that holds; overrides: the call that composes it; folder: where the call writes.
    path, content: the checkpoint, if there is one.
    """

    cfg: DictConfig
    overrides: list[str]
    folder: Path
    path: Path | None = None
    content: dict[str, Any] | None = None

    @property
    def iteration(self) -> int:
        """Outer updates done."""
        return self.content["global_step"] if self.content else 0

    @property
    def recorded(self) -> dict[str, Any]:
        """What training/record.py's Record has put into the checkpoint."""
        assert self.content is not None
        return self.content["callbacks"]["Record"]

    @property
    def trained(self) -> bool:
        """Whether nothing is left to train: all updates are done, or the accuracy where this call stops is reached."""
        if self.content is None:
            return False
        target, reached = self.cfg.stop_at_accuracy, self.recorded["best_accuracy"]
        return self.iteration >= self.cfg.iterations or (target is not None and reached >= target)

    @property
    def continues(self) -> bool:
        """Whether this call goes on with a run; a new run and a test do not."""
        return self.cfg.fit and self.content is not None

    @property
    def engine(self) -> str:
        """A continued run keeps what engine=auto was when it began: another engine rounds differently."""
        return (self.content or {}).get("engine", self.cfg.engine) if self.continues else self.cfg.engine

    @cached_property
    def run_id(self) -> str:
        """The run's id for the logger, which a continued run keeps."""
        return self.content["fewshot"]["run_id"] if self.continues and self.content else uuid.uuid4().hex[:8]

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows of metrics.csv so far."""
        return self.recorded["rows"] if self.continues else []

    def describe(self, splits: dict[str, Any]) -> Describe:
        """What every checkpoint of this run is to carry; splits: the manifest of its images."""
        call = {"config": settings(self.cfg), "overrides": self.overrides, "run_id": self.run_id}
        return Describe({**call, "splits": splits})

    def restore(self, learner: nn.Module, tasks: TaskDataModule) -> Path | None:
        """The checkpoint that the trainer has to load, after it was seen to fit; None for a new run.

        Raises:
            UserError: it is of another network or of other ways, or was trained on other classes or images, unless a
                test asks for them.
        """
        if self.content is None:
            return None
        trained = self.content["fewshot"]
        refuse_misfit(f"checkpoint={self.path}", self.content["state_dict"], trained["config"], learner)
        if self.cfg.fit or not self.cfg.dataset.other_split:
            self._refuse_other_split(tasks.manifest, trained.get("splits", tasks.manifest))
        return self.path

    def _refuse_other_split(self, splits: dict[str, Any], trained: dict[str, Any]) -> None:
        if splits | trained == splits:
            return
        named = [split for split in SPLITS if split in trained]  # an exported model has the SHA-256 alone
        difference = "same classes, other images" if named else "other classes or images"
        for split in named:
            new, gone = (set(a[split]) - set(b[split]) for a, b in ((splits, trained), (trained, splits)))
            if new or gone:
                both = (("has", new), ("lacks", gone))
                words = [f"{verb} {first_few(sorted(names))}" for verb, names in both if names]
                difference = f"{split} {' and '.join(words)}"
                break
        remedy = "or start anew in another hydra.run.dir" if self.cfg.fit else "or add dataset.other_split=true"
        raise UserError(
            f"dataset={self.cfg.dataset.name}: not the split that {self.path} was trained with ({difference}); "
            f"use that one, {remedy}"
        )


def find_start(
    cfg: DictConfig, overrides: list[str], folder: Path, read_test: Callable[[Path], dict[str, Any]] = read
) -> Start:
    """Decides between a new run, the continuation of an old one, and a test (fit=false).

    Args:
        overrides: of this call; with checkpoint=PATH they are taken on top of those the checkpoint was trained with.
        folder: of this run; if it holds checkpoints/last.ckpt the run continues.
        read_test: reads the checkpoint that is tested, or what stands for one.

    Raises:
        UserError: an unreadable checkpoint, one trained with another configuration than this call asks for, or one to
            test whose configuration calls something that neither a YAML file nor this command names.
    """
    if cfg.checkpoint is None:
        path = folder / "checkpoints" / "last.ckpt"
        if not path.exists():
            return Start(cfg, overrides, folder)
        content = read(path)
    else:
        path = Path(os.path.abspath(checkpoint_file(cfg.checkpoint, "last" if cfg.fit else "best")))
        content = read(path) if cfg.fit else read_test(path)
        if cfg.fit and path.parent != Path(os.path.abspath(folder)) / "checkpoints":
            raise UserError(
                f"checkpoint={path}: training goes on only in the folder of its run, RUN/checkpoints/last.ckpt, not in "
                f"{folder}; drop hydra.run.dir, or add fit=false to test it"
            )
        if not cfg.fit and (folder / "checkpoints" / "last.ckpt").exists():
            raise UserError(f"hydra.run.dir={folder}: holds a training run; name another folder for the test")
        asked, stored = overrides, content["fewshot"]["overrides"]
        _check_call(stored, path)
        own = ("dataset.trust",) if cfg.fit else OF_THIS_CALL
        stored = [word for word in stored if not _is_of(own, key_of(word)) and (cfg.fit or key_of(word) != "trainer")]
        overrides = _merged(stored, asked)
        if not cfg.fit:
            overrides = [word for word in overrides if word in asked or not word.startswith(OF_TRAINING)]
            _refuse_interpolations([word for word in overrides if word not in asked], path)
        cfg = _composed(overrides, path)
        if not cfg.fit:
            _refuse_unnamed(cfg, stored, asked, path)
    if cfg.fit:
        _keep_old_defaults(cfg, [*overrides, *content["fewshot"]["overrides"]], content["fewshot"]["config"])
        refuse_difference(cfg, content["fewshot"]["config"], path)
    return Start(cfg, overrides, folder, path, content)


def _keep_old_defaults(cfg: DictConfig, calls: list[str], trained: dict[str, Any]) -> None:
    """Gives cfg the numbers of CHANGED_DEFAULTS that it was trained with, where no call names one and both have one.

    calls: the overrides of this call and of the one that began the run.
    """
    stored = dict(leaves(trained))
    for key in CHANGED_DEFAULTS:
        named = any(key_of(override) == key for override in calls)
        if not named and isinstance(OmegaConf.select(cfg, key), int) and isinstance(stored.get(key), int):
            OmegaConf.update(cfg, key, stored[key])


def _is_of(keys: Iterable[str], key: str) -> bool:
    """Whether the key is one of the keys, or below one of them."""
    return any(f"{key}.".startswith(f"{part}.") for part in keys)


def _composed(overrides: list[str], path: Path) -> DictConfig:
    """The configuration of a call, in part the checkpoint's; resolved, so that what is checked is what is used."""
    try:
        cfg = compose("config", overrides)
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:  # whatever Hydra makes of it
        reason = one_line(error)[:300]
        raise UserError(f"checkpoint={path}: its call and this one together are no configuration ({reason})") from None
    return cfg


def _check_call(stored: list[str], path: Path) -> None:
    """Raises UserError for a call in a checkpoint that no run here can have had, hydra.searchpath among others."""
    try:
        check_overrides(stored)
    except UserError as error:
        raise UserError(f"checkpoint={path}: its call has {str(error)[:300]}") from None
    if own := [override for override in stored if key_of(override).startswith("hydra")]:
        raise UserError(f"checkpoint={path}: its call has {own[0]}, which no run of this program writes there")


def _refuse_interpolations(stored: list[str], path: Path) -> None:
    """Raises UserError where what is left of a checkpoint's call could make much of little, or read the environment."""
    made = [word for word in stored if "${" in word.replace("\\", "")]  # Hydra takes the backslash out of $\{
    refused = [word for word in made if not is_simple(word)] or made[REFERRING:]
    if refused:
        raise UserError(
            f"checkpoint={path}: its call has {shown(refused[0])}; a test takes at most {REFERRING} knobs from there "
            f"that refer to another, each to one; name {refused[0].partition('=')[0]} in this call too"
        )


def _refuse_unnamed(cfg: DictConfig, stored: list[str], asked: list[str], path: Path) -> None:
    """Raises UserError where a checkpoint's configuration calls what neither a YAML file nor this call names.

    cfg: resolved; stored, asked: the checkpoint's call and this one.
    """
    groups = "|".join((*GROUPS, "experiment"))
    chosen = [word for word in stored if re.fullmatch(rf"({groups})=['\w/,. \[\]-]+", word) and ".." not in word]
    try:
        named = compose("config", _merged(chosen, asked))
        OmegaConf.resolve(named)
    except Exception as error:  # whatever a resolver makes of a knob that the checkpoint's call has and this has not
        raise UserError(
            f"checkpoint={path}: give the knobs that your own YAML files need in this call too ({first_line(error)})"
        ) from None
    known = dict(entries(OmegaConf.to_container(named)))
    for key, value in entries(OmegaConf.to_container(cfg)):
        if _is_of(OF_THIS_CALL, key) and value != known.get(key):
            raise UserError(
                f"checkpoint={path}: its call sets {key}={shown(value)}, which is for this call alone to say"
            )
        called = key.rsplit(".", 1)[-1] == "_target_" and key != "optimizer._target_"  # which a test does not make
        if (called and value != known.get(key)) or "${" in str(value):
            raise UserError(
                f"checkpoint={path}: its call sets {key}={shown(value)}, which a test would run; if you trust whoever "
                "wrote it, name it in this call too, with its group, as in model=module model.module={_target_: ...}"
            )


def _merged(trained: list[str], asked: list[str]) -> list[str]:
    """The last override of each key.

    When a group gets another choice, earlier overrides inside that group are dropped.
    """
    latest = {key_of(override): override for override in trained}
    for override in asked:
        key = key_of(override)
        group = key.split(".")[0]
        if group != key and latest.get(group) in (f"{group}=none", f"{group}=null"):
            del latest[group]  # a knob of what was left out in training, as logger.mode after logger=none
        if "." not in key and latest.get(key, override) != override:
            latest = {other: word for other, word in latest.items() if not other.startswith(f"{key}.")}
        latest[key] = override
    return list(latest.values())


def refuse_difference(cfg: DictConfig, trained: dict[str, Any], path: Path) -> None:
    """Raises UserError for the first knob in which cfg differs from the configuration that is stored at path."""
    asked, trained = (dict(leaf for leaf in leaves(one) if compared(*leaf)) for one in (settings(cfg), trained))
    for key in sorted({*asked, *trained}):
        if not _is_of(FREE, key) and asked.get(key) != trained.get(key):
            raise UserError(
                f"{key}={shown(asked.get(key))}: {path} was trained with {key}={shown(trained.get(key))}; "
                "continue with that, or start anew in another hydra.run.dir"
            )
    if asked["schedule"] == "cosine" and asked["iterations"] != trained["iterations"]:
        raise UserError(
            f"iterations={asked['iterations']}: {path} was trained with schedule=cosine, which ends at its "
            f"iterations={trained['iterations']}; continue with that, or start anew in another hydra.run.dir"
        )
    if asked["iterations"] < trained["iterations"]:
        raise UserError(
            f"iterations={asked['iterations']}: {path} was trained with iterations={trained['iterations']}; "
            "continue with as many or more"
        )
