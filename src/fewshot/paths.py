"""Paths: as users write them, as a printed command shows them, and new ones that nobody else has."""

import os
import re
import shlex
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from fewshot.errors import UserError

# In the folder of an exported model: its weights and its settings.
EXPORTED, EXPORTED_CONFIG = "model.safetensors", "config.yaml"
PLAIN = re.compile(r"[A-Za-z0-9_.-]*/[A-Za-z0-9_./-]*")  # needs no quotes, and is neither a number nor null


def user_path(knob: str, value: Any) -> Path:
    """The path that a knob names; a ~ at its beginning is a home folder, whichever knob it is.

    Raises:
        UserError: there is no such user, or it is empty.
    """
    text = os.path.expanduser(str(value))  # pathlib's takes ./~ for ~
    if not text:
        raise UserError(f"{knob}=: is empty; give a path")
    if text.startswith("~"):
        raise UserError(f"{knob}={value}: no home folder of that name; write the path out, or put ./ before it")
    return Path(text)


def at_home(words: list[str]) -> list[str]:
    """The words of a command line, with the home folder for the ~ in KNOB=~/X: not every shell expands that."""
    return [
        override(knob, path) if text.startswith("~") and (path := os.path.expanduser(text)) != text else word
        for word in words
        for knob, _, text in [word.partition("=")]
    ]


def run_folder(checkpoint: Path) -> Path:
    """The folder RUN of the run of a checkpoint that is named as RUN, RUN/checkpoints or a file in that."""
    path = Path(os.path.abspath(checkpoint))
    if not os.path.isdir(path):
        return path.parent.parent
    return path if os.path.isdir(path / "checkpoints") or path.name != "checkpoints" else path.parent


def checkpoint_file(value: Any, name: str) -> Path:
    """The file that checkpoint= names; if it names a run's folder RUN, that is RUN/checkpoints/NAME.ckpt.

    Raises:
        UserError: there is no such file.
    """
    path = user_path("checkpoint", value)
    if os.path.isdir(path):
        path = run_folder(path) / "checkpoints" / f"{name}.ckpt"
        if not os.path.isfile(path):
            raise UserError(
                f"checkpoint={value}: no checkpoints/{name}.ckpt in this folder; give the folder of a run or a .ckpt"
            )
    elif not os.path.exists(path):
        raise UserError(f"checkpoint={value}: no such file")
    return path


def model_path(value: Any) -> Path:
    """What checkpoint_file says of the best model; but the folder of an exported model is returned as it is."""
    path = user_path("checkpoint", value)
    if os.path.isfile(path / EXPORTED):
        return path
    if os.path.isdir(path) and not os.path.exists(run_folder(path) / "checkpoints"):
        raise UserError(f"checkpoint={value}: has no {EXPORTED}; give an exported folder, a run's folder or a .ckpt")
    return checkpoint_file(value, "best")


def claimed(folder: Path) -> Path:
    """Makes the folder or, if it is there already, FOLDER-1, FOLDER-2, ...: no other process gets the same one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in count():
        new = folder.with_name(f"{folder.name}-{number}") if number else folder
        with suppress(FileExistsError):
            new.mkdir()
            return new
    raise AssertionError


def escaped(path: str | Path) -> str:
    """The path as a value of a configuration, where ${...} would be an interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(path))


def override(knob: str, path: str | Path) -> str:
    """KNOB=PATH as Hydra reads it back: quoted where it is not plain."""
    text = f"./{path}" if str(path).startswith("~") else str(path)  # a folder whose name begins with ~
    if PLAIN.fullmatch(text):
        return f"{knob}={text}"
    return f"{knob}={QuotedString(escaped(text), Quote.single).with_quotes()}"


def in_shell(knob: str, path: str | Path) -> str:
    """The override as one pastes it into a shell."""
    word = override(knob, path)
    easy = "'" in word and not set(word) & set('"$`\\!')  # easy to read: double quotes leave it as it is
    return f'"{word}"' if easy else shlex.quote(word)
