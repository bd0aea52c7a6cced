"""Reads files that others may have written: what is not of the form that it must have ends in one line.

A form is an `Is`, an `Each`, or a dictionary of forms by key, where a key that ends in ? may be missing. schema.py has
words of its own, because it says what a knob takes, and because a sweep's table need not wait for pydantic.
"""

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewshot.config.moved import to_today
from fewshot.config.tree import MODES
from fewshot.errors import UserError, one_line, shown
from fewshot.files import is_regular
from fewshot.inner_loop import ADAPTED, HEADS

MEBIBYTE = 2**20


class Is(NamedTuple):
    """A value that passes `test`; words: what it must be."""

    words: str
    test: Callable[[Any], bool]


class Each(NamedTuple):
    """A list whose members are of one form; keys=True: a dictionary of them, with text as keys."""

    of: "Form"
    keys: bool = False


Form: TypeAlias = "Is | Each | dict[str, Form]"


def integer(least: int, most: int = 2**31) -> Is:
    words = f"an integer from {least} to {most}"
    return Is(words, lambda value: type(value) is int and least <= value <= most)


def text(pattern: str, words: str = "text") -> Is:
    return Is(words, lambda value: isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL) is not None)


def one_of(*values: Any) -> Is:
    words = f"one of {', '.join(map(shown, values))}"
    return Is(words, lambda value: any(type(value) is type(one) and value == one for one in values))


def none_or(form: Is) -> Is:
    return Is(f"{form.words}, or null", lambda value: value is None or form.test(value))


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


ANY = Is("anything", lambda value: True)
REAL = Is("a number", lambda value: type(value) in (int, float))  # NaN too
NUMBER = Is("a finite number", _finite)
ABOVE_ZERO = Is("a finite number above 0", lambda value: _finite(value) and value > 0)
FLAG = one_of(True, False)
NAME = text(r"[^\x00-\x1f]{1,200}", "a line of text")

# The part of a run's configuration that makes its model, and what is said of it. Bounds are above what anybody trains.
CONFIG: Form = {
    **{knob: integer(2 if knob == "ways" else 1, 10_000) for knob in ("ways", "shots", "queries")},
    "inner_steps": integer(1, 1000),
    "test_steps": integer(1, 1000),
    **{knob: integer(1) for knob in ("meta_batch_size", "iterations")},
    "seed": integer(0, 2**32 - 1),
    "inner_lr": ABOVE_ZERO,
    "outer_lr": ABOVE_ZERO,
    "init_scale?": NUMBER,
    "tasks_at_once": none_or(integer(1)),
    "model": {"name": NAME, "network": {"_target_": NAME}},
    "dataset": {
        "name": NAME,
        "size": integer(1, 1024),
        "channels": one_of(1, 3),
        "resample?": one_of("bilinear", "lanczos"),
        "mean": Each(NUMBER),
        "std": Each(ABOVE_ZERO),
    },
    "algo": {
        "adapted?": one_of(*ADAPTED),
        "head?": one_of(*HEADS),
        "step_losses?": none_or(integer(1)),
        **dict.fromkeys(("learned_inner_lr?", "first_order", "zeroing", "noise?", "interference?"), FLAG),
    },
    "augment?": Is("a dictionary", lambda value: isinstance(value, dict)),
}
MODEL: Form = {
    "algo": dict.fromkeys(("adapted", "head", "step_losses", "learned_inner_lr"), ANY)
}  # old results have none
CURVE = Each(NUMBER)
SCORES: Form = {"tasks": integer(1), **{mode: {"accuracy": CURVE, "ci95": CURVE} for mode in MODES}}
RESULTS: Form = {  # results.json; not all its readers need what is optional here
    "test": SCORES,
    "val?": SCORES,
    "iterations?": integer(0),
    "best_iteration?": integer(0),
    "config": {"fit": FLAG},
    "versions?": Each(NAME, keys=True),
}
# The forms of ${...} in this program's own YAML files; ${oc.env:...}, and all that reads more than values, is none.
KEY = r"[\w-]+(?:\.[\w-]+)*"
SIMPLE = rf"\$\{{{KEY}\}}"
NESTED = rf"\$\{{{KEY}\.{SIMPLE}(?:\.{KEY})?\}}"
ARGUMENT = rf"(?:{SIMPLE}|{NESTED}|[^${{}},]*)"
FORMS = rf"{NESTED}|\$\{{(?:(?:at_least|rotated):{ARGUMENT}|oc\.select:{KEY})(?:,{ARGUMENT})*\}}"
MATRIX = Is("a square of numbers", lambda value: _is_square(value))
SIMILARITIES: Form = {"updates": Each(integer(0)), "query_support": Each(MATRIX), "query_query": Each(MATRIX)}


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isprintable()


