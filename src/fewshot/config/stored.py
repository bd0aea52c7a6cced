"""Reads files that others may have written: what is not of the form that it must have ends in one line.

Import paths are not a format: two configurations never differ by where something lies in this program. Every reader of
a stored configuration asks here what its names, some of which have changed since, are today.
"""

import io
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, NotRequired, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from fewshot.config.kinds import Part, above_zero, integer, must_be, text
from fewshot.config.schema import Config, Dataset, OwnAlgo, mistakes
from fewshot.errors import UserError, one_line, shown
from fewshot.files import is_regular

MEBIBYTE = 2**20
MOST, DEEPEST = 20_000, 20  # values and levels of a stored configuration; no run of this program writes as many

# Names of today

TARGETS = {  # what a `_target_` named at commit a43819a or later, and what it is called today
    "fewshot.callbacks.CosineSimilarity": "fewshot.training.record.CosineSimilarity",
    "fewshot.training.cosine_similarity.CosineSimilarity": "fewshot.training.record.CosineSimilarity",
    "fewshot.callbacks.Progress": "fewshot.training.record.Progress",
    "fewshot.callbacks.Record": "fewshot.training.record.Record",
    "fewshot.callbacks.ZeroHead": "fewshot.training.zero_head.ZeroHead",
    "fewshot.data.cifar.load": "fewshot.data.sources.cifar.load",
    "fewshot.data.folder.load": "fewshot.data.sources.folder.load",
    "fewshot.data.glyphs.load": "fewshot.data.sources.glyphs.load",
    "fewshot.data.imagenet.miniimagenet": "fewshot.data.sources.imagenet.miniimagenet",
    "fewshot.data.imagenet.tieredimagenet": "fewshot.data.sources.imagenet.tieredimagenet",
    "fewshot.data.omniglot.load": "fewshot.data.sources.omniglot.load",
    "fewshot.distributed.TasksOverRanks": "fewshot.training.ddp.TasksOverRanks",
    "fewshot.foreign.wrapped": "fewshot.models.any_module.network_from_module",
    "fewshot.logger.wandb_logger": "fewshot.training.wandb_run.wandb_logger",
}

# Knobs that older configurations lack, and the values that held then: NEWER of a model, OUTER of a run
NEWER = {"loss": "cross_entropy"}
OUTER = {"optimizer": {"_target_": "torch.optim.Adam"}, "schedule": "none", "milestones": [], "clip_norm": None}
OUTER |= {"select": "zeroing_off", "evaluation": {"statistics": "task"}, "calibration": False}


def to_today(stored: Any) -> Any:
    """A stored configuration, or a part of one, as plain data with today's names."""
    if isinstance(stored, dict):
        today = {
            key: TARGETS.get(value, value) if key == "_target_" and isinstance(value, str) else to_today(value)
            for key, value in stored.items()
        }
        if today.get("_target_") == "fewshot.training.ddp.TasksOverRanks":
            today = {"timeout": 600} | today
        dataset = today.get("dataset")
        if isinstance(dataset, dict) and dataset.get("name") == "omniglot":
            today["dataset"] = {"resample": "lanczos"} | dataset  # a key that no dataset had then
        model = today.get("model")
        if isinstance(model, dict) and "network" in model and str(model.get("name")).startswith("conv4_"):
            today["model"] = {"norm": "batch"} | model | {"network": {"norm": "batch"} | model["network"]}
        return (NEWER if "inner_lr" in today else {}) | (OUTER if "trainer" in today else {}) | today
    return [to_today(value) for value in stored] if isinstance(stored, list | tuple) else stored


def compared(key: str, value: Any) -> bool:
    """Whether two configurations can differ in this leaf; how this program names its classes makes no difference."""
    own = key.rsplit(".", 1)[-1] == "_target_" and isinstance(value, str) and value.startswith("fewshot.")
    own = own and key != "algo._target_"  # by which alone two algorithms may differ
    return not own and key not in ("dataset.needs_root", "callbacks.record.select")  # which older runs lack


# What is read must be of its form: a type as pydantic takes it


