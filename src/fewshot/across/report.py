"""What a test on many datasets leaves: a table on the terminal and as CSV, a figure, and a folder for each setting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import rich.text
from matplotlib.figure import Figure

from fewshot.across.measure import Row
from fewshot.config.tree import MODES, STATISTICS
from fewshot.inner_loop import InnerLoop
from fewshot.results import record_files, task_scores
from fewshot.results.figures import DRAWN, plain, write_picture
from fewshot.results.record_files import percent, title

HEADS = ["dataset", "images", "ways", "shots", "queries", "test_zeroing", "step", "accuracy", "ci95", "tasks"]
HEADS += ["inner_steps", "left_out"]


def write_test(folder: Path, row: Row) -> None:
    """What `compare` reads of a run: results.json and tasks.csv.gz."""
    modes = {mode: {"accuracy": scores.accuracy, "ci95": scores.ci95} for mode, scores in row.scores.items()}
    tasks = len(row.tested["zeroing_on"])
    results = {"test": {"tasks": tasks, **modes}, "config": row.config, "versions": record_files.versions()}
    results["splits"] = row.splits
    task_scores.write_tasks(folder, {row.config["evaluation"]["statistics"]: {"test": row.tested}})
    record_files.write(folder, results)


def as_rows(rows: Sequence[Row], model: dict[str, Any]) -> list[list[Any]]:
    """Long: one row for each setting, mode and inner step; one for what was left out."""
    table: list[list[Any]] = [HEADS]
    for row in rows:
        start = [row.dataset, row.images, row.ways, row.shots]
        for mode, scores in row.scores.items():
            asked = [row.config["queries"], mode.removeprefix("zeroing_")]
            for step, (accuracy, ci95) in enumerate(zip(scores.accuracy, scores.ci95, strict=True)):
                end = [f"{accuracy:.6f}", f"{ci95:.6f}", scores.tasks, model["inner_steps"], ""]
                table.append([*start, *asked, step, *end])
        if row.left_out:
            table.append([*start, *[""] * (len(HEADS) - 5), row.left_out])
    return table


def trained(model: dict[str, Any]) -> str:
    return f"{InnerLoop.of(model).name}, trained on {title(model, algorithm=False)}"


def heading(model: dict[str, Any], of_test: dict[str, Any]) -> str:
    tasks, statistics = of_test["test_tasks"], of_test["evaluation"]["statistics"]
    normalised = f", queries normalised by evaluation.statistics={statistics}" * (statistics != STATISTICS[0])
    data = model["dataset"]
    kind = {1: "grey, from colour by luminance", 3: "in colour, from grey by repetition"}[data["channels"]]
    return (
        f"{trained(model)}: query accuracy in %, ± 95% confidence interval over {tasks} test tasks{normalised}\n"
        f"The images are made {data['size']}x{data['size']} pixels, {kind}, as the network takes them."
    )


def line(row: Row, model: dict[str, Any]) -> str:
    """What is said as soon as a setting is measured."""
    step = model["inner_steps"]
    parts = [f"{mode.replace('_', ' ')} {100 * scores.accuracy[step]:.2f}" for mode, scores in row.scores.items()]
    return f"{row.dataset} {row.ways}-way {row.shots}-shot: {', '.join(parts) or f'left out, {row.left_out}'}"


def table(rows: Sequence[Row], model: dict[str, Any]) -> str:
    """The table for a terminal: accuracies after as many inner steps as in training, and after the last of the test."""
    measured = [row for row in rows if row.tested]
    steps = sorted({model["inner_steps"], *(row.config["test_steps"] for row in measured)})
    drawing = rich.table.Table()
    for column in ("dataset", "images", "ways", "shots"):
        drawing.add_column(column, justify="right" if column in ("ways", "shots") else "left")
    for mode in MODES:
        for step in steps:
            trained = "*" * (step == model["inner_steps"])
            drawing.add_column(f"{mode.removeprefix('zeroing_')}, step {step}{trained}", justify="right")
    notes: list[str] = []
    for row in rows:
        cells = []
        for mode in MODES:
            scores = row.scores.get(mode)
            cells += [percent(scores.accuracy[s], scores.ci95[s]) if scores else "–" for s in steps]
        mark = ""
        if row.left_out:
            if row.left_out not in notes:
                notes.append(row.left_out)
            mark = f" [{notes.index(row.left_out) + 1}]"
        drawing.add_row(rich.text.Text(row.dataset + mark), row.images, str(row.ways), str(row.shots), *cells)
    console = rich.console.Console(color_system=None, width=110)
    with console.capture() as drawn:
        console.print(drawing)
    lines = ["off, on: test zeroing. *: as many inner steps as in training."]
    lines += [f"[{number}] left out: {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([heading(model, measured[0].config), drawn.get() + lines[0], *lines[1:]])


def figure(rows: Sequence[Row], model: dict[str, Any]) -> Figure:
    """Accuracy after as many inner steps as in training: a panel for each number of ways and shots."""
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    ways, shots = (sorted({getattr(row, knob) for row in rows}) for knob in ("ways", "shots"))
    size = (2.5 + 3.2 * len(shots), 1.4 + len(ways) * (0.7 + 0.42 * len(datasets)))
    drawing = Figure(figsize=size, layout="constrained")
    grid = drawing.subplots(len(ways), len(shots), sharex=True, sharey=True, squeeze=False)
    for row in rows:
        axes = grid[ways.index(row.ways), shots.index(row.shots)]
        place = datasets.index(row.dataset)
        for shift, (mode, (colour, marker, _)) in zip((-0.12, 0.12), DRAWN.items(), strict=True):
            if mode in row.scores:
                scores = row.scores[mode]
                accuracy, ci95 = (curve[model["inner_steps"]] for curve in (scores.accuracy, scores.ci95))
                axes.errorbar(accuracy, place + shift, xerr=ci95, color=colour, marker=marker, markersize=5, capsize=3)
        if not row.tested:
            axes.text(0.02, place, "left out", fontsize=8, color="grey", va="center")
    for axes, number, shot in (
        (grid[i, j], number, shot) for i, number in enumerate(ways) for j, shot in enumerate(shots)
    ):
        axes.axvline(1 / number, color="grey", linewidth=0.8, linestyle="--")
        axes.set_title(f"{number}-way {shot}-shot", fontsize=9, loc="left")
        last = len(datasets) - 0.5
        axes.set(xlim=(0, 1), ylim=(last, -0.5), xlabel="test query accuracy", yticks=range(len(datasets)))
        axes.set_yticklabels(datasets, parse_math=False)
        axes.label_outer()
        plain(axes)
    handles = [
        *(
            axes.errorbar([], [], xerr=[], color=colour, marker=marker, linestyle="none", label=label)
            for colour, marker, label in DRAWN.values()
        ),
        axes.plot([], [], color="grey", linewidth=0.8, linestyle="--", label="chance")[0],
    ]
    drawing.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    n, tasks = model["inner_steps"], next(row.scores["zeroing_on"].tasks for row in rows if row.tested)
    caption = f"{trained(model)}\nafter {n} inner step{'s' * (n > 1)}; bars: 95% confidence interval over {tasks} tasks"
    drawing.suptitle(caption, fontsize=10, parse_math=False)
    return drawing


def write(folder: Path, rows: Sequence[Row], model: dict[str, Any], kind: str) -> None:
    """across.csv and figures/across.png, for kind "pdf" as PDF too."""
    record_files.write_csv(folder / "across.csv", as_rows(rows, model))
    write_picture(folder / "figures" / "across", figure(rows, model), kind)
