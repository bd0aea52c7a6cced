"""Composes a call, and says in one line what to do where Hydra cannot; what is advised is not refused in its turn."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict

from fewshot.config.check import ADDED, check, check_overrides, knobs
from fewshot.config.help import files
from fewshot.config.tree import CONF, GROUPS, key_of
from fewshot.errors import UserError, first_line, nearest, of_extra, one_line

Composed = Callable[[list[str]], DictConfig]  # makes a configuration of a call's overrides

PLUGINS = {  # of Hydra, that may not be installed: the extra and the package
    "optuna": ("optuna", "hydra-optuna-sweeper"),
    "submitit_slurm": ("cluster", "hydra-submitit-launcher"),
}


def configuration(overrides: list[str]) -> DictConfig:
    """The configuration of a command that Hydra itself does not start; it is composed and not checked yet.

    Raises:
        UserError: an override that cannot be composed.
    """
    check_overrides(overrides)

    def composed(overrides: list[str]) -> DictConfig:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose("config", overrides)

    try:
        return composed(overrides)
    except Exception as error:  # of Hydra, of OmegaConf, or what an odd value makes of the two
        raise not_composed(error, overrides, composed) from None


def not_composed(error: Exception, overrides: list[str], composed: Composed) -> UserError:
    """What to do about an error of Hydra; its own advice is at times what is refused here (+inner_lrr=0.1).

    composed: composes a configuration of some of the overrides.
    """
    text = str(error)
    of_run = any(key_of(word) == "checkpoint" for word in overrides)  # whose call is read later
    missing = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
    group, _, name = (missing or "").rpartition("/")
    if name in PLUGINS:
        return UserError(f"{group}={name}: needs {of_extra(*PLUGINS[name])}")
    if isinstance(error, MissingConfigException) and missing and error.options:
        choices = {choice for choice in error.options if not choice.startswith("shared/")}
        again = "; a file of your own needs its folder in this call too, --config-dir=FOLDER" * of_run
        return UserError(f"{group}={name}: no such choice; {nearest(name, choices)}{again}")
    if unknown := re.match(r"Could not override '(.+)'", text):
        call = next((override for override in overrides if key_of(override) == unknown[1]), unknown[1])
        key = getattr(error.__cause__, "full_key", None) or unknown[1]
        group = key.split(".")[0]
        known = files(group) if group in GROUPS else {}
        if call.startswith(f"{key}=") and any(key in file.added for file in known.values()):
            return UserError(one_line(f"{call}: no such knob; did you mean +{key}?"))
        having = [name for name, file in known.items() if key in file.values]
        of_another_class = f"{group}._target_" in map(key_of, overrides)
        if having and call.startswith(f"{key}=") and not of_another_class:
            again = f"; name the model's {group}= in this call too" * (of_run and group not in map(key_of, overrides))
            return UserError(f"{call}: a knob of {group}={', '.join(sorted(having))}{again}")
        inside = "" if unknown[1].startswith(key) else f" {key} in it"
        with suppress(Exception):  # chosen groups whose files are there
            groups = rf"({'|'.join(GROUPS)}|experiment|\w+/\w+)="
            chosen = composed([override for override in overrides if re.match(groups, override)])
            candidates, advice = _nearest_knobs(key, chosen)
            candidates = candidates if call.startswith(f"{key}=") else []
            candidates += [f"+{unknown[1]}"] * key.startswith(ADDED)
            if candidates:
                advice = _did_you_mean(candidates, call, overrides, composed) or advice
            return UserError(one_line(f"{call}: no such knob{inside}; {advice}"))
        return UserError(f"{call}: no such knob{inside}; {nearest(key, knobs())}")
    if several := re.match("(?:Ambiguous value for argument|Sweep parameters) '(.+)'(?:\n| requires)", text):
        return UserError(f"{several[1]}: several values are a sweep, with -m; a list is [A,B], a comma in a text 'A,B'")
    if there := re.match("Could not append to config. An item is already at '(.+)'", text):
        call = next((override for override in overrides if override.startswith(f"+{there[1]}=")), there[1])
        return UserError(f"{call}: is there already; leave the + out")
    if merged := re.match("Error merging override (.+)", text):
        return UserError(f"{merged[1]}: is of another kind than the value of this knob ({first_line(error.__cause__)})")
    call = " ".join(override for override in overrides if not override.startswith("hydra.mode="))
    return UserError(one_line(f"{call}: cannot be composed ({first_line(error)}); --help names the knobs"))


def _nearest_knobs(key: str, cfg: DictConfig) -> tuple[list[str], str]:
    """What to try in place of a knob that cfg lacks, as a list and in words: one elsewhere, or those beside it."""
    place, _, name = key.rpartition(".")
    known = [knob for knob in names(OmegaConf.to_container(cfg)) if knob.startswith("hydra") == key.startswith("hydra")]
    if (dotted := key.replace("_", ".", 1)) in known:
        return [dotted], f"did you mean {dotted}?"
    parts = [knob.rpartition(".") for knob in (*known, "+zeroing")]
    if same := sorted(("".join(part) for part in parts if part[2] == name != "_target_"), key=len):
        return same, f"did you mean {same[0]}?"
    beside = {"".join(part) for part in parts if part[0] == place} or knobs()
    return get_close_matches(key, beside), nearest(key, beside)


def _did_you_mean(candidates: list[str], call: str, overrides: list[str], composed: Composed) -> str | None:
    """Advises the first candidate that would not be refused in its turn; if all would be, the first of them, and why.

    None: the first of them is a key to be added, and why it would be refused is of no help.
    """

    def refusal(words: list[str]) -> str | None:  # None: it would not be refused
        try:
            cfg = copy.deepcopy(composed(words))
            with open_dict(cfg):
                cfg.pop("hydra", None)
            check(cfg)
        except Exception as error:
            return first_line(error)

    others = [override for override in overrides if override != call]
    without, reasons = refusal(others), []
    for name in candidates:
        reasons.append(refusal([*others, f"{name}={call.partition('=')[2]}"]))
        if reasons[-1] in (None, without):
            return f"did you mean {name}?"
    return None if candidates[0].startswith("+") else f"did you mean {candidates[0]}? ({reasons[0]})"


def names(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of the knobs in plain data."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from names(value, f"{prefix}{key}.")
