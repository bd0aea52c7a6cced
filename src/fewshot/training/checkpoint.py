"""How a run is written down and goes on.

A checkpoint is Lightning's own, plus the entry "fewshot": the configuration of the run, the call that composed it and
the classes and images that it used.
"""

import os
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose
from hydra.errors import HydraException
from lightning_fabric.plugins import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from fewshot.config.check import check_overrides
from fewshot.config.moved import compared
from fewshot.config.stored import is_simple
from fewshot.config.tree import GROUPS, entries, leaves, settings
from fewshot.data.task import SPLITS
from fewshot.errors import UserError, shown, some
from fewshot.files import write_atomically
from fewshot.paths import checkpoint_file
from fewshot.training.checkpoint_file import read, refuse_unresumable

# Never taken from the checkpoint that is tested: where the test runs, in how many processes, and what may be read.
OF_THIS_CALL = (
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("dataset.trust", "dataset.other_split"),
)
# May differ between a run and its continuation: where things lie, where they are reported to, when it stops, what
# memory it takes.
FREE = (
    "checkpoint",
    "fit",
    "logger",
    "recompute_steps",
    "dataset.root",
    "dataset.cache",
    "dataset.labels",
    "dataset.largest_image",
    "dataset.source",
    "dataset.device",
    "dataset.origin",
    "dataset.other_split",
    "dataset.trust",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.profiler",
    "stop_at_accuracy",
    "callbacks.record.stop_at_accuracy",
    "iterations",
)
# Numbers that the YAML files gave otherwise at commit a43819a: a run that neither call names one for keeps its own.
CHANGED_DEFAULTS = ("algo.step_losses",)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, syncs it and renames it; reads without unpickling objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        content = read(path)  # to the CPU, whatever it was trained on; Lightning moves it where it belongs
        content["callbacks"].pop("Timer", None)  # trainer.max_time is of each call
        return content


