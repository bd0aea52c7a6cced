"""What a valid configuration is; every mistake that YAML alone shows, said in one line before torch is imported."""

import copy
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewshot.config.tree import GROUPS, choices, entries, key_of
from fewshot.errors import UserError, first_line, nearest, one_line, shown
from fewshot.files import SCHEME, checkpoint_file
from fewshot.inner_loop import THEORY, InnerLoop
from fewshot.processes import ranks

NEEDS_LEARN2LEARN = "needs learn2learn, which is not installed here; docs/install.md says how it is"
REMEDY = ", or begin a run with engine=batched"
# What is made with arguments that are knobs of the same names, and the parts with these knobs; "" is the top level.
MADE_OF = {"model.network": ("model", "dataset", ""), "dataset.source": ("dataset", ""), "callbacks.record": ("",)}

# Parts that take more knobs than their YAML files have: arguments of a class of others, callbacks of one's own.
ADDED = ("trainer.", "optimizer.", "logger.", "callbacks.", "algo.")


def knobs() -> set[str]:
    """The names of the top-level knobs."""
    from fewshot.config.schema import Config  # pydantic takes a third of a second to import

    return {*Config.knobs()} - {"zeroing"}


def check_overrides(overrides: list[str]) -> None:
    """Refuses what Hydra would take in silence, such as a key that is added (+zerong=true), or would refuse at length.

    Raises:
        UserError: an override is not KNOB=VALUE, or names no file of its group. Only +zeroing and what is in
            ADDED may be added; nothing can be removed with ~.
    """
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except Exception as error:  # of the grammar, or whatever a number or a function in it raises
            reason = f" ({str(error).split(' expecting ')[0]})" if "=" in text else ""
            raise UserError(one_line(f"{text or repr(text)}: must be KNOB=VALUE{reason}{_quoted(text)}")) from None
        key, plus = override.key_or_group, override.is_add() or override.is_force_add()
        if key.startswith("hydra"):
            continue
        if override.is_delete() or (plus and key != "zeroing" and not key.startswith(ADDED)):
            remedy = nearest(key, knobs() | {"zeroing"}).replace("mean zeroing?", "mean +zeroing?")
            raise UserError(
                f"{text}: only +zeroing, {', '.join(f'+{part}KEY' for part in ADDED)} may be added, nothing can be "
                f"removed with ~; {remedy}"
            )
        if key == "zeroing" and not plus:
            sound = override.is_sweep_override() or isinstance(override.value(), bool)
            raise UserError(f"{text}: takes a plus, {f'+{text}' if sound else '+zeroing=true or +zeroing=false'}")
        if not key:
            raise UserError(f"{text}: must be KNOB=VALUE")
        value = "" if override.is_sweep_override() else override.value()
        if value == {}:
            raise UserError(f"{text}: an empty mapping changes nothing; leave it out")
        if isinstance(value, list) and key in GROUPS and key != "callbacks":
            raise UserError(f"{text}: takes one of its files, and a list would merge them; give one")
        if (key in GROUPS or (key == "experiment" and value is not None)) and not isinstance(value, str | list):
            raise UserError(f"{text}: must be {_files(key)}")


def _quoted(override: str) -> str:
    """What to write instead, where Hydra can read the value once it is in quotes."""
    key, _, value = override.partition("=")
    quoted = f"{key}='{value}'"
    with suppress(Exception):
        if value and OverridesParser.create().parse_override(quoted).value() == value:
            return f'; quote the value: "{quoted}"'
    return ""


def _files(group: str) -> str:
    return f"one of {', '.join(choices(group))}"


def check(cfg: DictConfig) -> None:
    """Raises UserError for the first mistake in a configuration."""
    check_knobs(cfg)
    if cfg.test_steps < cfg.inner_steps:
        raise UserError(f"test_steps={cfg.test_steps}: must be at least inner_steps={cfg.inner_steps}")
    if not cfg.fit and cfg.checkpoint is None:
        raise UserError("fit=false: needs checkpoint=PATH, the model to test")
    if cfg.engine == "sequential":
        check_learn2learn("engine=sequential", REMEDY)
    loop = InnerLoop.of(cfg)
    if loop.head == "prototypes" and loop.distance in (None, "squared") and cfg.model.get("head_bias") is False:
        raise UserError("model.head_bias=false: with algo.head=prototypes the head has a bias, -|c|^2; leave it out")
    if cfg.probes and loop.beyond_theory:
        raise UserError(f"probes=true: they measure {THEORY}; leave them out with {loop.beyond_theory}")
    if cfg.calibration and cfg.loss != "cross_entropy":
        raise UserError(f"calibration=true: with loss={cfg.loss} logits are no probabilities; leave it out")
    _check_outer_step(cfg)
    _check_dataset(cfg)
    if cfg.dataset.size < cfg.model.smallest_image:
        least = f"{cfg.model.name} needs images of at least {cfg.model.smallest_image} pixels"
        raise UserError(f"dataset.size={cfg.dataset.size}: {least}")
    _check_made(cfg)
    _check_processes(cfg)