def _is_square(value: Any) -> bool:
    rows = value if isinstance(value, list) else []
    return bool(rows) and all(
        isinstance(row, list) and len(row) == len(rows) and all(map(REAL.test, row)) for row in rows
    )


def check(where: str, value: Any, form: Form, key: str = "") -> None:
    """Raises UserError naming the first key whose value is not of its form. where: how the line begins."""
    if isinstance(form, Is):
        if not form.test(value):
            raise UserError(f"{where}: {key or 'it'} must be {form.words}, and is {brief(value)}")
    elif isinstance(form, Each):
        kind = dict if form.keys else list
        if not isinstance(value, kind) or (form.keys and not all(map(_is_name, value))):
            raise UserError(f"{where}: {key or 'it'} must be a {kind.__name__}, and is {brief(value)}")
        for name, member in value.items() if form.keys else enumerate(value):
            check(where, member, form.of, f"{key}.{name}".lstrip("."))
    elif not isinstance(value, dict):
        raise UserError(f"{where}: {key or 'it'} must be a dict, and is {brief(value)}")
    else:
        for name, inner in form.items():
            place = f"{key}.{name}".lstrip(".").rstrip("?")
            if name.rstrip("?") in value:
                check(where, value[name.rstrip("?")], inner, place)
            elif not name.endswith("?"):
                raise UserError(f"{where}: {place} is missing")


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


def check_plain(where: str, content: Any, most: int = 20_000, deepest: int = 20) -> None:
    """Raises UserError where it is not plain data with text as keys, or is large: a list may hold itself many times."""
    waiting, number = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        number += 1
        if number > most or depth > deepest or (isinstance(value, str) and len(value) > 10_000):
            raise UserError(f"{where}: holds more, or deeper, or longer values than any run of this program writes")
        if isinstance(value, dict):
            if not all(type(key) is str and key.isprintable() and len(key) < 1000 for key in value):
                raise UserError(f"{where}: holds keys that are no text")
            waiting += [(member, depth + 1) for member in value.values()]
        elif isinstance(value, list | tuple):
            if len(value) > most:
                raise UserError(f"{where}: holds a list of {len(value)} values")
            waiting += [(member, depth + 1) for member in value]
        elif not (value is None or type(value) in (str, bool, float) or (type(value) is int and abs(value) < 2**63)):
            raise UserError(f"{where}: holds a {type(value).__name__}, which is no plain value")


def is_simple(value: str) -> bool:
    """Whether a text has at most one ${...}, escaped or not, and in it nothing but a key."""
    value = value.replace("\\", "")
    return "${" not in value or (value.count("${") == 1 and re.search(SIMPLE, value) is not None)


def check_interpolations(where: str, config: dict[str, Any], most: int = 20_000) -> None:
    """Raises UserError where a ${...} has a form that this program's YAML lacks, or would make much of little.

    Nothing is resolved here: the values that would be read are counted, and their hundreds of letters.
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
                keys = re.findall(rf"(?:(?<=\$\{{)|(?<=oc\.select:)){KEY}", node)
                inner, length = [_at(config, key) for key in keys], 1 + len(node) // 100
            sizes[mark] = length + sum(map(size, inner))
        return sizes[mark]

    try:
        large = size(config) > most
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


def read_results(path: Path) -> dict[str, Any]:
    """results.json of a run.

    Raises:
        UserError: it cannot be read, or is not of the form that a run writes.
    """
    results = read_json(path)
    check(str(path), results, RESULTS)
    check_config(str(path), results["config"])
    results["config"] = to_today(results["config"])
    curves = [results["test"][mode][name] for mode in MODES for name in ("accuracy", "ci95")]
    if not curves[0] or len({len(curve) for curve in curves}) > 1:
        raise UserError(f"{path}: test must have as many accuracies as intervals in both modes, one for each step")
    steps = results["config"]["inner_steps"]
    if "val" in results and len(results["val"]["zeroing_off"]["accuracy"]) <= steps:
        raise UserError(f"{path}: val has no accuracy after inner_steps={steps}")
    return results


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
            if isinstance(event, yaml.AliasEvent) or depth > 20:
                what = "an alias" if isinstance(event, yaml.AliasEvent) else "more than 20 levels"
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
