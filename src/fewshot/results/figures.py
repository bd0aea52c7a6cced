"""The figures of one run and of its predictions."""

import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewshot.config import stored
from fewshot.config.tree import MODES
from fewshot.errors import printable
from fewshot.files import write_file
from fewshot.results.record_files import read_metrics, steps_of_training, tested_on, title

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito: told apart by the colour-blind
OFF, ON = BLUE, GREEN  # test zeroing: the colours of a random head and of one zeroed in training, in all pictures
CELLS = 40  # classes of a confusion matrix whose cells have room for numbers
DRAWN = {"zeroing_off": (OFF, "o", "test zeroing off"), "zeroing_on": (ON, "s", "test zeroing on")}


# Lines are told apart without colour too.
STYLES, MARKS = ("-", "--", "-.", ":"), "osD^vP*X"


def accuracy_over_iterations(curves: dict[str, list[tuple[int, float]]], config: dict[str, Any]) -> Figure:
    """Validation accuracy after inner_steps steps over outer iterations, and the test curve where one was recorded."""
    step = config["inner_steps"]
    figure, axes = _axes("outer iteration", f"query accuracy after {step} inner step{'s' * (step > 1)}", config)
    for split, style in (("val", "-"), ("test", ":")):
        for mode, suffix in MODES.items():
            colour, marker, label = DRAWN[mode]
            curve = curves.get(f"{split}{suffix}/query_accuracy/step_{step}")
            if curve:
                name = {"val": "validation", "test": "test curve"}[split]
                marks = {"marker": marker, "markersize": 4, "markevery": max(1, len(curve) // 10)}
                axes.plot(*zip(*curve, strict=True), style, color=colour, label=f"{name}, {label}", **marks)
    return with_legend(figure, axes)


def accuracy_over_steps(results: dict[str, Any], config: dict[str, Any]) -> Figure:
    """Accuracy over inner steps with 95% confidence intervals, both test-time zeroing modes."""
    figure, axes = _axes("inner step", "query accuracy", config)
    for (mode, (colour, marker, label)), line in zip(DRAWN.items(), STYLES, strict=False):
        scores = results["test"][mode]
        steps = range(len(scores["accuracy"]))
        style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "capsize": 3}
        axes.errorbar(steps, scores["accuracy"], scores["ci95"], label=label, **style)
    axes.set_xticks(steps)
    if (trained := steps_of_training(config)) in steps:
        axes.axvline(trained, color="grey", linewidth=0.8, linestyle=":", label="inner_steps of training")
    bars = f"bars: 95% confidence interval over {results['test']['tasks']} {tested_on(config)}"
    axes.set_title(f"{title(config)}\n{bars}", fontsize=10, parse_math=False)
    axes.axhline(1 / config["ways"], color="grey", linewidth=0.8, linestyle="--", label="chance")
    return with_legend(figure, axes)


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
    """The probes that probes=true recorded, over outer iterations."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(3, 2).flat, PROBES, strict=True):
        for (name, meaning), colour, style in zip(names, (VERMILLION, BLUE), ("-", "--"), strict=False):
            if curve := curves.get(f"probe/{name}"):
                axes.plot(*zip(*curve, strict=True), style, color=colour, label=meaning)
        axes.set(xlabel="outer iteration")
        axes.set_title(label, fontsize=9, loc="left")
        plain(axes)
        with_legend(figure, axes)
    figure.suptitle(f"{title(config)}: means over validation tasks, unadapted encoder", fontsize=10, parse_math=False)
    return figure


def inner_products(content: dict[str, list], config: dict[str, Any]) -> Figure:
    """How the inner products in inner_products.json are distributed, at up to four moments of the training."""
    shots = config["shots"]  # the loss wants the sum over a class's support to be 1
    chosen = sorted({round(place) for place in np.linspace(0, len(content["updates"]) - 1, 4)})
    figure = Figure(figsize=(7, 0.8 + 1.5 * len(chosen)), layout="constrained")
    for axes, place in zip(figure.subplots(len(chosen), sharex=True, squeeze=False).flat, chosen, strict=True):
        for name, colour, wanted in (("other_class", VERMILLION, 0), ("same_class", BLUE, 1 / shots)):
            counts = np.array(content[name][place])
            axes.stairs(
                counts / counts.sum(),
                np.linspace(content["between"][0], content["between"][1], len(counts) + 1),
                color=colour,
                fill=True,
                alpha=0.6,
                label=name.replace("_", " "),
            )
            axes.axvline(wanted, color=colour, linewidth=0.8, linestyle="--")
        axes.set_title(f"after {content['updates'][place]} outer updates", fontsize=9, loc="left")
        axes.set(ylabel="share of pairs")
        plain(axes)
    axes.set(xlabel=r"$\eta\,\phi(q)\cdot\phi(s)$; dashed: what the loss wants" + ", on average" * (shots > 1))
    figure.suptitle(f"{title(config)}, validation tasks", fontsize=10, parse_math=False)
    with_legend(figure, axes)
    return figure


def reliability(results: dict[str, Any], config: dict[str, Any]) -> Figure:
    """Accuracy over confidence of predictions after inner_steps; a dot for each bin, the larger the more queries."""
    step = min(config["inner_steps"], len(results["test"]["zeroing_off"]["accuracy"]) - 1)
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    for axes, (mode, (colour, marker, label)) in zip(figure.subplots(1, 2, sharey=True), DRAWN.items(), strict=True):
        measured = results["test"][mode]["calibration"]
        bins = {name: np.array(values[step], float) for name, values in measured["bins"].items()}
        sizes = 8 + 250 * bins["queries"] / max(bins["queries"].sum(), 1)
        axes.plot((0, 1), (0, 1), color="grey", linewidth=0.8, linestyle="--")
        axes.plot(bins["confidence"], bins["accuracy"], color=colour, linewidth=0.8)
        axes.scatter(bins["confidence"], bins["accuracy"], sizes, color=colour, marker=marker, alpha=0.8, clip_on=False)
        axes.set(xlabel="probability of the predicted class", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_title(f"{label}, calibration error {measured['error'][step]:.3f}", fontsize=9)
        plain(axes)
    figure.axes[0].set_ylabel(f"accuracy after {step} inner step{'s' * (step != 1)}")
    figure.suptitle(f"{title(config)}, test tasks; dashed: perfectly calibrated", fontsize=10, parse_math=False)
    return figure


def confusion(labels: Sequence[str], predicted: Sequence[str], classes: Sequence[str]) -> Figure:
    """How many images of each labelled class (a row) were taken for each class (a column).

    The classes are numbered as on the contact sheet: the font may lack the letters of their names.
    """
    place = {name: number for number, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, ([place[name] for name in labels], [place[name] for name in predicted]), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + min(0.45 * len(classes), 20)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the class's images", shrink=0.8)
    if len(classes) <= CELLS:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), color=colour, fontsize=8, ha="center", va="center")
    if len(classes) <= 2 * CELLS:
        names = [name if len(name) <= 24 else f"{name[:23]}\u2026" for name in map(printable, classes)]
        names = [f"{number} {name}" for number, name in enumerate(names, start=1)]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="labelled")
    right = int(counts.trace())
    axes.set_title(f"accuracy {right / counts.sum():.1%} ({right} of {counts.sum()} images)", fontsize=10)
    return figure


def write(folder: Path, results: dict[str, Any]) -> None:
    """The figures of a run, from its results and its metrics.csv."""
    config = results["config"]
    pictures = {"accuracy_over_steps": accuracy_over_steps(results, config)}
    if "calibration" in results["test"]["zeroing_off"]:
        pictures["reliability"] = reliability(results, config)
    if (folder / "metrics.csv").exists():
        curves = read_metrics(folder / "metrics.csv")
        pictures["accuracy_over_iterations"] = accuracy_over_iterations(curves, config)
        if any(name.startswith("probe/") for name in curves):
            pictures["probes"] = probes(curves, config)
    if (folder / "inner_products.json").exists():
        content = stored.read_json(folder / "inner_products.json")
        stored.check(str(folder), content, stored.PRODUCTS)
        pictures["inner_products"] = inner_products(content, config)
    for name, picture in pictures.items():
        write_picture(folder / "figures" / name, picture, config.get("figures", {}).get("format", "png"))


def write_picture(place: Path, figure: Figure, kind: str) -> None:
    """PLACE.png, and PLACE.pdf if that kind is asked for."""
    write_file(place.with_name(f"{place.name}.png"), png(figure))
    if kind == "pdf":
        write_file(place.with_name(f"{place.name}.pdf"), pdf(figure))


def png(figure: Figure, dpi: int = 150) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the names of others have any letters
        figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def pdf(figure: Figure) -> bytes:
    """Vectors; text stays text, in TrueType fonts, as publishers want it. The same figure gives the same bytes."""
    file = io.BytesIO()
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every table of a font
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(file, format="pdf", metadata={"CreationDate": None})
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


def with_legend(figure: Figure, axes: Axes) -> Figure:
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # outside the data
    return figure
