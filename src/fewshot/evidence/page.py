"""What a claim says and draws with: sections, tables and verdicts, numbers in words, heat maps with images beside them.

Texts are plain: x_{i} is an index and §2.6 a section of docs/method.md, of which the template makes tags. What holds by
construction is a theorem with its reason; a verdict is of what could come out otherwise.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from torch import Tensor

from fewshot.data.task import Task
from fewshot.results.figures import BLUE, VERMILLION

SIGNED = LinearSegmentedColormap.from_list("signed", [BLUE, "#FFFFFF", VERMILLION])  # below and above zero
ANNOTATED = 8  # up to so many ways a cell has room for its number
BAR = {"location": "bottom", "pad": 0.03}
COSINE = {**BAR, "ticks": [-1, -0.5, 0, 0.5, 1]}
Evidence = dict[str, Any]  # evidence.json, or a part of it


class Verdict(NamedTuple):
    kind: str  # "holds", "fails", "partly" or "untested"
    words: str


Verdicts = dict[str, Verdict]  # by what they are about


class Picture(NamedTuple):
    name: str
    alt: str
    caption: str
    small: bool = False


class Statement(NamedTuple):
    text: str
    verdicts: Verdicts
    notes: tuple[str, ...] = ()
    anchor: str = ""  # of what it links to


class Table(NamedTuple):
    heads: tuple[str, ...]  # empty: none
    rows: list[tuple[str, ...]] | list[Statement]
    kind: str = "numbers"  # or "plain", or "statements"
    heading: str = ""


class Section(NamedTuple):
    overline: str
    claim: str
    lead: str
    tables: list[Table]
    theorem: str = ""
    picture: Picture | None = None
    note: str = ""


def head_is_zero(evidence: Evidence) -> bool:
    """Whether the head is zero, or the same for every class, which has no effect either."""
    return all(evidence["same_for_all"].values())


HEADS = {"this_head": "this head", "zeroed_head": "head zeroed"}
HEAD_IS_ZERO = Verdict("untested", "not tested: this model’s head is zero, or the same for every class")
UNTRAINED = Verdict("untested", "not asked: this model has had no outer update")


def of_own_head(evidence: Evidence, verdict: Verdict) -> Verdict:
    return HEAD_IS_ZERO if head_is_zero(evidence) else verdict


def of_training(evidence: Evidence, verdict: Verdict) -> Verdict:
    return UNTRAINED if evidence["model"]["iteration"] == 0 else verdict


def either(holds: bool, words: str) -> Verdict:
    return Verdict("holds", f"holds: {words}") if holds else Verdict("fails", f"does not hold: {words}")


def by_share(share: float, words: str) -> Verdict:
    """It holds where all agree, in part where most do."""
    return Verdict("partly", f"holds in part: {words}") if 0.5 < share < 1 else either(share == 1, words)


def verdict_on(check: Evidence) -> Verdict:
    """check: an equation as in evidence.json, where None is no finite number."""
    value, bound = short(check["value"]), short(check["bound"])
    if check["pass"]:
        return Verdict("holds", f"holds exactly ({value} ≤ {bound})")
    return Verdict("fails", f"does not hold ({value if check['value'] is None else f'{value} > {bound}'})")


def updates(evidence: Evidence) -> str:
    """The model's outer updates in words; an exported model may not say how many they were."""
    number = evidence["model"]["iteration"]
    return "an unknown number of outer updates" if number is None else counted(number, "outer update")


def counted(number: Any, what: str = "inner step") -> str:
    return f"{number} {what}{'s' * (number != 1)}"


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


def interval(mean: float | None, half: float | None) -> str:
    if mean is None or half is None:
        return "–"
    return f"{100 * mean:.1f} ± {100 * half:.1f}%".replace("-", "−")


# Pictures. S support and Q query images of the task that is shown, K ways; an image is (H, W, 3) or (H, W), 0 .. 1.


class Shown(NamedTuple):
    """The task that is shown."""

    support: np.ndarray
    support_labels: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray

    @classmethod
    def first_of(cls, tasks: Task, dataset: dict[str, Any]) -> "Shown":
        """The first task, its images as they were before they were normalised."""
        mean, std = (np.array(dataset[name])[:, None, None] for name in ("mean", "std"))

        def images(normalised: Tensor) -> np.ndarray:
            pixels = (normalised.numpy() * std + mean).clip(0, 1)  # (I, C, H, W)
            return pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)

        support, support_labels, query, query_labels = (field[0] for field in tasks)
        return cls(images(support), support_labels.numpy(), images(query), query_labels.numpy())

    @property
    def ways(self) -> int:
        return int(self.support_labels.max()) + 1

    @property
    def prototypes(self) -> list[np.ndarray]:
        """The first support image of each class."""
        return [self.support[self.support_labels == k][0] for k in range(self.ways)]

    @property
    def queries(self) -> list[np.ndarray]:
        """The first query of each class."""
        return [self.query[self.query_labels == k][0] for k in range(self.ways)]


def size_of(panels: int) -> tuple[float, float]:
    """Width and height of a figure of heat maps side by side, with their images, two lines above and a bar below."""
    wide = {1: 4.5, 2: 8.0, 3: 9.5}[panels]
    return wide, wide / panels + 1.35


def heat_map(
    axes: Axes, values: list, most: float, title: str, columns: list, rows: Sequence[Any] = ()
) -> ScalarMappable:
    """values (K, K) from -most to most, each cell with its number where there is room, and the title above all.

    K images stand above the columns and left of the rows. Without the latter the rows are columns i of the classifier.
    """
    numbers = np.array(values, dtype=float)
    image = axes.imshow(numbers, cmap=SIGNED, vmin=-most, vmax=most)
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.text(0.5, 1.06 + 1 / len(values), title, transform=axes.transAxes, ha="center", va="bottom", fontsize=11)
    if len(values) <= ANNOTATED:
        for (row, column), value in np.ndenumerate(numbers):
            colour = "white" if value < -0.7 * most else "black"
            number = "–" if np.isnan(value) else f"{value + 0.0:.2f}".replace("-0.00", "0.00")
            axes.text(column, row, number, ha="center", va="center", fontsize=10, color=colour)
    limits = {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
    if not rows:
        axes.set_yticks(range(len(values)), [f"$i={k + 1}$" for k in range(len(values))], fontsize=10)
    images = [(number, -1.05, column) for number, column in enumerate(columns)]
    for x, y, pixels in images + [(-1.05, number, row) for number, row in enumerate(rows)]:
        square = (x - 0.44, x + 0.44, y + 0.44, y - 0.44)
        axes.imshow(pixels, extent=square, cmap="gray", vmin=0, vmax=1, clip_on=False)
        axes.add_patch(Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, fill=False, edgecolor="#BBBBBB", clip_on=False))
    axes.set(**limits)
    return image
