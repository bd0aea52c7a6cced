"""The figures of a sweep."""

from collections.abc import Iterable
from itertools import count
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.legend import Legend

from fewshot.results.figures import BLUE, DRAWN, GREEN, MARKS, STYLES, VERMILLION, plain
from fewshot.results.record_files import steps_of_training, title
from fewshot.sweep.settings import Setting, mean_and_ci95, panel_title

COLOURS = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito without its yellow
# Places in COLOURS: what becomes of the head has one colour in all panels, also where not all three are drawn.
HEADS = {
    **{"random head": 0, "no zeroing": 0, "init_scale=1": 0},
    **{"zero at the start": 1, "init_scale=0": 1},
    **{"zeroed every update": 2, "zeroing": 2},
}
TRAINED = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "linestyle": "none"}  # around inner_steps


def sweep(settings: list[Setting]) -> Figure:
    """Accuracy over inner steps and outer iterations: mean and interval over seeds, both test-time zeroing modes."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    for (by_step, by_update), (mode, (*_, zeroing)) in zip(
        figure.subplots(2, 2, sharey="row"), DRAWN.items(), strict=True
    ):
        for number, setting in enumerate(settings):
            values = setting.accuracies(mode)
            if len(values):
                trained = steps_of_training(setting.config)
                _accuracies(by_step, number, np.arange(values.shape[1]), values, label=setting.label())
                if trained < values.shape[1]:
                    by_step.plot(trained, values.mean(axis=0)[trained], color=COLOURS[number % len(COLOURS)], **TRAINED)
            _, updates, curve = setting.curve(mode)
            _accuracies(by_update, number, updates, curve, label=setting.label())
        by_step.set(xlabel="inner step; circled: as many as in training", ylabel="query accuracy")
        by_step.xaxis.get_major_locator().set_params(integer=True)
        by_update.set(xlabel="outer iteration", ylabel="query accuracy after inner_steps steps")
        by_step.set_title(f"final test, {zeroing}", fontsize=9, loc="left")
        by_update.set_title(f"{_splits(settings, mode)} curve, {zeroing}", fontsize=9, loc="left")
        for axes in (by_step, by_update):
            plain(axes)
    return _of_all(figure, figure.axes, settings)


def panels(settings: list[Setting], knobs: list[str]) -> Figure:
    """The same curves over outer iterations, side by side for the values of one knob, or of two across and down."""
    across, down = (_distinct([setting.value(knob) for setting in settings]) for knob in (knobs[0], knobs[-1]))
    down = down if len(knobs) > 1 else [None]
    maml = all(setting.loop.is_maml for setting in settings)
    numbers = places(setting.label(without=knobs) for setting in settings)
    figure = Figure(figsize=(2 + 4.5 * len(across), 0.8 + 3.2 * len(down)), layout="constrained")
    grid = figure.subplots(len(down), len(across), sharex=True, sharey=True, squeeze=False)
    for row, below in zip(grid, down, strict=True):
        for axes, beside in zip(row, across, strict=True):
            heading = {knobs[0]: beside} | ({} if below is None else {knobs[-1]: below})
            for setting in settings:
                if all(setting.value(knob) == value for knob, value in heading.items()):
                    label = setting.label(without=knobs)
                    _, updates, curve = setting.curve("zeroing_off")
                    _accuracies(axes, numbers[label], updates, curve, label=label)
            axes.set_title(panel_title(heading, maml), fontsize=9, loc="left", parse_math=False)
            axes.set(xlabel="outer iteration", ylabel=f"{_splits(settings, 'zeroing_off')} accuracy")
            axes.label_outer()
            plain(axes)
    return _of_all(figure, grid, settings, "\nafter as many inner steps as in training, test zeroing off")


def places(labels: Iterable[str]) -> dict[str, int]:
    """Of each label its place in COLOURS, and that of its mark and line."""
    labels = dict.fromkeys(labels)
    others = count(1 + max(HEADS.values()) if labels.keys() & HEADS.keys() else 0)
    return {label: HEADS[label] if label in HEADS else next(others) for label in labels}


def _distinct(values: list[Any]) -> list[Any]:
    return [value for number, value in enumerate(values) if value not in values[:number]]


def _accuracies(axes: Axes, number: int, x: Any, values: Any, **style: Any) -> None:
    """values: (seeds, len(x))"""
    if len(x):
        style |= {"marker": MARKS[number % len(MARKS)], "markersize": 4, "markevery": max(1, len(x) // 10)}
        _mean_and_interval(axes, number, STYLES[number % len(STYLES)], x, values, within=(0, 1), **style)


def _of_all(figure: Figure, axes: Any, settings: list[Setting], more: str = "") -> Figure:
    """Adds one legend for all axes, outside them, and a line that says what the figure shows."""
    handles = {}  # the first of each label
    for panel in np.ravel(axes):
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [fill(label, 48) for label in handles]  # or a long one leaves the axes no room
    _as_text(figure.legend(handles.values(), labels, frameon=False, fontsize=9, loc="outside right upper"))
    of = " and ".join(dict.fromkeys(title(setting.config, algorithm=False) for setting in settings))
    seeds = _over_seeds(len(setting.accuracies("zeroing_off")) or len(setting.jobs) for setting in settings)
    figure.suptitle(f"{of}: {seeds}{more}", fontsize=10, parse_math=False)
    return figure


def _over_seeds(numbers: Iterable[int]) -> str:
    """numbers: how many seeds each setting has."""
    numbers = sorted(set(numbers))
    if numbers == [1]:
        return "1 seed"
    seeds = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
    return f"mean and 95% confidence interval over {seeds} seeds (Student t)"


def _splits(settings: list[Setting], mode: str) -> str:
    return " or ".join(dict.fromkeys({"val": "validation"}.get(s.curve(mode)[0], "test") for s in settings))


def _as_text(legend: Legend) -> None:
    """A $ in a knob's value does not begin a formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