def _check_outer_step(cfg: DictConfig) -> None:
    for key in {"lr", "params"} & {*cfg.optimizer}:
        raise UserError(f"optimizer.{key}={shown(cfg.optimizer[key])}: leave it out; outer_lr is the learning rate")
    milestones, multistep = shown(list(cfg.milestones)), cfg.schedule == "multistep"
    if cfg.milestones and not multistep:
        raise UserError(f"milestones={milestones}: add schedule=multistep, or leave them out")
    if multistep and not any(milestone < cfg.iterations for milestone in cfg.milestones):
        raise UserError(f"milestones={milestones}: schedule=multistep needs one below iterations={cfg.iterations}")


def check_learn2learn(what: str, remedy: str = "") -> None:
    """Raises UserError where learn2learn, which `what` needs, is not installed; it is not imported."""
    if find_spec("learn2learn") is None:
        raise UserError(f"{what}: {NEEDS_LEARN2LEARN}{remedy}")


def check_knobs(cfg: DictConfig, named: Iterable[str] | None = None) -> None:
    """Raises UserError for the first knob that schema.py refuses, each looked at by itself.

    named: dotted keys; only mistakes in these knobs, or below them, are reported. None: all are.
    """
    from fewshot.config.kinds import IS_TEXT
    from fewshot.config.schema import mistakes

    plain: Any = OmegaConf.to_container(cfg)
    unresolved = None
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:  # usually because of another mistake, which is the one to tell
        unresolved = error
    for knob, value, words in mistakes(plain):
        told = named is None or any(f"{knob}.".startswith(f"{key}.") for key in named)
        if not told or (unresolved and any(mark in str(value) for mark in ("${", "???"))):
            continue
        group = knob.split(".")[0]
        if knob in GROUPS and not isinstance(value, dict):
            words = f"must be {_files(knob)}"
        if meant := re.fullmatch(r"no such knob; did you mean (.+)\?", words):
            words = _did_you_mean(plain, knob, value, meant[1])
        if words == "is missing" and group == "callbacks":
            name = knob.split(".")[1]
            knob, value, words = f"callbacks.{name}", plain[group][name], "lacks _target_, the class of the callback"
        elif words == "is missing":
            knob, value, words = group, None, f"lacks {knob}; must be {_files(group)}, or of your own with it"
        quote = "'" * (words == IS_TEXT)
        raise UserError(one_line(f"{knob}={quote}{shown(value)}{quote}: {words}"))
    if unresolved and named is None:
        key = re.sub(r"\[(\d+)\]", r".\1", unresolved.full_key or "")  # of a list's member
        raise UserError(
            one_line(f"{key}={dict(entries(plain)).get(key)}: has no value ({first_line(unresolved)}); give it one")
        )


def _did_you_mean(plain: dict[str, Any], knob: str, value: Any, name: str) -> str:
    """The nearest knob with all that one has to write, and why it would be refused if it would be."""
    from fewshot.config.schema import mistakes

    place, _, wrong = knob.rpartition(".")
    right, part = f"{place}.{name}".lstrip("."), (tried := copy.deepcopy(plain))
    for key in filter(None, place.split(".")):
        part = part[key]
    plus = "+" * (right == "zeroing" or (place == "trainer" and name not in part))
    del part[wrong]
    part[name] = value
    reason = next((f" ({right}={shown(value)}: {words})" for key, _, words in mistakes(tried) if key == right), "")
    return f"no such knob; did you mean {plus}{right}?{reason}"


def processes(cfg: DictConfig) -> int:
    """How many processes the run asks for, on all its machines."""
    return cfg.trainer.devices * cfg.trainer.get("num_nodes", 1)


def _check_processes(cfg: DictConfig) -> None:
    wanted, started = processes(cfg), ranks.world_size()
    if wanted > 1 and "strategy" not in cfg.trainer:
        raise UserError(f"trainer.devices={cfg.trainer.devices}: use trainer=ddp trainer.devices={cfg.trainer.devices}")
    curve = ["callbacks.record.test_curve_tasks"] if cfg.test_every else []
    for knob in ("meta_batch_size", "val_tasks", "test_tasks", *curve):
        tasks = OmegaConf.select(cfg, knob, default=wanted)
        if tasks < wanted or (knob == "meta_batch_size" and tasks % wanted):
            least = f"a multiple of {wanted}" if knob == "meta_batch_size" else f"at least {wanted}"
            raise UserError(f"{knob}={tasks}: must be {least}, one share for each of {wanted} processes")
    if ranks.launcher() and started != wanted:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}: {ranks.launcher()} started {started} processes; use trainer=ddp "
            f"trainer.devices=N with N of them on each of trainer.num_nodes machines{ranks.only_process()}"
        )
    if not ranks.launcher() and cfg.trainer.get("num_nodes", 1) > 1 and not _for_a_cluster():
        raise UserError(f"trainer.num_nodes={cfg.trainer.num_nodes}: several machines need torchrun or srun")


