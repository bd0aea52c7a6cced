"""What was measured -> pictures.

Shapes: S support and Q query images of the task that is shown, K ways; an image is (H, W, 3) or (H, W), 0 .. 1.
"""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from fewshot.results.figures import OFF, ON

# Okabe-Ito, and a marker each: classes are told apart without colour too. A ninth class begins again.
CLASSES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
SIGNED = LinearSegmentedColormap.from_list("signed", [OFF, "#FFFFFF", ON])  # blue below zero, vermillion above
ANNOTATED = 8  # up to so many ways a cell has room for its number
BAR = {"location": "bottom", "pad": 0.03}
COSINE = {**BAR, "ticks": [-1, -0.5, 0, 0.5, 1]}
STEP = {"marker": r"$\rightarrow$", "markeredgewidth": 0, "markersize": 16}


class Shown(NamedTuple):
    """The images of the task that is shown, and the labels."""

    support: np.ndarray
    support_labels: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray

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


def motivating_example(found: dict[str, Any], shown: Shown) -> Figure:
    """The classifier against the support features, and the logits against the inner products."""
    figure = Figure(figsize=_size(3), layout="constrained")
    left, middle, right = axes = figure.subplots(1, 3)
    most = np.abs([found["logits"], found["inner_products"]]).max()
    cosines = _heat_map(left, found["classifier"], 1, "column $i$ of $w_1$ and\nsupport features of class $j$")
    logits = _heat_map(middle, found["logits"], most, "logit of each query\nafter the step")
    _heat_map(right, found["inner_products"], most, "inner product\n$\\eta\\,\\phi(q)\\cdot m_j$")
    left.set_yticks(range(shown.ways), [f"$i={k + 1}$" for k in range(shown.ways)], fontsize=10)
    for each in axes:
        _beside(each, shown.prototypes, "columns")
    for each in (middle, right):
        _beside(each, shown.queries, "rows")
    figure.colorbar(cosines, ax=left, **COSINE, shrink=0.9, aspect=18, label="cosine similarity")
    figure.colorbar(logits, ax=[middle, right], **BAR, shrink=0.45, aspect=18, label="logit, inner product")
    return figure


