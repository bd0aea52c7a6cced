"""What all commands share: how they read their words, and the one line in which they end."""

import argparse
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from fewshot.errors import AtWork, RankGone, Stopped, UserError, nearest
from fewshot.files import write_file
from fewshot.paths import in_shell
from fewshot.processes import ranks


@contextmanager
def one_line_errors(job: Path | None = None, hint: Callable[[], str] = str) -> Iterator[None]:
    """A UserError ends the program with its line and status 1, a signal with 128 + its number.

    HYDRA_FULL_ERROR=1 shows the traceback.

    job: the folder of a job in a sweep, which goes on: any error is left there as error.txt, until a try without one.
    hint: of how to go on after a signal.
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
        line = " ".join(str(error).split())
        if expected and (isinstance(error, RankGone) or ranks.leave_error(line)):
            raise SystemExit(1) from None
        if job is not None:
            text = line if expected else f"{traceback.format_exc()}{type(error).__name__}: {line}"
            sys.stderr.write(f"{text}\n")
            with suppress(UserError):  # a full disk is no reason to end the sweep
                if not isinstance(error, AtWork):
                    write_file(job / "error.txt", f"{text}\n")
            if ranks.launcher():
                raise SystemExit(1) from None  # the other ranks wait for this one, until the launcher ends them
        elif expected:
            raise SystemExit(line) from None
        else:
            raise


def how_to_go_on() -> str:
    """After a signal, for whoever reads the line that says so: the call that continues this training or sweep."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        return f"; the same command with {in_shell('hydra.sweep.dir', hydra.sweep.dir)} goes on"
    last = Path(hydra.runtime.output_dir) / "checkpoints" / "last.ckpt"
    return f"; python train.py {in_shell('checkpoint', last)} goes on" if last.exists() else ""


class Parser(argparse.ArgumentParser):
    """Of a command's options; what it cannot read is one line too, with the status of any other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says what there is")


def words(arguments: list[str], known: Iterable[str], needed: dict[str, str]) -> dict[str, str]:
    """The key=value words of a command that composes no configuration; needed: {key: what to give}.

    Raises:
        UserError: a word that is none, one that is not known, one given twice, one that is missing.
    """
    given: dict[str, str] = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if key not in known:
            raise UserError(f"{word}: no such knob; {nearest(key, set(known))}")
        if not equals or not value:
            raise UserError(f"{word}: give {key}=VALUE")
        if key in given:
            raise UserError(f"{word}: {key} is given twice; {key}={given[key]} came first")
        given[key] = value
    for key, what in needed.items():
        if key not in given:
            raise UserError(f"{key}: is missing; give {key}={what}")
    return given


def flag(knob: str, value: str) -> bool:
    """true or false, as YAML and the command line write them."""
    if value not in ("true", "false"):
        raise UserError(f"{knob}={value}: must be true or false")
    return value == "true"


def integer(knob: str, value: str, smallest: int) -> int:
    """A word as an integer of at least `smallest`."""
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", value) or int(value) < smallest:
        raise UserError(f"{knob}={value}: must be an integer of at least {smallest}")
    return int(value)
