"""Recorded numbers -> pictures; trains nothing."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.legend import Legend
from matplotlib.patches import Rectangle
from scipy.special import stdtrit  # scipy.stats takes seconds to import

from fewshot.config import MODES
from fewshot.labels import is_maml, panel_title, title

if TYPE_CHECKING:
    from fewshot.sweep import Setting

OFF, ON = "#0072B2", "#D55E00"  # blue and vermillion of the Okabe-Ito palette: told apart by the colour-blind
DRAWN = {"zeroing_off": (OFF, "o", "test zeroing off"), "zeroing_on": (ON, "s", "test zeroing on")}


def accuracy_over_iterations(curves: dict[str, list[tuple[int, float]]], config: dict[str, Any]) -> Figure:
    """Validation accuracy after inner_steps steps over outer iterations, and the test curve where one was recorded."""
    step = config["inner_steps"]
    figure, axes = _axes("outer iteration", f"query accuracy after {step} inner step{'s' * (step > 1)}", config)
    for split, style in (("val", "-"), ("test", ":")):
        for mode, suffix in MODES.items():
            colour, _, label = DRAWN[mode]
            curve = curves.get(f"{split}{suffix}/query_accuracy/step_{step}")
            if curve:
                name = {"val": "validation", "test": "test curve"}[split]
                axes.plot(*zip(*curve, strict=True), style, color=colour, label=f"{name}, {label}")
    return _with_legend(figure, axes)


def accuracy_over_steps(results: dict[str, Any], config: dict[str, Any]) -> Figure:
    """Test accuracy over inner steps with 95% confidence intervals, both test-time zeroing modes."""
    figure, axes = _axes("inner step", "test query accuracy", config)
    for mode, (colour, marker, label) in DRAWN.items():
        scores = results["test"][mode]
        steps = range(len(scores["accuracy"]))
        axes.errorbar(
            steps, scores["accuracy"], scores["ci95"], color=colour, marker=marker, markersize=5, capsize=3, label=label
        )
    axes.set_xticks(steps)
    axes.axhline(1 / config["ways"], color="grey", linewidth=0.8, linestyle="--", label="chance")
    return _with_legend(figure, axes)


PROBES = (  # one panel each: title and (name, label)
    (
        "norm of the query gradient's terms",
        (("interference_norm", "interference"), ("contrastive_norm", "contrastive")),
    ),
    ("share of coefficients", (("wrong_sign", "wrong sign"),)),
    ("cosine similarity, query and support", (("cosine_other", "other class"), ("cosine_same", "same class"))),
    (
        "cosine similarity, two queries",
        (("cosine_other_queries", "other class"), ("cosine_same_queries", "same class")),
    ),
    ("norm, less what all classes share", (("head_norm", "head w0"),)),
    ("cosine similarity", (("cross_task", "head w0, likewise, and\na task's head gradient"),)),
)


def probes(curves: dict[str, list[tuple[int, float]]], config: dict[str, Any]) -> Figure:
    """What probes=true recorded, over outer iterations."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(3, 2).flat, PROBES, strict=True):
        for (name, meaning), colour, style in zip(names, (ON, OFF), ("-", "--"), strict=False):
            axes.plot(*zip(*curves[f"probe/{name}"], strict=True), style, color=colour, label=meaning)
        axes.set(xlabel="outer iteration")
        axes.set_title(label, fontsize=9, loc="left")
        _plain(axes)
        _with_legend(figure, axes)
    figure.suptitle(f"{title(config)}: means over validation tasks, unadapted encoder", fontsize=10, parse_math=False)
    return figure