def outer_step(found: dict[str, Any], shown: Shown, head_is_zero: bool) -> Figure:
    """Where an outer step moves the features, FOMAML beside SOMAML, from this model's head and from a zeroed one."""
    heads = {"this_head": "this model's head", "zeroed_head": "head zeroed"}
    if head_is_zero:
        heads = {"zeroed_head": "head zero"}
    support, query = np.array(found["support"]), np.array(found["query"])
    everything = np.concatenate([support, query])
    low, high = everything.min(0), everything.max(0)
    span = max(high - low)
    margin = 0.22 * span  # more than the longest arrow
    wide, tall = high - low + 2 * margin
    figure = Figure(figsize=(9, 0.7 + (0.4 + 4.4 * tall / wide) * len(heads)), layout="constrained")
    for row, (name, head) in zip(figure.subplots(len(heads), 2, squeeze=False), heads.items(), strict=True):
        arrows = {
            kind: {order: np.array(found[name][order][f"{kind}_arrows"]) for order in ("fomaml", "somaml")}
            for kind in ("query", "support")
        }
        for kind, orders in arrows.items():  # a scale of its own for each kind: both can be seen, and FOMAML's 0 is 0
            longest = max(np.hypot(*each.T).max() for each in orders.values())
            arrows[kind] = {order: 0.2 * span / longest * each if longest else each for order, each in orders.items()}
        for axes, order in zip(row, ("fomaml", "somaml"), strict=True):
            _moved(axes, query, arrows["query"][order], shown.query_labels, large=False)
            _moved(axes, support, arrows["support"][order], shown.support_labels, large=True)
            axes.set_title(f"{order.upper()}, {head}", fontsize=11)
            axes.set(xticks=[], yticks=[], aspect="equal")
            axes.set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))
            axes.spines[:].set_color("#BBBBBB")
    grey = {"marker": "o", "color": "none", "markerfacecolor": "grey"}
    legend = {
        "support image": Line2D([], [], **grey, markeredgecolor="black", markersize=11),
        "and its step": Line2D([], [], **STEP, color="none", markerfacecolor="black"),
        "query": Line2D([], [], **grey, markeredgecolor="none", markersize=5),
        "and its step (a scale of its own)": Line2D([], [], **STEP, color="none", markerfacecolor="grey"),
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return figure


def coefficients(found: dict[str, Any], shown: Shown, head_is_zero: bool) -> Figure:
    """c_qs of every query and support image, a dot where the sign is wrong."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    cases = {
        "this_head": "this model's head,\none step",
        "zeroed_head": "head zeroed,\none step",
        "more_steps": f"head zeroed,\n{found['inner_steps']} steps, summed",
    }
    if head_is_zero:
        del cases["this_head"]
    values = {name: np.array(found[name]["first_task"]) for name in cases}
    most = max(np.abs(c).max() for c in values.values())
    panels = figure.subplots(1, len(cases), sharey=True)
    for axes, (name, title) in zip(panels, cases.items(), strict=True):
        c = values[name]
        image = axes.imshow(c, cmap=SIGNED, vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        if found[name]["first_task_wrong"]:
            row, column = np.array(found[name]["first_task_wrong"]).T
            axes.plot(column, row, ".", color="black", markersize=3.5)
        for border in np.flatnonzero(np.diff(shown.query_labels)) + 0.5:
            axes.axhline(border, color="#888888", linewidth=0.6)
        for border in np.flatnonzero(np.diff(shown.support_labels)) + 0.5:
            axes.axvline(border, color="#888888", linewidth=0.6)
        axes.set_title(title, fontsize=11)
        axes.set_xticks(*_middles(shown.support_labels))
        axes.set_yticks(*_middles(shown.query_labels))
        axes.tick_params(length=0)
        axes.set_xlabel("class of the support image")
    panels[0].set_ylabel("class of the query")
    label = "$c_{qs}$: the query is moved away (below 0) or toward (above 0)"
    figure.colorbar(image, ax=panels, location="bottom", shrink=0.6, aspect=40, label=label)
    wrong = Line2D([], [], marker=".", color="none", markerfacecolor="black", markeredgecolor="black")
    figure.legend([wrong], ["wrong sign"], loc="outside lower right", frameon=False, fontsize=10)
    return figure


def similarity(found: dict[str, Any], shown: Shown) -> Figure:
    """Mean cosines between the classes, query x support and query x query."""
    figure = Figure(figsize=_size(2), layout="constrained")
    left, right = panels = figure.subplots(1, 2)
    for axes, name, other in ((left, "query_support", "support images"), (right, "query_query", "other queries")):
        image = _heat_map(axes, found["first_task"][name], 1, f"queries (rows)\nand {other} (columns)")
        _beside(axes, shown.queries, "rows")
    _beside(left, shown.prototypes, "columns")
    _beside(right, shown.queries, "columns")
    figure.colorbar(image, ax=panels, **COSINE, shrink=0.5, aspect=30, label="mean cosine similarity")
    return figure


def memory(found: dict[str, Any], shown: Shown, head_is_zero: bool) -> Figure:
    """Cosines of the classifier's columns, less their mean, and the support means, before and after one inner step."""
    cases = {
        "this_head_before": "this head, before\nthe inner step",
        "this_head_after": "this head, after\none inner step",
        "zeroed_head_after": "head zeroed, after\none inner step",
    }
    if head_is_zero:
        cases = {"zeroed_head_after": "head zero, after\none inner step"}
    cases = {name: title for name, title in cases.items() if found[name]}
    figure = Figure(figsize=_size(len(cases)), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, (name, title) in zip(panels, cases.items(), strict=True):
        image = _heat_map(axes, found[name]["first_task"], 1, title)
        _beside(axes, shown.prototypes, "columns")
        axes.set_yticks(range(shown.ways), [f"$i={k + 1}$" for k in range(shown.ways)], fontsize=10)
    panels[0].set_ylabel("column of the classifier", fontsize=10)
    figure.colorbar(image, ax=panels, **COSINE, shrink=0.5, aspect=30, label="cosine similarity")
    return figure


def prototypes(found: dict[str, Any], ways: int, head_is_zero: bool) -> Figure:
    """Agreement of the adapted model and the prototype classifier over inner steps."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    lines = [("this_head", OFF, "o", "from this model's head"), ("zeroed_head", ON, "s", "from a zeroed head")]
    if head_is_zero:
        lines = [("zeroed_head", ON, "s", "from this model's head,\nwhich is zero")]
    for name, colour, marker, label in lines:
        steps = range(1, len(found[name]) + 1)
        axes.plot(steps, found[name], color=colour, marker=marker, markersize=6, label=label)
    axes.axhline(1 / ways, color="grey", linewidth=0.9, linestyle="--", label="chance")
    axes.set(xlabel="inner step", ylabel="share of queries given\nthe same class", ylim=(0, 1.04))
    axes.set_xticks(steps)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _size(panels: int) -> tuple[float, float]:
    """Of so many heat maps side by side, each as high as wide with its images, two lines above and a bar below."""
    wide = {1: 4.5, 2: 8.0, 3: 9.5}[panels]
    return wide, wide / panels + 1.35


def _heat_map(axes: Axes, values: list, most: float, title: str) -> ScalarMappable:
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


def _beside(axes: Axes, images: np.ndarray, place: str) -> None:
    """The K images above the columns of a heat map, or left of its rows, each as large as a cell."""
    limits = {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
    for number, image in enumerate(images):
        x, y = (number, -1.05) if place == "columns" else (-1.05, number)
        square = (x - 0.44, x + 0.44, y + 0.44, y - 0.44)
        axes.imshow(image, extent=square, cmap="gray", vmin=0, vmax=1, clip_on=False)
        axes.add_patch(Rectangle((x - 0.44, y - 0.44), 0.88, 0.88, fill=False, edgecolor="#BBBBBB", clip_on=False))
    axes.set(**limits)


def _moved(axes: Axes, places: np.ndarray, arrows: np.ndarray, labels: np.ndarray, large: bool) -> None:
    for k in np.unique(labels):
        colour, marker = CLASSES[k % len(CLASSES)], MARKERS[k % len(MARKERS)]
        x, y = places[labels == k].T
        edge = {"edgecolors": "black", "linewidths": 1.2} if large else {"linewidths": 0}
        axes.scatter(x, y, s=150 if large else 22, c=colour, marker=marker, zorder=3 if large else 2, **edge)
        u, v = arrows[labels == k].T
        moves = np.hypot(u, v) > 0
        if moves.any():
            axes.quiver(
                *(each[moves] for each in (x, y, u, v)),
                **{"angles": "xy", "scale_units": "xy", "scale": 1, "color": "black" if large else colour},
                **{"width": 0.008 if large else 0.0045, "zorder": 4 if large else 2},
            )


def _middles(labels: np.ndarray) -> tuple[list[float], list[str]]:
    """Where each class's rows or columns have their middle, and its name."""
    return [np.flatnonzero(labels == k).mean() for k in np.unique(labels)], [str(k + 1) for k in np.unique(labels)]