def _for_a_cluster() -> bool:
    """Whether this is the beginning of a sweep whose jobs may start on other machines, several for each job."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    return (
        hydra is not None
        and not hydra.launcher._target_.endswith(("BasicLauncher", "JoblibLauncher"))  # which start them here
        and OmegaConf.is_missing(hydra.job, "num")
    )


def _check_dataset(cfg: DictConfig) -> None:
    data = cfg.dataset
    own = not data.source._target_.startswith("fewshot.")
    if data.channels != 1 and not own and "channels" not in data.source:
        raise UserError(f"dataset.channels={data.channels}: must be 1, the images of {data.name} are grey")
    for knob in ("mean", "std"):
        if len(data[knob]) != data.channels:
            values = shown(list(data[knob]))
            raise UserError(f"dataset.{knob}={values}: must have dataset.channels={data.channels} numbers")
    if data.get("needs_root") and data.root is None and not own:
        own_images = "a folder or zip with train|val|test/CLASS/image or CLASS/image"
        raise UserError(f"dataset.root=null: set dataset.root to {own_images if 'labels' in data else data.origin}")
    if "fractions" in data and not own and abs(sum(data.fractions.values()) - 1) > 1e-6:
        raise UserError(f"dataset.fractions={shown(dict(data.fractions))}: must add up to 1; give all three")
    for split, classes in data.classes.items():
        if classes is not None and cfg.ways > classes:
            raise UserError(
                f"ways={cfg.ways}: dataset {data.name} has {classes} {split} classes; at most {classes} ways"
            )
    if data.images_per_class is not None and cfg.shots + cfg.queries > data.images_per_class:
        raise UserError(
            f"shots+queries={cfg.shots}+{cfg.queries}: {data.name} has {data.images_per_class} images per class; "
            "lower shots or queries"
        )
    if "inner_products" in cfg.callbacks and cfg.loss != "mse":
        raise UserError(
            f"loss={cfg.loss}: callbacks=inner_products records what loss=mse wants to be 1 and 0; use loss=mse"
        )
    if "cosine_similarity" in cfg.callbacks:
        if data.tasks != "one_task":
            raise UserError(f"dataset.tasks={data.tasks}: callbacks=cosine_similarity needs dataset.tasks=one_task")
        if cfg.queries == 1:
            raise UserError("queries=1: callbacks=cosine_similarity compares queries of a class, it needs at least 2")


def _check_made(cfg: DictConfig) -> None:
    """Raises UserError where an argument that the YAML takes from a knob was set itself."""
    if cfg.trainer.max_steps != cfg.iterations:
        raise UserError(f"trainer.max_steps={cfg.trainer.max_steps}: set iterations={cfg.trainer.max_steps} instead")
    zeroing = cfg.get("zeroing", cfg.algo.zeroing)
    if cfg.callbacks.zero_head.get("enabled", zeroing) != zeroing:
        raise UserError(f"callbacks.zero_head.enabled={shown(not zeroing)}: use +zeroing={shown(not zeroing)} instead")
    for name, places in MADE_OF.items():
        made = OmegaConf.select(cfg, name)
        for key in made if made._target_.startswith("fewshot.") else ():
            for place in places:
                knob = f"{place}.{key}".lstrip(".")
                if (value := OmegaConf.select(cfg, knob, default=cfg)) is not cfg:
                    if value != made[key]:
                        raise UserError(f"{name}.{key}={shown(made[key])}: set {knob}={shown(made[key])} instead")
                    break


def check_files(cfg: DictConfig) -> None:
    """Raises UserError where dataset.root names nothing that is there."""
    root = cfg.dataset.get("root")
    own = not cfg.dataset.source._target_.startswith("fewshot.")
    if root is None or own or (root.startswith(SCHEME) and "subset" in cfg.dataset):
        return
    if not os.path.exists(os.path.expanduser(root)):
        hydra: Any = HydraConfig.instance().cfg or OmegaConf.create()
        began = OmegaConf.select(hydra, "hydra.runtime.cwd")
        if began is not None and os.path.exists(os.path.join(began, root)):
            raise UserError(f"dataset.root={root}: hydra.job.chdir=true looks for it elsewhere; write the whole path")
        raise UserError(f"dataset.root={root}: no such file or folder; give the folder or zip that holds the images")


def refuse(cfg: DictConfig, overrides: list[str]) -> None:
    """Raises UserError for what a call's YAML shows, and for files that are not there.

    With checkpoint=PATH most of the configuration is in that file, so only what the call itself sets is looked at.
    """
    check_overrides(overrides)
    if cfg.checkpoint is None:
        check(cfg)
        check_files(cfg)
        return
    keys = {key_of(override) for override in overrides} - {*GROUPS, "experiment"}
    check_knobs(cfg, keys)
    try:
        checkpoint_file(cfg.checkpoint, "last")
    except UserError:
        checkpoint_file(cfg.checkpoint, "best")  # which of the two is needed is known later
    if "dataset.root" in keys:
        check_files(cfg)
