"""Mistakes that a user can mend, the end by a signal, and the words in which both are said."""

from difflib import get_close_matches
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: one line with the knob, its value and what would work.

    Names that others chose may stand in it, so what a terminal would obey is escaped.
    """

    def __init__(self, line: str) -> None:
        super().__init__("\n".join(map(printable, line.split("\n"))))


class RunLocked(UserError):
    """Another process writes into the same run; the run itself has not failed."""


class RankGone(UserError):
    """Another rank has ended, and says itself why."""


class Unreachable(UserError):
    """Other ranks cannot be reached, or those of another machine are gone; the first rank of each machine says so."""


class Stopped(BaseException):
    """A signal ended the run. No `except Exception` on the way catches it, as none catches KeyboardInterrupt."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def shown(value: Any) -> str:
    """A value as YAML and the command line write it; a very long one is cut short."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    else:
        text = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
    return text if len(text) <= 300 else f"{text[:300]}..."


def one_line(text: object) -> str:
    """A text, or what an error says, with its lines joined to one."""
    return " ".join(str(text).split())


def first_line(error: BaseException | None) -> str:
    """The first line of what an error says; the name of its class where it says nothing."""
    return str(error).split("\n")[0] or type(error).__name__


def reason_of(error: BaseException) -> str:
    """Why Hydra could not make something, in a line: the error behind the one that Hydra raises."""
    inside = error.__cause__ or error
    if str(inside).startswith("Error loading "):  # a name that cannot be imported
        inside = inside.__cause__ or inside
    return first_line(inside)


def printable(text: str) -> str:
    """Text of others, made safe for a terminal, a file in UTF-8 and a figure: a letter without a glyph is escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def first_few(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def of_extra(extra: str, package: str) -> str:
    """A package that may not be there, and how it is installed, in a checkout and elsewhere."""
    return f"{package}; uv sync --extra {extra}, or pip install {package}"


def nearest(key: str, known: set[str]) -> str:
    """What to try in place of a key that is not known."""
    close = get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
