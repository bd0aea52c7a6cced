"""What all commands share: the words that they take, their --help, and the one line in which they end.

A word is KEY=VALUE; sweep also takes folders, and data what it is to do. Commands that compose a configuration take its
knobs too, as Hydra reads them; train and evidence take Hydra's own flags, such as -m.
"""

import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from fewshot.errors import RankGone, RunLocked, Stopped, Unreachable, UserError, nearest, one_line
from fewshot.files import at_home, in_shell, override, user_path, write_file
from fewshot.processes import ranks
from fewshot.processes.surroundings import as_called

HELP = {"-h", "--help"}


class Parameter(NamedTuple):
    """One of a command's words. read: makes a value of (key, text); None: it is one of the knobs of train.py."""

    sentence: str
    read: Callable[[str, str], Any] | None = lambda key, text: text
    needed: bool = False


class Command(NamedTuple):
    """A command. --help shows its parameters by their keys: KEY=WHAT, a word as it is, or FOLDER... for several."""

    name: str
    does: str
    parameters: Mapping[str, Parameter]
    knobs: bool = False  # whether it takes those of train.py too

    @property
    def call(self) -> str:
        return as_called(self.name)

    def help(self) -> str:
        """One line for each parameter, or as many as its sentence needs."""
        width = max(map(len, self.parameters)) + 2
        lines = [
            textwrap.fill(f"{word:{width}}{parameter.sentence}", line_width(), subsequent_indent=" " * width)
            for word, parameter in self.parameters.items()
        ]
        more = ["", f"It also takes the knobs of training, which {as_called('train')} --help tells of."] * self.knobs
        return "\n".join([f"{self.call}: {self.does}", "", *lines, *more])


class Words(NamedTuple):
    """What a command was called with."""

    values: dict[str, Any]  # of KEY=VALUE, as its parameter reads it
    plain: list[str]  # without a =
    knobs: list[str]  # those of train.py, as they are written


def read(command: Command, arguments: list[str] | None = None) -> Words:
    """Reads the words of a call. It prints the help and ends the program where that is asked for.

    arguments: None: those that the program was called with.

    Raises:
        UserError: a word that the command does not take, one given twice, or one that is missing.
    """
    words = at_home(sys.argv[1:] if arguments is None else arguments)
    if HELP & {*words}:
        print(command.help())
        raise SystemExit
    own = {shown: parameter for shown, parameter in command.parameters.items() if parameter.read}
    keyed = {shown.partition("=")[0]: shown for shown in own if "=" in shown}
    plain = [shown for shown in own if "=" not in shown]
    texts: dict[str, str] = {}
    call = Words({}, [], [])
    for word in words:
        key, equals, text = word.partition("=")
        if key in keyed:
            if not text:
                raise UserError(f"{word}: give {key}=VALUE")
            if key in texts:
                raise UserError(f"{word}: {key} is given twice; {key}={texts[key]} came first")
            texts[key] = text
        elif word in plain or ("FOLDER..." in plain and not word.startswith("-") and (not equals or "/" in key)):
            call.plain.append(word)
        elif command.knobs and key == "--config-dir" and equals:
            if not os.path.isdir(folder := os.path.abspath(user_path(key, text))):
                raise UserError(f"{word}: no such folder")
            call.knobs.append(f"hydra.searchpath=[{override('', f'file://{folder}')[1:]}]")
        elif command.knobs and equals:
            call.knobs.append(word)
        else:
            option = key.lstrip("-")
            remedy = f"write {option}=VALUE" if option in keyed else nearest(key, {*keyed, *plain})
            raise UserError(f"{word}: no such knob; {remedy}")
    if plain and not call.plain:
        raise UserError(f"{'|'.join(plain)}: is missing; {command.call} --help says what it is for")
    for key, shown in keyed.items():
        sentence, read_value, needed = command.parameters[shown]
        if key in texts and read_value is not None:
            call.values[key] = read_value(key, unquoted(texts[key]))
        elif needed:
            raise UserError(f"{key}: is missing; give {shown}, {sentence[0].lower()}{sentence[1:].rstrip('.')}")
    return call


def line_width() -> int:
    """Letters in a line of help: as many as the terminal has, within reason."""
    return min(max(shutil.get_terminal_size().columns, 60), 120)


def unquoted(text: str) -> str:
    """A value without the quotes around it, as train.py reads it and as its lines show paths."""
    with suppress(Exception):  # of the grammar
        value = OverridesParser.create().parse_override(f"key={text}").value() if text[0] in "'\"" else text
        return value if isinstance(value, str) else text
    return text


def flag(knob: str, value: str) -> bool:
    """A word as true or false."""
    if value not in ("true", "false"):
        raise UserError(f"{knob}={value}: must be true or false")
    return value == "true"


def integer(knob: str, value: str, smallest: int) -> int:
    """A word as an integer of at least `smallest`."""
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", value) or int(value) < smallest:
        raise UserError(f"{knob}={value}: must be an integer of at least {smallest}")
    return int(value)


def one_of(*names: str) -> Callable[[str, str], str]:
    """Reads a word that must be one of these names."""

    def read_name(knob: str, value: str) -> str:
        if value not in names:
            raise UserError(f"{knob}={value}: must be one of {', '.join(names)}")
        return value

    return read_name


@contextmanager
def one_line_errors(job: Path | None = None, hint: Callable[[], str] = str) -> Iterator[None]:
    """A UserError ends the program with its line and status 1, a signal with status 128 + its number.

    HYDRA_FULL_ERROR=1 shows the traceback.

    job: the folder of a job in a sweep. The sweep goes on; any error stays there as error.txt until a try without one.
    hint: says how to go on after a signal.
    """
    # Where a log file can no longer be written, logging would print a traceback of its own for every line.
    logging.raiseExceptions = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        yield
        if job is not None and not ranks.rank():
            (job / "error.txt").unlink(missing_ok=True)
    except (Stopped, KeyboardInterrupt) as stop:
        number = signal.Signals(stop.signum if isinstance(stop, Stopped) else signal.SIGINT)
        if not ranks.rank() and ranks.PARENT not in os.environ:
            sys.stderr.write(f"stopped by {number.name}{hint()}\n")
        raise SystemExit(128 + number) from None
    except Exception as error:
        if isinstance(error, InstantiationException) and isinstance(error.__cause__, UserError):
            error = error.__cause__
        expected = isinstance(error, UserError | InstantiationException | OmegaConfBaseException)
        expected = expected and os.environ.get("HYDRA_FULL_ERROR") != "1"
        line = one_line(error)
        unsaid = isinstance(error, RankGone) or (isinstance(error, Unreachable) and ranks.local_rank())
        if expected and (unsaid or ranks.leave_error(line)):
            raise SystemExit(1) from None
        if job is not None:
            text = line if expected else f"{traceback.format_exc()}{type(error).__name__}: {line}"
            sys.stderr.write(f"{text}\n")
            with suppress(UserError):  # a full disk is no reason to end the sweep
                if not isinstance(error, RunLocked):
                    write_file(job / "error.txt", f"{text}\n")
            if ranks.launcher():
                raise SystemExit(1) from None  # the other ranks wait for this one, until the launcher ends them
        elif expected:
            raise SystemExit(line) from None
        else:
            raise


def how_to_go_on() -> str:
    """What the line about a signal adds: the call that continues this training or sweep."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return f"; the same command with {in_shell('hydra.sweep.dir', hydra.sweep.dir)} goes on"
    last = Path(hydra.runtime.output_dir) / "checkpoints" / "last.ckpt"
    return f"; {as_called('train')} {in_shell('checkpoint', last)} goes on" if last.exists() else ""