PAIRS = (("query_support", "query and support"), ("query_query", "two queries"))  # of cosine_similarity.json


def cosine_similarity(runs: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """How alike the classes of one task become while it is trained on: {setting: cosine_similarity.json of its runs}.

    Above, same class and other class over the outer updates at which all runs were measured, of which there is at least
    one; below, class by class. Means over the runs of a setting, the bands are 95% confidence intervals (Student t).
    """
    updates = shared_updates(runs)
    matrices = {  # (runs, updates, K, K)
        pairs: {label: np.array([_at(updates, run, pairs) for run in group]) for label, group in runs.items()}
        for pairs, _ in PAIRS
    }
    heights = (3.3, 0.4 + len(runs))
    figure = Figure(figsize=(11, sum(heights)))
    figure.set_layout_engine("constrained", w_pad=0.1)
    seeds = _over_seeds(map(len, runs.values()))
    figure.suptitle(f"{title}: one task, unadapted encoder; {seeds}", fontsize=10, parse_math=False)
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = halves
    for axes, (pairs, name) in zip(above.subplots(1, 2, sharey=True), PAIRS, strict=True):
        for number, (label, values) in enumerate(matrices[pairs].items()):
            itself = np.eye(values.shape[-1], dtype=bool)
            marks = {"marker": MARKS[number % len(MARKS)], "markersize": 4, "markevery": max(1, len(updates) // 10)}
            _mean_and_interval(axes, number, "-", updates, values[..., itself].mean(axis=-1), label=label, **marks)
            _mean_and_interval(axes, number, "--", updates, values[..., ~itself].mean(axis=-1), **marks)
        axes.set(xlabel="outer update", ylabel="mean cosine similarity")
        axes.set_title(name, fontsize=9, loc="left")
        axes.label_outer()
        plain(axes)
    handles = axes.get_legend_handles_labels()[0]
    for line, meaning in (("-", "same class"), ("--", "other class")):
        handles += axes.plot([], [], line, color="grey", label=meaning)
    _as_text(above.legend(handles=handles, frameon=False, fontsize=9, loc="outside right center"))
    _class_matrices(below, updates, matrices)
    return figure


def shared_updates(runs: dict[str, list[dict[str, Any]]]) -> list[int]:
    """The outer updates at which all of these runs were measured."""
    return sorted(set.intersection(*({*run["updates"]} for group in runs.values() for run in group)))


def _at(updates: list[int], run: dict[str, Any], pairs: str) -> list[Any]:
    measured = dict(zip(run["updates"], run[pairs], strict=True))
    return [measured[update] for update in updates]


def _mean_and_interval(
    axes: Axes,
    number: int,
    line: str,
    x: Any,
    values: Any,
    within: tuple[float, float] = (-np.inf, np.inf),
    **style: Any,
) -> None:
    """values: (runs, len(x)); a single run has no interval, and none is drawn beyond `within`."""
    (mean, ci95), colour = mean_and_ci95(values), COLOURS[number % len(COLOURS)]
    axes.plot(x, mean, line, color=colour, linewidth=1.4, **style)
    low, high = ((mean + sign * ci95).clip(*within) for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _class_matrices(figure: SubFigure, updates: list[int], matrices: dict[str, dict[str, Any]]) -> None:
    """A row of K x K pictures per setting: after the first two and the last two updates, of each kind of pairs."""
    after = sorted({0, 1, len(updates) - 2, len(updates) - 1} & set(range(len(updates))))
    labels = list(matrices[PAIRS[0][0]])
    means = {(pairs, label): values.mean(axis=0) for pairs in matrices for label, values in matrices[pairs].items()}
    largest = max(np.abs(values[after]).max() for values in means.values())
    gap = len(after)  # the column between the two kinds
    grid = figure.subplots(len(labels), 2 * gap + 1, squeeze=False, width_ratios=[1] * gap + [0.15] + [1] * gap)
    for number, (row, label) in enumerate(zip(grid, labels, strict=True)):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, parse_math=False)
        row[gap].set_axis_off()
        for kind, (pairs, name) in enumerate(PAIRS):
            for place, update in enumerate(after, start=kind * (gap + 1)):
                scale = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}  # white: orthogonal
                picture = row[place].imshow(means[pairs, label][update], **scale)
                row[place].set(xticks=[], yticks=[])
                if number == 0:
                    heading = f"{name}\n" if update == 0 else "\n"
                    row[place].set_title(f"{heading}update {updates[update]}", fontsize=9, loc="left")
    figure.colorbar(picture, ax=grid, label="mean cosine similarity", aspect=30)
