"""python train.py --help, and the tables of knobs in the docs: both are made of the YAML's comments and of the schema.

The comment behind a knob or above it is the knob's sentence if it ends in a full stop; a file's first comment is the
file's own.
"""

import re
import textwrap
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fewshot.config.command import line_width
from fewshot.config.kinds import Made, Part
from fewshot.config.schema import Config
from fewshot.config.tree import CONF, GROUPS, key_of
from fewshot.errors import UserError, nearest
from fewshot.processes.surroundings import as_called

LINE = re.compile(
    r"(?P<indent> *)(?P<plus># \+)?(?P<key>\w+):(?: (?P<value>[^#\s](?:[^#]*[^#\s])?))?(?: +# (?P<says>.*))?"
)
INDENT = 27
TOP = """{} KNOB=VALUE ...: trains, validates, tests and reports.

-m              Several values behind a =, as in -m seed=0,1,2 algo=fomaml,zero, are a sweep.
--help WORD     The knobs of a group, or one knob: --help dataset, --help inner_lr.
--cfg job       Prints the whole configuration of the call.
--hydra-help    Hydra's other flags.

GROUP=CHOICE, the default first:"""


class File(NamedTuple):
    """A YAML file of conf/: its own sentence; by dotted key its knobs' values, their sentences, and those with a +."""

    sentence: str
    values: dict[str, str]
    sentences: dict[str, str]
    added: set[str]


@cache
def read(path: Path, group: str = "") -> File:
    """group: the one that the keys of the file are in, unless it says that they are absolute."""
    lines = path.read_text(encoding="utf-8").splitlines()
    above = [] if "# @package _global_" in lines or not group else [group]
    file, parents, comment, in_head = File("", {}, {}, set()), {}, [], True
    for line in lines:
        match = LINE.fullmatch(line)
        if match:
            parents = {indent: key for indent, key in parents.items() if indent < len(match["indent"])}
            parents[len(match["indent"])] = match["key"]
            key, text = ".".join([*above, *parents.values()]), match["says"] or " ".join(comment * (not in_head))
            file.values[key] = re.sub(r"\$\{at_least:(\d+),\$\{(\w+)\}\}", r"max(\1, \2)", match["value"] or "")
            if text.endswith("."):
                file.sentences[key] = text
            if match["plus"]:
                file.added.add(key)
        if match or not line.strip().startswith("# "):
            comment, in_head = [], False
        elif not line.startswith("# @package"):
            comment.append(line.strip()[2:])
            file = file._replace(sentence=" ".join(comment)) if in_head else file
    return file


def files(group: str) -> dict[str, File]:
    """The files of a group by what one writes behind GROUP=, the default first, and those that others share."""
    default = re.search(rf"^  - {group}: (.*)$", (CONF / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    paths = {path.relative_to(CONF / group).with_suffix("").as_posix(): path for path in (CONF / group).rglob("*.yaml")}
    names = sorted(paths, key=lambda name: (name.startswith("shared/"), default is None or name != default[1], name))
    return {name: read(paths[name], group) for name in names}


def choices(group: str) -> dict[str, str]:
    """{choice: its sentence}"""
    return {name: file.sentence for name, file in files(group).items() if not name.startswith("shared/")}


def knobs(part: type[Part] = Config, above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, what it must be) of every knob; the arguments of what a `_target_` makes are told of elsewhere."""
    for name, field in part.model_fields.items():
        key = f"{above}{field.alias or name}"
        notes = [field.annotation, *(kind for note in field.metadata if isinstance(note, tuple) for kind in note)]
        parts = [kind for kind in notes if isinstance(kind, type) and issubclass(kind, Part)]
        if parts and (not above or parts[0] in Made.__subclasses__()):
            yield from knobs(parts[0], f"{key}.")
        elif key == "augment":
            yield from ((transform, "") for file in files(key).values() for transform in file.sentences)
        elif name != "target":
            yield key, field.description or ""


def entry(key: str, must_be: str = "") -> tuple[str, str]:
    """(KNOB=DEFAULT, what is said of it); where YAML files differ in its sentence or value, their names are said."""
    places = {"": read(CONF / "config.yaml"), **files(key.split(".")[0] if "." in key else "dataset")}
    usual = {*list(places)[:2]}  # config.yaml and the group's default
    values: dict[str, list[str]] = {}
    sentences: dict[str, list[str]] = {}
    for name, file in places.items():
        for told, by in ((file.values.get(key), values), (file.sentences.get(key), sentences)):
            if told and not told.startswith("${"):
                by.setdefault(told, []).append(name.removeprefix("shared/"))
    general = len(sentences) == 1 and usual & {*next(iter(sentences.values()))}
    says = [text if general else f"{', '.join(names)}: {text}" for text, names in sentences.items()]
    must = [f"[{must_be}]"] if must_be and says else []
    others = [f"{value} with {', '.join(names)}" for value, names in list(values.items())[1:] if [value] != names]
    plus = "+" * any(key in file.added for file in places.values())
    return plus + "=".join([key, *list(values)[:1]]), " ".join(
        [*says, *must, *([f"({'; '.join(others)})"] * bool(others))]
    )


def page(words: list[str]) -> str:
    """What --help prints: of the knobs in no group, or of the groups and knobs that the words name.

    Raises:
        UserError: a word is neither.
    """
    known, groups = dict(knobs()), (*GROUPS, "experiment")
    asked = [key_of(word) for word in words if not word.startswith("-")]
    names = {*groups, *known, *(key.split(".")[0] for key in known)}
    if unknown := [key for key in asked if key not in names]:
        raise UserError(f"--help {unknown[0]}: no such knob or group; {nearest(unknown[0], names)}")
    if not asked:
        lines = [TOP.format(as_called("train")), *(_line(group, ", ".join(choices(group))) for group in groups), ""]
    else:
        named = [
            (f"{group}={name}", text) for group in asked if group in groups for name, text in choices(group).items()
        ]
        lines = [*(_line(word, re.split(r"(?<! al)\. ", text)[0].rstrip(".") + ".") for word, text in named), ""]
    wanted = [key for key in known if ({key, key.split(".")[0]} & {*asked} if asked else _in_no_group(key))]
    return "\n".join([*lines, *(_line(*told) for key in wanted if (told := entry(key, known[key]))[1])]).strip()


def _in_no_group(key: str) -> bool:
    return key.split(".")[0] not in GROUPS


def _line(word: str, text: str) -> str:
    rest = textwrap.wrap(text, line_width() - INDENT, break_on_hyphens=False)
    first = f"{word:<{INDENT}}{rest.pop(0)}" if len(word) < INDENT and rest else word
    return "\n".join([first, *(" " * INDENT + line for line in rest)])


def table(wanted: Collection[str] = ()) -> str:
    """A table for the docs: of these knobs, or of all that are in no group."""
    rows = [entry(key) for key, _ in knobs() if (key in wanted if wanted else _in_no_group(key))]
    cells = [f"| `{word.split('=')[0]}` | {word.partition('=')[2]} | {text} |\n" for word, text in rows]
    return "".join(["| knob | default | |\n", "| --- | --- | --- |\n", *cells])