class Describe(pl.Callback):
    """Puts what describes the run (configuration, call, logger run, splits) into every checkpoint."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["fewshot"] = self.description

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.training:
            refuse_unresumable(checkpoint, trainer, module)


@dataclass(frozen=True)
class Start:
    """From where a call goes on.

    cfg: the configuration that holds; overrides: the call that composes it; path, content: the checkpoint, if any.
    """

    cfg: DictConfig
    overrides: list[str]
    path: Path | None = None
    content: dict[str, Any] | None = None

    @property
    def iteration(self) -> int:
        """Outer updates done."""
        return self.content["global_step"] if self.content else 0

    @property
    def trained(self) -> bool:
        """Nothing is left to train: killed after the last update, or at the accuracy where this call would stop."""
        if self.content is None:
            return False
        target, reached = self.cfg.stop_at_accuracy, self.content["callbacks"]["Record"]["best_accuracy"]
        return self.iteration >= self.cfg.iterations or (target is not None and reached >= target)

    @property
    def engine(self) -> str:
        """A continued run keeps what engine=auto was when it began: another engine rounds differently."""
        return self._continued.get("engine", self.cfg.engine)

    @cached_property
    def run_id(self) -> str:
        """Of the logger: a continued run keeps it."""
        return self._continued["fewshot"]["run_id"] if self._continued else uuid.uuid4().hex[:8]

    @property
    def rows(self) -> list[dict[str, float]]:
        """Of metrics.csv, so far."""
        return self._continued["callbacks"]["Record"]["rows"] if self._continued else []

    @property
    def _continued(self) -> dict[str, Any]:
        """The checkpoint of the run that goes on; empty if none does."""
        return (self.content or {}) if self.cfg.fit else {}

    def describe(self, splits: dict[str, Any]) -> Describe:
        """What every checkpoint of this run is to carry; splits: the manifest of its images."""
        call = {"config": settings(self.cfg), "overrides": self.overrides, "run_id": self.run_id}
        return Describe({**call, "splits": splits})

    def check_fits(self, module: pl.LightningModule) -> None:
        """Raises UserError where the checkpoint is of another network or of other ways."""
        if self.content is not None:
            refuse_misfit(self.content["state_dict"], self.content["fewshot"]["config"], self.path, module)

    def check_split(self, splits: dict[str, Any]) -> None:
        """Raises UserError where the checkpoint was trained on other classes or images, unless a test asks for them."""
        trained = self.content["fewshot"].get("splits", splits) if self.content else splits
        if splits == trained or (not self.cfg.fit and self.cfg.dataset.other_split):
            return
        difference = "same classes, other images"
        for split in SPLITS:
            new, gone = (set(a[split]) - set(b[split]) for a, b in ((splits, trained), (trained, splits)))
            if new or gone:
                told = [f"{verb} {some(sorted(names))}" for verb, names in (("has", new), ("lacks", gone)) if names]
                difference = f"{split} {' and '.join(told)}"
                break
        remedy = "or start anew in another hydra.run.dir" if self.cfg.fit else "or add dataset.other_split=true"
        raise UserError(
            f"dataset={self.cfg.dataset.name}: not the split that {self.path} was trained with ({difference}); "
            f"use that one, {remedy}"
        )


def refuse_misfit(weights: dict[str, Tensor], trained: dict[str, Any], path: Path, module: nn.Module) -> None:
    """Raises UserError naming the first tensor in which the weights found at path are not those of the module, or NaN.

    trained: the configuration found beside them.
    """
    ours = module.state_dict()
    for name in sorted({*weights, *ours}, key=lambda name: ("head" not in name, name)):
        shapes = [_kind(state[name]) if name in state else "absent" for state in (weights, ours)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"checkpoint={path}: {name} is {shapes[0]} there and {shapes[1]} here; it was trained with "
                f"model={trained['model']['name']} ways={trained['ways']} dataset.size={trained['dataset']['size']} "
                f"algo.learned_inner_lr={shown(trained['algo'].get('learned_inner_lr', False))}"
            )
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"checkpoint={path}: has weights that are not finite numbers, with which nothing can be done")


def _kind(tensor: Tensor) -> str:
    """Its shape, and where it has no fractions its type; float32 and float64 are of one kind."""
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' of {tensor.dtype}'}"


def find_start(cfg: DictConfig, overrides: list[str], folder: Path) -> Start:
    """Decides between a new run, the continuation of an old one, and a test (fit=false).

    Args:
        overrides: of this call; with checkpoint=PATH they are taken on top of those the checkpoint was trained with.
        folder: of this run; if it holds checkpoints/last.ckpt the run continues.

    Raises:
        UserError: an unreadable checkpoint, one trained with another configuration than this call asks for, or one to
            test that would call what nothing else names.
    """
    if cfg.checkpoint is None:
        path = folder / "checkpoints" / "last.ckpt"
        if not path.exists():
            return Start(cfg, overrides)
        content = read(path)
    else:
        path = Path(os.path.abspath(checkpoint_file(cfg.checkpoint, "last" if cfg.fit else "best")))
        content = read(path)
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
        stored = [each for each in stored if not _is_of(own, _key(each)) and (cfg.fit or _key(each) != "trainer")]
        overrides = _merged(stored, asked)
        if not cfg.fit:
            _refuse_interpolations([each for each in overrides if each not in asked], path)
        cfg = _composed(overrides, path)
        if not cfg.fit:
            _refuse_unnamed(cfg, stored, asked, path)
    if cfg.fit:
        _keep_old_defaults(cfg, [*overrides, *content["fewshot"]["overrides"]], content["fewshot"]["config"])
        refuse_difference(cfg, content["fewshot"]["config"], path)
    return Start(cfg, overrides, path, content)


def _keep_old_defaults(cfg: DictConfig, calls: list[str], trained: dict[str, Any]) -> None:
    """Gives cfg the numbers of CHANGED_DEFAULTS that it was trained with, where no call names one and both have one.

    calls: the overrides of this call and of the one that began the run.
    """
    stored = dict(leaves(trained))
    for key in CHANGED_DEFAULTS:
        named = any(override.lstrip("+").startswith(f"{key}=") for override in calls)
        if not named and isinstance(OmegaConf.select(cfg, key), int) and isinstance(stored.get(key), int):
            OmegaConf.update(cfg, key, stored[key])


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0].strip()


def _is_of(keys: Iterable[str], key: str) -> bool:
    """Whether it is one of the keys, or of what is in one of them."""
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _composed(overrides: list[str], path: Path) -> DictConfig:
    """The configuration of a call, a part of which is stored at path; resolved: what is checked will be called."""
    try:
        cfg = compose("config", overrides)
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:  # whatever Hydra makes of it
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint={path}: its call and this one together are no configuration ({reason})") from None
    return cfg


def _check_call(stored: list[str], path: Path) -> None:
    """Raises UserError for a call in a checkpoint that no run here can have had, hydra.searchpath among others."""
    try:
        check_overrides(stored)
    except UserError as error:
        raise UserError(f"checkpoint={path}: its call has {str(error)[:300]}") from None
    if own := [each for each in stored if each.lstrip("+~").startswith("hydra")]:
        raise UserError(f"checkpoint={path}: its call has {own[0]}, which no run of this program writes there")


def _refuse_interpolations(stored: list[str], path: Path, most: int = 4) -> None:
    """Raises UserError where what is left of a checkpoint's call could make much of little, or read the environment."""
    made = [each for each in stored if "${" in each.replace("\\", "")]  # Hydra takes the one out of $\{
    refused = [each for each in made if not is_simple(each)] or made[most:]
    if refused:
        raise UserError(
            f"checkpoint={path}: its call has {shown(refused[0])}; a test takes at most {most} knobs from there that "
            f"refer to another, each to one; name {shown(refused[0].split('=')[0])} in this call too"
        )