COLOURS = (OFF, ON, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito, less the yellow
LINES = ("-", "--", ":", "-.")  # once the colours are used up


def sweep(settings: list["Setting"]) -> Figure:
    """Accuracy over inner steps and outer iterations: mean and interval over seeds, both test-time zeroing modes."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    for (by_step, by_update), (mode, (*_, zeroing)) in zip(
        figure.subplots(2, 2, sharey="row"), DRAWN.items(), strict=True
    ):
        for number, setting in enumerate(settings):
            values = setting.accuracies(mode)
            if len(values):
                steps, points = np.arange(values.shape[1]), {"marker": "o", "markersize": 4}
                _accuracies(by_step, number, steps, values, label=setting.label(), **points)
            _, updates, curve = setting.curve(mode)
            _accuracies(by_update, number, updates, curve, label=setting.label())
        by_step.set(xlabel="inner step", ylabel="test query accuracy")
        by_step.xaxis.get_major_locator().set_params(integer=True)
        by_update.set(xlabel="outer iteration", ylabel="query accuracy after inner_steps steps")
        by_step.set_title(f"final test, {zeroing}", fontsize=9, loc="left")
        by_update.set_title(f"{_splits(settings, mode)} curve, {zeroing}", fontsize=9, loc="left")
        for axes in (by_step, by_update):
            _plain(axes)
    return _of_all(figure, figure.axes, settings)


def panels(settings: list["Setting"], knobs: list[str]) -> Figure:
    """The same curves over outer iterations, side by side for the values of one knob, or of two across and down."""
    across, down = (_unlike([setting.value(knob) for setting in settings]) for knob in (knobs[0], knobs[-1]))
    down = down if len(knobs) > 1 else [None]
    maml = all(is_maml(setting.config["algo"]) for setting in settings)
    labels = list(dict.fromkeys(setting.label(without=knobs) for setting in settings))
    figure = Figure(figsize=(2 + 4.5 * len(across), 0.8 + 3.2 * len(down)), layout="constrained")
    grid = figure.subplots(len(down), len(across), sharex=True, sharey=True, squeeze=False)
    for row, below in zip(grid, down, strict=True):
        for axes, beside in zip(row, across, strict=True):
            heading = {knobs[0]: beside} | ({} if below is None else {knobs[-1]: below})
            for setting in settings:
                if all(setting.value(knob) == value for knob, value in heading.items()):
                    label = setting.label(without=knobs)
                    _, updates, curve = setting.curve("zeroing_off")
                    _accuracies(axes, labels.index(label), updates, curve, label=label)
            axes.set_title(panel_title(heading, maml), fontsize=9, loc="left", parse_math=False)
            axes.set(xlabel="outer iteration", ylabel="query accuracy")
            axes.label_outer()
            _plain(axes)
    return _of_all(figure, grid, settings)


def _unlike(values: list[Any]) -> list[Any]:
    return [value for number, value in enumerate(values) if value not in values[:number]]


def _accuracies(axes: Axes, number: int, x: Any, values: Any, **how: Any) -> None:
    """values: (seeds, len(x))"""
    if len(x):
        line = LINES[number // len(COLOURS) % len(LINES)]
        _mean_and_interval(axes, number, line, x, values, within=(0, 1), **how)


def _of_all(figure: Figure, axes: Any, settings: list["Setting"]) -> Figure:
    """One legend for all axes, outside them, and what the figure is of."""
    found = {}
    for each in np.ravel(axes):
        handles, labels = each.get_legend_handles_labels()
        found |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in found}
    legend = figure.legend(found.values(), found.keys(), frameon=False, fontsize=9, loc="outside right upper")
    _as_text(legend)
    of = " and ".join(dict.fromkeys(title(setting.config, algorithm=False) for setting in settings))
    seeds = _over_seeds(len(setting.accuracies("zeroing_off")) or len(setting.jobs) for setting in settings)
    figure.suptitle(f"{of}: {seeds}", fontsize=10, parse_math=False)
    return figure


def _over_seeds(numbers: Iterable[int]) -> str:
    """numbers: of seeds, one for each setting."""
    numbers = sorted(set(numbers))
    if numbers == [1]:
        return "1 seed"
    seeds = " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))
    return f"mean and 95% confidence interval over {seeds} seeds (Student t)"


def _splits(settings: list["Setting"], mode: str) -> str:
    return " or ".join(dict.fromkeys({"val": "validation"}.get(s.curve(mode)[0], "test") for s in settings))


def _axes(x: str, y: str, config: dict[str, Any]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title(config), fontsize=10, parse_math=False)  # a dataset's name is no formula
    _plain(axes)
    return figure, axes


def _as_text(legend: Legend) -> None:
    """A knob's value is no formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # outside the data
    return figure


PAIRS = (("query_support", "query and support"), ("query_query", "two queries"))  # of cosine_similarity.json


def cosine_similarity(runs: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """How alike the classes of one task become while it is trained on: {setting: cosine_similarity.json of its runs}.

    Above, same class and other class over outer updates, as far as all runs went; below, class by class. Means over the
    runs of a setting, the bands are 95% confidence intervals (Student t).
    """
    reached = min(len(run["updates"]) for group in runs.values() for run in group)
    updates = next(iter(runs.values()))[0]["updates"][:reached]
    matrices = {  # (runs, updates, K, K)
        pairs: {label: np.array([run[pairs][:reached] for run in group]) for label, group in runs.items()}
        for pairs, _ in PAIRS
    }
    heights = (3.3, 0.4 + len(runs))
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    seeds = _over_seeds(map(len, runs.values()))
    figure.suptitle(f"{title}: one task, unadapted encoder; {seeds}", fontsize=10, parse_math=False)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    for axes, (pairs, name) in zip(above.subplots(1, 2, sharey=True), PAIRS, strict=True):
        for number, (label, values) in enumerate(matrices[pairs].items()):
            itself = np.eye(values.shape[-1], dtype=bool)
            _mean_and_interval(axes, number, "-", updates, values[..., itself].mean(axis=-1), label=label)
            _mean_and_interval(axes, number, "--", updates, values[..., ~itself].mean(axis=-1))
        axes.set(xlabel="outer update", ylabel="mean cosine similarity")
        axes.set_title(name, fontsize=9, loc="left")
        axes.label_outer()
        _plain(axes)
    handles = axes.get_legend_handles_labels()[0]
    for line, meaning in (("-", "same class"), ("--", "other class")):
        handles += axes.plot([], [], line, color="grey", label=meaning)
    _as_text(above.legend(handles=handles, frameon=False, fontsize=9, loc="outside right center"))
    _class_matrices(below, updates, matrices)
    return figure


OVER_SEEDS = (
    "± is the 95% confidence interval over seeds (Student t), as are the bands of the figures.\n"
    "All seeds share the test tasks, so it leaves out what other test tasks would change.\n"
)


def mean_and_ci95(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and half width of its 95% confidence interval (Student t), (n, ...) -> (...); nan for n = 1."""
    n = len(values)
    if n < 2:
        return values.mean(axis=0), np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / n**0.5


def _mean_and_interval(
    axes: Axes, number: int, line: str, x: Any, values: Any, within: tuple[float, float] = (-np.inf, np.inf), **how: Any
) -> None:
    """values: (runs, len(x)); a single run has no interval, and none is drawn beyond `within`."""
    (mean, ci95), colour = mean_and_ci95(values), COLOURS[number % len(COLOURS)]
    axes.plot(x, mean, line, color=colour, linewidth=1.4, **how)
    axes.fill_between(
        x, *((mean + sign * ci95).clip(*within) for sign in (-1, 1)), color=colour, alpha=0.2, linewidth=0
    )


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


SHEET_COLUMNS, SHEET_CLASSES, SHEET_QUERIES = 10, 50, 200  # of a contact sheet; a class has one row of support images


def contact_sheet(support: dict[str, list[Any]], queries: list[tuple[Any, str, str, float]]) -> Figure:
    """The support images, a class a row, and below them the queries with what was predicted, in their order.

    support: {class: images (H, W[, 3]) uint8}; queries: image, file, predicted class and its probability.
    """
    inch, captions = 1.12, 0.62  # heights: of a row of images, and of what is said under a query
    some = f", the first {SHEET_QUERIES} of {len(queries)}" if len(queries) > SHEET_QUERIES else ""
    some_classes = f", the first {SHEET_CLASSES} of {len(support)} classes" if len(support) > SHEET_CLASSES else ""
    numbered = {name: f"{number} {name}" for number, name in enumerate(support, start=1)}
    queries, support = queries[:SHEET_QUERIES], dict(list(support.items())[:SHEET_CLASSES])
    height = 2.1 + inch * len(support) + (inch + captions) * -(-len(queries) // SHEET_COLUMNS)
    figure = Figure(figsize=(SHEET_COLUMNS + 2.2, height))
    axes = figure.add_axes((0, 0, 1, 1))

    def say(x: float, y: float, text: str, most: int = 80, **how: Any) -> None:
        short = text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
        axes.text(x, y, short, va="center", parse_math=False, **{"fontsize": 8, **how})  # a name is no formula

    def place(image: Any, column: int, top: float) -> None:
        grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.ndim == 2 else {}
        axes.imshow(image, extent=(column, column + 0.96, top + 0.96, top), aspect="auto", **grey)
        axes.add_patch(Rectangle((column, top), 0.96, 0.96, fill=False, edgecolor="lightgrey", linewidth=0.5))

    say(0, 0.45, f"support{some_classes}: what the model adapted to", fontsize=11)
    for row, (name, images) in enumerate(support.items()):
        y = 0.75 + inch * row
        say(-0.1, y + 0.48, numbered[name], most=22, ha="right")
        for column, image in enumerate(images[:SHEET_COLUMNS]):
            place(image, column, y)
        if len(images) > SHEET_COLUMNS:
            say(SHEET_COLUMNS, y + 0.48, f"+{len(images) - SHEET_COLUMNS}")
    top = 1.65 + inch * len(support)
    say(0, top - 0.3, f"queries{some}: predicted class and its probability", fontsize=11)
    for number, (image, file, name, probability) in enumerate(queries):
        row, column = divmod(number, SHEET_COLUMNS)
        y = top + row * (inch + captions)
        place(image, column, y)
        say(column + 0.48, y + 1.1, numbered[name], most=12, ha="center")
        say(column + 0.48, y + 1.27, f"{probability:.2f}", ha="center")
        say(column + 0.48, y + 1.43, file.rsplit("/", 1)[-1], most=16, ha="center", color="grey", fontsize=6.5)
    axes.set(xlim=(-1.8, SHEET_COLUMNS + 0.4), ylim=(height, 0))  # inches, from the top
    axes.set_axis_off()
    return figure
