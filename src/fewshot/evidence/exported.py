"""An exported model in a checkpoint's place: what its folder says, in the form that a checkpoint has.

A checkpoint holds the call that trained it. For an exported model a call is made that has its settings: the YAML files
of its dataset, network and algorithm, and the knobs in which it differs from them.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewshot.config import stored
from fewshot.config.kinds import integer, text
from fewshot.config.python_call import written
from fewshot.config.tree import CONF, choices, entries, key_of
from fewshot.errors import UserError, one_line, shown
from fewshot.predict.pretrained import read_folder

log = logging.getLogger(__name__)

TRAINED = stored.form({"iteration?": integer(0), "splits?": text("64 hexadecimal digits", "[0-9a-f]{64}")})
FOLLOWING = ("dataset.name", "dataset.origin", "model.name")  # from the YAML files and from dataset.root


def content(path: Path, asked: list[str]) -> dict[str, Any]:
    """What a test needs of a checkpoint, as training.checkpoint.read has it; global_step is None where it is not known.

    path: the model.safetensors of the folder; asked: the overrides of this call.

    Raises:
        UserError: the folder cannot be read, or its dataset or network is none of this program's and none is asked for.
    """
    where = f"checkpoint={path}"
    config, weights, trained = read_folder(path.parent, "checkpoint")
    stored.check_config(where, config)
    stored.check(f"{where}: what it says of its training", trained, TRAINED)
    for key, value in entries(config):
        if "${" in str(value):
            raise UserError(f"{where}: {key}={shown(value)}: a shared configuration has plain values only")
    call = call_of(config, asked, where)
    if any(weight.dtype == torch.float64 for weight in weights.values()):
        call.append("trainer.precision=64-true")
    run = {"config": config, "overrides": call}
    if "splits" in trained:
        run["splits"] = {"sha256": trained["splits"]}
    else:
        log.warning(f"{where}: does not say which classes and images it was trained on, so these are not compared")
    return {"state_dict": weights, "global_step": trained.get("iteration"), "fewshot": run}


def call_of(config: dict[str, Any], asked: list[str], where: str) -> list[str]:
    """The overrides of a call that has these settings.

    where: how the line of an error begins.
    """
    own = "fractions" in config["dataset"]  # named after a folder, which may be called like a dataset
    call = [
        _group("dataset", config["dataset"]["name"], asked, where, "dataset=folder dataset.root=PATH", own),
        _group("model", config["model"]["name"], asked, where, "model=module model.module={_target_: ...}"),
        *_algorithm(config["algo"].get("_target_")),
    ]
    for resolved in (False, True):  # at last the knobs that refer to others, where that gives another value
        try:
            base: Any = OmegaConf.to_container(compose("config", call), resolve=resolved)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(f"{where}: its settings are no configuration ({one_line(error)[:300]})") from None
        call += [f"{key}={written(key, value)}" for key, value in _differences(config, base)]
    return call


def _group(group: str, name: str, asked: list[str], where: str, remedy: str, own: bool = False) -> str:
    """The YAML file of this name, or else, and for images of one's own, the one that is asked for."""
    if name in choices(group) and not own:
        return f"{group}={name}"
    named = next((word for word in asked if key_of(word) == group), None)
    if named is None:
        raise UserError(f"{where}: was trained with {group}={shown(name)}, which has no YAML file here; add {remedy}")
    return named


def _algorithm(target: str | None) -> list[str]:
    """The YAML file of the algorithm that is this class."""
    for name in choices("algo") if target else ():
        if OmegaConf.select(OmegaConf.load(CONF / "algo" / f"{name}.yaml"), "algo._target_") == target:
            return [f"algo={name}"]
    return []


def _differences(config: dict[str, Any], base: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The knobs that have another value in config than in base, where it follows from no other knob."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in FOLLOWING:
            continue
        if key not in base:
            if prefix == "algo.":
                yield f"+{name}", value
        elif isinstance(value, dict) and isinstance(base[key], dict):
            yield from _differences(value, base[key], f"{name}.")
        elif value != base[key] and "${" not in str(base[key]):
            yield name, value