def _refuse_unnamed(cfg: DictConfig, stored: list[str], asked: list[str], path: Path) -> None:
    """Raises UserError where cfg would call what no YAML file nor this call, but the checkpoint at path names.

    cfg: resolved; stored, asked: the checkpoint's call and this one.
    """
    groups = "|".join((*GROUPS, "experiment"))
    chosen = [each for each in stored if re.fullmatch(rf"({groups})=['\w/,. \[\]-]+", each) and ".." not in each]
    try:
        named = compose("config", _merged(chosen, asked))
        OmegaConf.resolve(named)
    except Exception as error:  # whatever a resolver makes of a knob that the checkpoint's call has and this has not
        reason = str(error).split("\n")[0]
        raise UserError(
            f"checkpoint={path}: give the knobs that your own YAML files need in this call too ({reason})"
        ) from None
    known = dict(entries(OmegaConf.to_container(named)))
    for key, value in entries(OmegaConf.to_container(cfg)):
        if _is_of(OF_THIS_CALL, key) and value != known.get(key):
            raise UserError(
                f"checkpoint={path}: its call sets {key}={shown(value)}, which is for this call alone to say"
            )
        if (key.rsplit(".", 1)[-1] == "_target_" and value != known.get(key)) or "${" in str(value):
            raise UserError(
                f"checkpoint={path}: its call sets {key}={shown(value)}, which a test would run; if you trust whoever "
                "wrote it, name it in this call too, with its group, as in model=module model.module={_target_: ...}"
            )


def _merged(trained: list[str], asked: list[str]) -> list[str]:
    """The last override of each key; where another member of a group is asked for, none that was for the first."""
    latest = {_key(override): override for override in trained}
    for override in asked:
        key = _key(override)
        group = key.split(".")[0]
        if group != key and latest.get(group) in (f"{group}=none", f"{group}=null"):
            del latest[group]  # a knob of what was left out in training, as logger.mode after logger=none
        if "." not in key and latest.get(key, override) != override:
            latest = {other: each for other, each in latest.items() if not other.startswith(f"{key}.")}
        latest[key] = override
    return list(latest.values())


def refuse_difference(cfg: DictConfig, trained: dict[str, Any], path: Path) -> None:
    """Raises UserError naming the first knob in which cfg differs from the configuration found at path."""
    asked, trained = (dict(leaf for leaf in leaves(each) if compared(*leaf)) for each in (settings(cfg), trained))
    for key in sorted({*asked, *trained}):
        if not _is_of(FREE, key) and asked.get(key) != trained.get(key):
            raise UserError(
                f"{key}={shown(asked.get(key))}: {path} was trained with {key}={shown(trained.get(key))}; "
                "continue with that, or start anew in another hydra.run.dir"
            )
    if asked["iterations"] < trained["iterations"]:
        raise UserError(
            f"iterations={asked['iterations']}: {path} was trained with iterations={trained['iterations']}; "
            "continue with as many or more"
        )