def form(kinds: dict[str, Any]) -> Any:
    """A dictionary with values of these kinds, and perhaps with other keys; a key that ends in ? may be missing."""
    fields: Any = {k.rstrip("?"): NotRequired[kind] if k[-1] == "?" else kind for k, kind in kinds.items()}
    return TypedDict("form", fields)  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]: made here


def many(kind: Any) -> Any:
    """A list of this kind; a mistake is reported for its first wrong member alone, however many there are."""
    return Annotated[list[kind], Field(fail_fast=True)]


def as_knobs(part: type[Part], names: str) -> dict[str, Any]:
    """Keys of a form whose values are as schema.py has them for the knobs of the same names."""
    kinds = get_type_hints(part, include_extras=True)
    return {name: kinds[name.rstrip("?")] for name in names.split()}


NAME = text("a line of text", r"[^\x00-\x1f]{1,200}")
KEY = text("a line of text", r"[^\x00-\x1f]{1,1000}")
NUMBER = must_be("a finite number", Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)])

# The part of a run's configuration that makes its model, and what is said of it.
CONFIG = form(
    {
        **as_knobs(Config, "ways shots queries inner_steps test_steps inner_lr outer_lr"),
        **as_knobs(Config, "meta_batch_size iterations seed init_scale? tasks_at_once loss? fit? stop_at_accuracy?"),
        "model": form({"name": NAME, "network": form({"_target_": NAME})}),
        "dataset": form(
            {"name": NAME, "mean": many(NUMBER), "std": many(above_zero())}
            | as_knobs(Dataset, "size channels resample?")
        ),
        "algo": form(
            as_knobs(OwnAlgo, "first_order zeroing adapted? head? step_losses? learned_inner_lr? noise? interference?")
            | as_knobs(OwnAlgo, "distance? temperature?")
            | {"_target_?": must_be("null or a text", str | None)}
        ),
        "augment?": dict[str, Any],
        "trained?": form(as_knobs(Config, "inner_steps?")),  # of a test: where its training was another
    }
)
MODEL = form({"algo": form(dict.fromkeys(("adapted", "head", "step_losses", "learned_inner_lr"), Any))})  # new keys
# The forms of ${...} in this program's own YAML files; none of them reads more than values, as ${oc.env:...} would.
PLACE = r"[\w-]+(?:\.[\w-]+)*"
SIMPLE = rf"\$\{{{PLACE}\}}"
NESTED = rf"\$\{{{PLACE}\.{SIMPLE}(?:\.{PLACE})?\}}"
ARGUMENT = rf"(?:{SIMPLE}|{NESTED}|[^${{}},]*)"
FORMS = rf"{NESTED}|\$\{{(?:(?:at_least|rotated|folder_name):{ARGUMENT}|oc\.select:{PLACE})(?:,{ARGUMENT})*\}}"


def _is_square(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == len(rows) and all(type(n) in (int, float) for n in row) for row in rows
    )


MATRIX = must_be("a square of numbers", Any, refused=lambda rows: not rows or not _is_square(rows))
SIMILARITIES = form({"updates": many(integer(0)), "query_support": many(MATRIX), "query_query": many(MATRIX)})
COUNTS = dict.fromkeys(("same_class", "other_class"), many(many(integer(0))))
PRODUCTS = form({"between": many(NUMBER), "updates": many(integer(0)), **COUNTS})


def check(where: str, value: Any, kind: Any) -> None:
    """Raises UserError naming the first key whose value is not of its kind. where: how the line begins."""
    for key, wrong, words in mistakes(value, kind)[:1]:
        seen = "" if words == "is missing" else f", and is {brief(wrong)}"
        name = key if len(key) < 200 else f"{key[:100]}..."
        raise UserError(f"{where}: {name or 'it'} {words}{seen}")


def check_config(where: str, config: Any) -> None:
    """Raises UserError where `config` is not the configuration of a run."""
    check_plain(where, config)
    where = f"{where}: is not the configuration of a run"
    check(where, config, CONFIG)
    for knob in ("mean", "std"):
        if len(config["dataset"][knob]) != config["dataset"]["channels"]:
            raise UserError(
                f"{where}: dataset.{knob} must have dataset.channels={config['dataset']['channels']} numbers"
            )


