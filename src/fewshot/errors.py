"""Mistakes that a user can mend, the end by a signal, and words in which they are said."""

from typing import Any


class UserError(Exception):
    """A mistake the user can mend: one line with the knob, its value and what would work.

    Names of others may stand in it, which could hold what a terminal obeys.
    """

    def __init__(self, line: str) -> None:
        super().__init__("\n".join(map(printable, line.split("\n"))))


class AtWork(UserError):
    """Another process writes the same run; no failure of that run."""


class RankGone(UserError):
    """Another rank has ended; why, is for that one to say."""


class Stopped(BaseException):
    """A signal ended the run; like KeyboardInterrupt nothing on the way takes it for an error."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def shown(value: Any) -> str:
    """A value as YAML and the command line write it, cut short where it is very long."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key}: {shown(each)}' for key, each in value.items())}}}"
    else:
        text = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
    return text if len(text) <= 300 else f"{text[:300]}..."


def one_line(text: str) -> str:
    return " ".join(text.split())


def printable(text: str) -> str:
    """Text of others as a terminal, a file in UTF-8 and a figure can take it: what has no glyph becomes its escape."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def some(names: list[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def nearest(key: str, known: set[str]) -> str:
    """What to try in place of a key that is not known."""
    from difflib import get_close_matches

    close = get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
