"""Where the YAML files lie, the functions that they call as ${name:...}, and a composed configuration as plain data."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from fewshot.files import EXPORTED, run_folder, user_path

# Beside this file in a wheel, at the top of a checkout.
CONF = next(path for path in (Path(__file__).parents[1] / "conf", Path(__file__).parents[3] / "conf") if path.is_dir())
GROUPS = ("algo", "model", "dataset", "augment", "optimizer", "trainer", "logger", "callbacks")

# The test adapts the head as it was trained, and a copy that was zeroed: each mode's name in results.json, and what the
# names of its metrics add.
MODES = {"zeroing_off": "", "zeroing_on": "_zeroed"}

# Whose statistics BatchNorm takes for the queries of an evaluation and of a prediction; norms.py says how.
STATISTICS = ("task", "support", "each")


def statistics(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The values of evaluation.statistics, of which the first chooses best.ckpt. A shared model has the default."""
    asked = config.get("evaluation", {}).get("statistics", STATISTICS[0])
    return (asked,) if isinstance(asked, str) else tuple(asked)


def choices(group: str) -> list[str]:
    """The names of a group's YAML files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def given_overrides(hydra: Any) -> list[str]:
    """The overrides of this call as they were written: test_every=${val_every} is no interpolation there."""
    words: Any = OmegaConf.to_container(hydra.overrides.task)
    return words


def key_of(override: str) -> str:
    """The dotted key of KEY=VALUE, +KEY=VALUE or ~KEY."""
    return override.lstrip("+~").split("=", 1)[0].strip()


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain data, with +zeroing in algo.zeroing: this is recorded and compared."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain["algo"]["zeroing"] = plain.pop("zeroing", plain["algo"]["zeroing"])
    return plain


# No part of a model: what only training needs, and where things lie on the machine that trained.
NOT_THE_MODEL = (
    *("trainer", "logger", "callbacks", "checkpoint", "fit", "figures"),
    *("augment", "optimizer", "schedule", "milestones", "clip_norm", "select", "save_minutes", "evaluation"),
    "calibration",
    *(f"dataset.{key}" for key in ("root", "mini_root", "labels", "cache", "archive", "source", "device", "trust")),
)
# A user's own callbacks are made for training; a test has them only where its own call names them.
OF_TRAINING = ("+callbacks.", "++callbacks.")


def portable(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The part of a run's settings that belongs to its model and may be shown to others."""
    return {
        key: portable(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if prefix + key not in NOT_THE_MODEL and (key != "_target_" or value is not None)
    }


def leaves(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted.key, value); a list is a value."""
    pairs = []
    for key, value in config.items():
        pairs += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def entries(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts, lists and tuples; a `_target_` that is one of them is a value too."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        nested = isinstance(value, dict | list | tuple)
        if not nested or key == "_target_":
            yield f"{prefix}{key}", value
        if nested:
            yield from entries(value, f"{prefix}{key}.")


def folder_of_run(checkpoint: str | None, fit: bool) -> Path | None:
    """RUN, for training that goes on from RUN or RUN/checkpoints/x.ckpt; None: it writes in a new folder.

    An exported model's folder is to stay as it is.
    """
    path = user_path("checkpoint", checkpoint) if checkpoint and fit else None
    return None if path is None or path.name == EXPORTED else run_folder(path)


def _run_folder(checkpoint: str | None, fit: bool, new: str) -> str:
    return str(folder_of_run(checkpoint, fit) or new)


def job_folder(overrides: list[str] | ListConfig) -> str:
    """A job's folder in a sweep: a pure function of its overrides, in any order; safe in a path and in checkpoint=."""
    words: Any = OmegaConf.to_container(overrides) if isinstance(overrides, ListConfig) else overrides
    pairs = {key_of(override): override.partition("=")[2] for override in words}
    exact = [f"{key}-{value}" for key, value in sorted(pairs.items())]
    name = re.sub("[^A-Za-z0-9._-]+", "-", "__".join(exact))
    if name != "__".join(exact) or name.count("__") >= max(1, len(pairs)) or len(name) > 150:
        name = f"{name[:150]}-{hashlib.sha256(repr(exact).encode()).hexdigest()[:8]}"
    return name or "defaults"


def _job_number(number: int | None) -> str:
    """What the log lines of a sweep's job begin with, since two jobs may run side by side."""
    return "" if number is None else f"#{number} "


def _folder_name(root: Any) -> str:
    """The name of a dataset in a folder or zip: that of the folder or zip, with - for what no name may have."""
    path = "" if root is None else os.path.abspath(os.path.expanduser(str(root)))
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(path).removesuffix(".zip"))[:100]
    return name.encode()[:170].decode(errors="ignore").strip("-.") or "folder"  # a file's name has 255 bytes at most


RESOLVERS = {
    "folder_name": _folder_name,
    "at_least": max,
    "rotated": lambda yes, classes: 4 * classes if yes else classes,  # dataset.rotations: each class in four directions
    "run_folder": _run_folder,
    "job_folder": job_folder,
    "job_number": _job_number,
}
for _name, _resolver in RESOLVERS.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)