def check_plain(where: str, content: Any) -> None:
    """Raises UserError where it is not plain data with text as keys, or is large: a list may hold itself many times."""
    waiting, number = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        number += 1
        if number > MOST or depth > DEEPEST or (isinstance(value, str) and len(value) > 10_000):
            raise UserError(f"{where}: holds more, or deeper, or longer values than any run of this program writes")
        if isinstance(value, dict):
            if not all(type(key) is str and key.isprintable() and len(key) < 1000 for key in value):
                raise UserError(f"{where}: holds keys that are no text")
            waiting += [(member, depth + 1) for member in value.values()]
        elif isinstance(value, list | tuple):
            if len(value) > MOST:
                raise UserError(f"{where}: holds a list of {len(value)} values")
            waiting += [(member, depth + 1) for member in value]
        elif not (value is None or type(value) in (str, bool, float) or (type(value) is int and abs(value) < 2**63)):
            raise UserError(f"{where}: holds a {type(value).__name__}, which is no plain value")


def is_simple(value: str) -> bool:
    """Whether a text has at most one ${...}, escaped or not, and in it nothing but a key."""
    value = value.replace("\\", "")
    return "${" not in value or (value.count("${") == 1 and re.search(SIMPLE, value) is not None)


def check_interpolations(where: str, config: dict[str, Any]) -> None:
    """Raises UserError where a ${...} has a form that this program's YAML lacks, or would make much of little.

    Nothing is resolved here. The values that would be read are counted, a long text once for every hundred letters.
    """
    sizes: dict[str | int, float] = {}

    def size(node: Any) -> float:
        if isinstance(node, str) and "${" not in node:
            return 1 + len(node) // 100
        if not isinstance(node, str | dict | list):
            return 1
        mark = node if isinstance(node, str) else id(node)
        if mark not in sizes:
            sizes[mark] = math.inf  # where it leads to itself
            inner, length = node.values() if isinstance(node, dict) else node, 1
            if isinstance(node, str):
                if not (is_simple(node) or re.fullmatch(FORMS, node)):
                    raise UserError(f"{where}: cannot be resolved ({brief(node)} is none of this program's forms)")
                keys = re.findall(rf"(?:(?<=\$\{{)|(?<=oc\.select:)){PLACE}", node)
                inner, length = [_at(config, key) for key in keys], 1 + len(node) // 100
            sizes[mark] = length + sum(map(size, inner))
        return sizes[mark]

    try:
        large = size(config) > MOST
    except RecursionError:
        large = True
    if large:
        raise UserError(f"{where}: cannot be resolved (more would be made of it than any run of this program writes)")


def _at(node: Any, key: str) -> Any:
    """What is at a dotted key, or an interpolation on the way there; None where nothing is."""
    for part in key.split("."):
        if isinstance(node, str):
            break
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (LookupError, TypeError, ValueError):
            return None
    return node


def brief(value: Any) -> str:
    """A value in a message: a few letters, however large it is."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**18):
        return shown(value)
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"


def read_json(path: Path) -> Any:
    """Raises UserError where the file cannot be read."""
    try:
        return json.loads(read_text(path, 256 * MEBIBYTE))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({_reason(error)})") from None


def read_yaml(path: Path) -> Any:
    """The plain values of a small YAML file, as OmegaConf reads it, without aliases, which could make much of little.

    Raises:
        UserError: it cannot be read.
    """
    content = read_text(path, MEBIBYTE // 4)
    try:
        depth = 0
        for event in yaml.parse(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                what = "an alias" if isinstance(event, yaml.AliasEvent) else f"more than {DEEPEST} levels"
                raise UserError(f"{path}: has {what}, which no run of this program writes")
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(content)))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({_reason(error)})") from None


def read_text(path: Path, most: int) -> str:
    """Raises UserError where it is no file, cannot be read, is not UTF-8, or has more than so many bytes."""
    is_regular("file", path)
    try:
        if path.stat().st_size > most:
            raise UserError(f"{path}: has more than {most} bytes, as no such file of this program")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
