"""The poster's panel 1 at full length: keeps finished runs in this folder, and makes the figure and the tables of them.

    python docs/results/panel1.py [RUN ...]

RUN: the output folders of finished runs, each called ALGO-ORDER-seedSEED, such as zero_init-first-seed0, of which
collect.py keeps the numbers.
"""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import collect
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewshot.files import write_file
from fewshot.results.figures import plain, png
from fewshot.sweep.figures import COLOURS

HERE = Path(__file__).parent
ORDERS = {"first": "FOMAML", "second": "SOMAML"}
STARTS = {"fomaml": "random head", "zero_init": "zero at the start", "zero": "zeroed every update"}
SETTINGS = [(algo, order) for order in ORDERS for algo in STARTS]
MODES = {"zeroing_off": "off", "zeroing_on": "on"}
STEP = 1  # the inner step of the figure
SHARED = (300, 600, 1500)  # iterations that both test curves have
# What the file of the released code's curves calls them.
THEIR_ORDERS = {"first": "FO", "second": "SO"}
THEIR_STARTS = {"fomaml": "vanilla", "zero_init": "zero_init", "zero": "zeroing"}
THEIR_LAST = 2010  # iteration
# Of FOMAML at 3,000, which the kept curves do not reach: means of the last ten tests after step 1, from section 4 of
# docs/method.md.
THEIR_END = {
    ("fomaml", "first"): {"zeroing_off": 0.886, "zeroing_on": 0.935},
    ("zero_init", "first"): {"zeroing_on": 0.942},
    ("zero", "first"): {"zeroing_off": 0.937, "zeroing_on": 0.937},
}


class Run(NamedTuple):
    """One finished run. facts: what NAME.json says of it."""

    seed: int
    rows: list[collect.Row]
    facts: dict[str, Any]

    def curve(self, mode: str, step: int = STEP) -> list[tuple[int, float]]:
        points = (row for row in self.rows if row.ci95 is None and (row.mode, row.step) == (mode, step))
        return [(row.iteration, row.accuracy) for row in points]

    def final(self, mode: str, step: int) -> collect.Row:
        """Of the model that validated best."""
        return next(row for row in self.rows if row.ci95 is not None and (row.mode, row.step) == (mode, step))


class Authors(NamedTuple):
    """One point of the released code's curves: mean over its seeds, half width of its interval (None: one seed)."""

    iteration: int
    mean: float
    ci95: float | None
    seeds: int


def keep(runs: list[Path], here: Path = HERE) -> None:
    for run in runs:
        if not re.fullmatch(rf"({'|'.join(STARTS)})-({'|'.join(ORDERS)})-seed\d+", run.name):
            raise SystemExit(f"{run}: its name is not ALGO-ORDER-seedSEED, such as zero_init-first-seed0")
    collect.collect("panel1", runs, here)


def read_runs(here: Path = HERE) -> dict[tuple[str, str], list[Run]]:
    """The kept runs of each (algo, order), by seed."""
    facts, runs = collect.facts("panel1", here), {}
    for algo, order in SETTINGS:
        rows = collect.rows("panel1", here, setting=f"{algo}-{order}", split="test")
        runs[algo, order] = [
            Run(seed, [row for row in rows if row.seed == seed], facts[f"{algo}-{order}-seed{seed}"])
            for seed in sorted({row.seed for row in rows})
        ]
    return runs


def read_authors(path: Path = HERE / "omniglot_1shot_curves.csv") -> dict[tuple[str, str, str, int], list[Authors]]:
    """The released code's curves: {(algo, order, mode, inner step): its points}."""
    starts, orders = ({theirs: ours for ours, theirs in names.items()} for names in (THEIR_STARTS, THEIR_ORDERS))
    curves: dict[tuple[str, str, str, int], list[Authors]] = {}
    for row in csv.DictReader(io.StringIO(path.read_text())):
        mode = list(MODES)[int(row["test_zeroing"])]
        key = (starts[row["setting"]], orders[row["order"]], mode, int(row["step"]))
        interval = float(row["ci95_over_seeds"]) if row["ci95_over_seeds"] else None
        point = Authors(int(row["iteration"]), float(row["mean"]), interval, int(row["seeds"]))
        curves.setdefault(key, []).append(point)
    return curves


