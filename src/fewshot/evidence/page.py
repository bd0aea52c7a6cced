"""What the page is made of: sections with their claim, theorem, picture, tables and verdicts; numbers in words.

Texts are plain: x_{i} is an index and §2.6 a section of docs/method.md, of which the template makes tags. What holds by
construction is a theorem with its reason; a verdict is of what could come out otherwise. `evidence`: evidence.json.
"""

from typing import Any, NamedTuple


class Verdict(NamedTuple):
    kind: str  # "holds", "fails", "partly" or "untested"
    words: str


Verdicts = dict[str, Verdict]  # by what they are about


class Picture(NamedTuple):
    name: str
    alt: str
    caption: str
    small: bool = False


class Table(NamedTuple):
    heads: tuple[str, ...]  # empty: none
    rows: list[tuple[str, ...]]
    kind: str = "numbers"


class Statement(NamedTuple):
    text: str
    verdicts: Verdicts
    notes: tuple[str, ...] = ()
    anchor: str = ""  # of what it links to


class Statements(NamedTuple):
    """A table of them."""

    heads: tuple[str, str]
    rows: list[Statement]
    heading: str = ""
    kind: str = "statements"


class Section(NamedTuple):
    anchor: str
    overline: str
    claim: str
    lead: str
    tables: list[Table | Statements]
    theorem: str = ""
    picture: Picture | None = None
    note: str = ""


def head_is_zero(evidence: dict[str, Any]) -> bool:
    """Or the same for every class, which has no effect either."""
    return all(evidence["same_for_all"].values())


def is_trained(evidence: dict[str, Any]) -> bool:
    return evidence["model"]["iteration"] > 0


HEAD_IS_ZERO = Verdict("untested", "not tested: this model’s head is zero, or the same for every class")
UNTRAINED = Verdict("untested", "not asked: this model has had no outer update")


def of_own_head(evidence: dict[str, Any], verdict: Verdict) -> Verdict:
    return HEAD_IS_ZERO if head_is_zero(evidence) else verdict


def either(holds: bool, words: str) -> Verdict:
    return Verdict("holds", f"holds: {words}") if holds else Verdict("fails", f"does not hold: {words}")


def by_share(share: float, words: str) -> Verdict:
    """It holds where all agree, in part where most do."""
    return Verdict("partly", f"holds in part: {words}") if 0.5 < share < 1 else either(share == 1, words)


def counted_steps(number: Any) -> str:
    return f"{number} inner step{'s' * (number != 1)}"


# Numbers, with a minus sign at which no line is broken


def short(value: float | None) -> str:
    """3e−16, 0.98, 0; None was no finite number."""
    if value is None:
        return "not a number"
    text = f"{value:.2g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace(".0e", "e")
    return text.replace("e-0", "e-").replace("-", "−")


def decimals(value: float | None) -> str:
    """0.55, −0.12"""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def percent(share: float | None) -> str:
    """82.8%; 100% and 0% are said of all and of none alone."""
    if share is None:
        return "–"
    text = f"{100 * share:.1f}".removesuffix(".0")
    if text == "100" and share < 1:
        return "> 99.9%"
    return "< 0.1%" if text == "0" and share > 0 else f"{text}%"


def interval(mean: float, half: float) -> str:
    return f"{100 * mean:.1f} ± {100 * half:.1f}%".replace("-", "−")
