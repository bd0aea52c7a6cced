"""What several claims draw with: the images of the task that is shown, and heat maps with images beside them.

Shapes: S support and Q query images of the task, K ways; an image is (H, W, 3) or (H, W), 0 .. 1.
"""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from torch import Tensor

from fewshot.data.task import Task
from fewshot.results.figures import OFF, ON

SIGNED = LinearSegmentedColormap.from_list("signed", [OFF, "#FFFFFF", ON])  # blue below zero, vermillion above
ANNOTATED = 8  # up to so many ways a cell has room for its number
BAR = {"location": "bottom", "pad": 0.03}
COSINE = {**BAR, "ticks": [-1, -0.5, 0, 0.5, 1]}


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
    def prototypes(self) -> np.ndarray:
        """The first support image of each class."""
        return np.stack([self.support[self.support_labels == k][0] for k in range(self.ways)])

    @property
    def queries(self) -> np.ndarray:
        """The first query of each class."""
        return np.stack([self.query[self.query_labels == k][0] for k in range(self.ways)])


def size_of(panels: int) -> tuple[float, float]:
    """Of so many heat maps side by side, each as high as wide with its images, two lines above and a bar below."""
    wide = {1: 4.5, 2: 8.0, 3: 9.5}[panels]
    return wide, wide / panels + 1.35


def heat_map(axes: Axes, values: list, most: float, title: str) -> ScalarMappable:
    """values (K, K) from -most to most, each cell with its number where there is room; the title above the images."""
    values = np.array(values, dtype=float)
    image = axes.imshow(values, cmap=SIGNED, vmin=-most, vmax=most)
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.text(0.5, 1.06 + 1 / len(values), title, transform=axes.transAxes, ha="center", va="bottom", fontsize=11)
    if len(values) <= ANNOTATED:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < -0.7 * most else "black"
            number = "–" if np.isnan(value) else f"{value + 0.0:.2f}".replace("-0.00", "0.00")
            axes.text(column, row, number, ha="center", va="center", fontsize=10, color=colour)
    return image


def beside(axes: Axes, images: np.ndarray, place: str) -> None:
    """The K images above the columns of a heat map, or left of its rows, each as large as a cell."""
    limits = {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
    for number, image in enumerate(images):
        x, y = (number, -1.05) if place == "columns" else (-1.05, number)
        square = (x - 0.44, x + 0.44, y + 0.44, y - 0.44)
        axes.imshow(image, extent=square, cmap="gray", vmin=0, vmax=1, clip_on=False)
        axes.add_patch(Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, fill=False, edgecolor="#BBBBBB", clip_on=False))
    axes.set(**limits)


def number_columns(axes: Axes, ways: int) -> None:
    """The rows of a heat map are columns i of the classifier."""
    axes.set_yticks(range(ways), [f"$i={k + 1}$" for k in range(ways)], fontsize=10)