def draw(runs: dict[tuple[str, str], list[Run]], authors: dict[tuple[str, str, str, int], list[Authors]]) -> Figure:
    """A column for each order, a row for each test-zeroing mode: our runs as lines, the released code's as bands."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, (mode, zeroing) in zip(grid, MODES.items(), strict=True):
        for axes, (order, name) in zip(row, ORDERS.items(), strict=True):
            for (algo, start), colour in zip(STARTS.items(), COLOURS, strict=False):
                _band(axes, authors[algo, order, mode, STEP], colour)
                for run in runs[algo, order]:
                    axes.plot(*zip(*run.curve(mode), strict=True), color=colour, linewidth=1.2, marker=".", ms=5)
                    best = run.final(mode, STEP)
                    axes.errorbar(best.iteration, best.accuracy, best.ci95, color=colour, marker="o", ms=4)
                missing = "" if runs[algo, order] else " (line: not run yet)"
                axes.plot([], [], color=colour, label=f"{start}{missing}")
            axes.set_title(f"{name}, test zeroing {zeroing}", fontsize=10, loc="left")
            axes.set(xlabel="outer iteration", ylabel=f"test accuracy after inner step {STEP}", ylim=(0.15, 1))
            axes.label_outer()
            axes.legend(frameon=False, fontsize=8, loc="lower right")
            plain(axes)
    figure.suptitle(
        "Omniglot 5-way 1-shot. Lines: this program, one for each seed; large dots: the final test of the best model.\n"
        "Bands: the paper's released code, mean and 95% interval over 3 or 4 seeds (dashed: one seed), to 2,010.",
        fontsize=10,
    )
    return figure


def _band(axes: Axes, points: list[Authors], colour: str) -> None:
    x, mean = [point.iteration for point in points], [point.mean for point in points]
    if all(point.ci95 is None for point in points):
        axes.plot(x, mean, "--", color=colour, linewidth=1.2, alpha=0.6)
        return
    low, high = ([point.mean + sign * (point.ci95 or 0) for point in points] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)


def tables(
    runs: dict[tuple[str, str], list[Run]],
    authors: dict[tuple[str, str, str, int], list[Authors]],
    inner_steps: int = 2,
) -> str:
    """The final test of every run, and the test curve where both programs have a point."""
    columns = [(mode, step) for mode in MODES for step in (1, inner_steps)]
    heads = [f"{MODES[mode]}, step {step}" for mode, step in columns]
    final = [["", "", *heads, "best at", "processor seconds"]]
    curve = [["", "", *(f"{iteration:,}" for iteration in SHARED)]]
    for algo, order in SETTINGS:
        ours, name = runs[algo, order], f"{ORDERS[order]}, {STARTS[algo]}"
        last = [next(p for p in authors[algo, order, *column] if p.iteration == THEIR_LAST) for column in columns]
        shared = [p for p in authors[algo, order, "zeroing_on", STEP] if p.iteration in SHARED]
        theirs = f"released code, {last[0].seeds} seed{'s' * (last[0].seeds > 1)}"
        rows = [_final(run, columns) for run in ours] or [["not run yet"] + [""] * 6]
        rows.append([f"{theirs}, at {THEIR_LAST:,}", *map(_theirs, last), "", ""])
        if end := THEIR_END.get((algo, order)):
            cells = [_fraction(end[mode]) if step == 1 and mode in end else "" for mode, step in columns]
            rows.append(["released code, at 3,000", *cells, "", ""])
        final += _named(name, rows)
        rows = [_on_curve(run) for run in ours] or [["not run yet"] + [""] * len(SHARED)]
        curve += _named(name, [*rows, [theirs, *map(_theirs, shared)]])
    return (
        f"The final test, of the model that validated best, ± its 95% interval over tasks:\n\n{_markdown(final)}\n"
        f"The test curve on the way, test zeroing on, after step {STEP}:\n\n{_markdown(curve)}"
    )


def _final(run: Run, columns: list[tuple[str, int]]) -> list[str]:
    tested = [run.final(*column) for column in columns]
    cells = [f"{_fraction(row.accuracy)} ± {_fraction(row.ci95)}" for row in tested]
    seconds = run.facts["seconds"]["processor"]
    return [f"seed {run.seed}", *cells, f"{tested[0].iteration:,}", f"{seconds:,.0f}" if seconds else "not known"]


def _on_curve(run: Run) -> list[str]:
    points = dict(run.curve("zeroing_on"))
    cells = [_fraction(points[iteration]) if iteration in points else "" for iteration in SHARED]
    return [f"seed {run.seed}", *cells]


def _theirs(point: Authors) -> str:
    return _fraction(point.mean) + (f" ± {_fraction(point.ci95)}" if point.ci95 is not None else "")


def _named(name: str, rows: list[list[str]]) -> list[list[str]]:
    """The rows of one setting, whose name stands in the first."""
    return [[name if number == 0 else "", *row] for number, row in enumerate(rows)]


def _fraction(value: float | None) -> str:
    return f"{value or 0:.3f}".removeprefix("0")


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def main(folders: list[str], here: Path = HERE) -> None:
    keep([Path(folder) for folder in folders], here)
    runs, authors = read_runs(here), read_authors(here / "omniglot_1shot_curves.csv")
    write_file(here.parent / "panel1_full_length.png", png(draw(runs, authors), dpi=110))


if __name__ == "__main__":
    main(sys.argv[1:])
    subprocess.run([sys.executable, "-m", "cogapp", "-r", "-I", HERE, "reproduction.md"], cwd=HERE.parent, check=True)
