"""The figures of one run and of its predictions."""

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fewshot.config.tree import MODES
from fewshot.files import write_file
from fewshot.results.record_files import read_metrics, title

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
        plain(axes)
        _with_legend(figure, axes)
    figure.suptitle(f"{title(config)}: means over validation tasks, unadapted encoder", fontsize=10, parse_math=False)
    return figure


def write(folder: Path, results: dict[str, Any]) -> None:
    """The figures of a run, from its results and its metrics.csv."""
    config = results["config"]
    pictures = {"accuracy_over_steps": accuracy_over_steps(results, config)}
    if (folder / "metrics.csv").exists():
        curves = read_metrics(folder / "metrics.csv")
        pictures["accuracy_over_iterations"] = accuracy_over_iterations(curves, config)
        if any(name.startswith("probe/") for name in curves):
            pictures["probes"] = probes(curves, config)
    for name, picture in pictures.items():
        write_file(folder / "figures" / f"{name}.png", png(picture))


def png(figure: Figure, dpi: int = 150) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def _axes(x: str, y: str, config: dict[str, Any]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title(config), fontsize=10, parse_math=False)  # a dataset's name is no formula
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # outside the data
    return figure


SHEET_COLUMNS, SHEET_CLASSES, SHEET_QUERIES = 10, 50, 200  # of a contact sheet; a class has one row of support images


def contact_sheet(support: dict[str, list[Any]], queries: list[tuple[Any, str, str, float]]) -> Figure:
    """The support images, a class a row, and below them the queries with what was predicted, in their order.

    support: {class: images (H, W[, 3]) uint8}; queries: image, file, predicted class and its probability.
    """
    inch, captions = 1.12, 0.62  # heights: of a row of images, and of what is said under a query
    shown_queries = f", the first {SHEET_QUERIES} of {len(queries)}" if len(queries) > SHEET_QUERIES else ""
    shown_classes = f", the first {SHEET_CLASSES} of {len(support)} classes" if len(support) > SHEET_CLASSES else ""
    numbered = {name: f"{number} {name}" for number, name in enumerate(support, start=1)}
    queries, support = queries[:SHEET_QUERIES], dict(list(support.items())[:SHEET_CLASSES])
    height = 2.1 + inch * len(support) + (inch + captions) * -(-len(queries) // SHEET_COLUMNS)
    figure = Figure(figsize=(SHEET_COLUMNS + 2.2, height))
    axes = figure.add_axes((0, 0, 1, 1))

    def say(x: float, y: float, text: str, most: int = 80, **style: Any) -> None:
        short = text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
        axes.text(x, y, short, va="center", parse_math=False, **{"fontsize": 8, **style})  # a name is no formula

    def place(image: Any, column: int, top: float) -> None:
        grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.ndim == 2 else {}
        axes.imshow(image, extent=(column, column + 0.96, top + 0.96, top), aspect="auto", **grey)
        axes.add_patch(Rectangle((column, top), 0.96, 0.96, fill=False, edgecolor="lightgrey", linewidth=0.5))

    say(0, 0.45, f"support{shown_classes}: what the model adapted to", fontsize=11)
    for row, (name, images) in enumerate(support.items()):
        y = 0.75 + inch * row
        say(-0.1, y + 0.48, numbered[name], most=22, ha="right")
        for column, image in enumerate(images[:SHEET_COLUMNS]):
            place(image, column, y)
        if len(images) > SHEET_COLUMNS:
            say(SHEET_COLUMNS, y + 0.48, f"+{len(images) - SHEET_COLUMNS}")
    top = 1.65 + inch * len(support)
    say(0, top - 0.3, f"queries{shown_queries}: predicted class and its probability", fontsize=11)
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
