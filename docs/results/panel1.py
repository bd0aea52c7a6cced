"""The poster's panel 1 at full length: keeps finished runs in this folder, and makes the figure and the tables of them.

    python docs/results/panel1.py [RUN ...]

RUN: the output folders of finished runs, each called ALGO-ORDER-seedSEED, such as zero_init-first-seed0. Their
metrics.csv and results.json are kept here, compressed, without the paths of the machine. If RUN.time lies beside it, as
`/usr/bin/time -a -o RUN.time -f "%U user %S system"` writes it, the processor seconds are kept too.
"""

import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewshot.files import write_file
from fewshot.results.figures import plain, png
from fewshot.sweep.figures import COLOURS

HERE = Path(__file__).parent
ORDERS = {"first": "FOMAML", "second": "SOMAML"}
STARTS = {"fomaml": "random head", "zero_init": "zero at the start", "zero": "zeroed every update"}
SETTINGS = [(algo, order) for order in ORDERS for algo in STARTS]
MODES = {"zeroing_off": ("test/query_accuracy", "off"), "zeroing_on": ("test_zeroed/query_accuracy", "on")}
STEP = 1  # the inner step of the figure
SHARED = (300, 600, 1500)  # iterations that both test curves have
# What the file of the released code's curves calls them.
THEIR_ORDERS = {"first": "FO", "second": "SO"}
THEIR_STARTS = {"fomaml": "vanilla", "zero_init": "zero_init", "zero": "zeroing"}
THEIR_LAST = 2010  # iteration
MARKERS = ("<!-- written by: python docs/results/panel1.py -->\n", "<!-- end of the tables -->\n")


class Run(NamedTuple):
    """One finished run. metrics: the rows of metrics.csv as text."""

    seed: int
    results: dict[str, Any]
    metrics: list[dict[str, str]]

    def curve(self, mode: str, step: int = STEP) -> list[tuple[int, float]]:
        column = f"{MODES[mode][0]}/step_{step}"
        return [(int(row["iteration"]), float(row[column])) for row in self.metrics if row.get(column)]


class Authors(NamedTuple):
    """One point of the released code's curves: mean over its seeds, half width of its interval (None: one seed)."""

    iteration: int
    mean: float
    ci95: float | None
    seeds: int


def without_paths(value: Any) -> Any:
    """Settings less those that say where something lies on a machine."""
    if not isinstance(value, dict):
        return value
    absolute = {key for key, entry in value.items() if isinstance(entry, str) and re.match(r"/|~|[A-Z]:\\", entry)}
    return {key: without_paths(entry) for key, entry in value.items() if key not in absolute}


def processor_seconds(run: Path) -> float | None:
    """User and system time of all calls of a run; None where that of some call is not known."""
    times, log = run.with_name(f"{run.name}.time"), run.with_name(f"{run.name}.log")
    calls = re.findall(r"([\d.]+) user ([\d.]+) system", times.read_text()) if times.exists() else []
    stops = len(re.findall(r"^stopped by SIG", log.read_text(), re.MULTILINE)) if log.exists() else 0
    return round(sum(float(user) + float(system) for user, system in calls), 1) if len(calls) > stops else None


def collect(run: Path, kept: Path) -> None:
    """Keeps a finished run; the same run gives the same bytes."""
    if not re.fullmatch(rf"({'|'.join(STARTS)})-({'|'.join(ORDERS)})-seed\d+", run.name):
        raise SystemExit(f"{run}: its name is not ALGO-ORDER-seedSEED, such as zero_init-first-seed0")
    if not (run / "results.json").exists():
        raise SystemExit(f"{run}: no results.json, so this run has not finished")
    results = without_paths(json.loads((run / "results.json").read_text()))
    results["seconds"]["processor"] = processor_seconds(run)
    (kept / run.name).mkdir(parents=True, exist_ok=True)
    for name, text in {"results.json": json.dumps(results), "metrics.csv": (run / "metrics.csv").read_text()}.items():
        write_file(kept / run.name / f"{name}.gz", gzip.compress(text.encode(), mtime=0))


def read_runs(kept: Path) -> dict[tuple[str, str], list[Run]]:
    """The kept runs of each (algo, order), by seed."""
    runs: dict[tuple[str, str], list[Run]] = {setting: [] for setting in SETTINGS}
    for folder in sorted(path for path in kept.glob("*-seed*") if path.is_dir()):
        algo, order, seed = folder.name.split("-")
        metrics = gzip.decompress((folder / "metrics.csv.gz").read_bytes()).decode()
        results = json.loads(gzip.decompress((folder / "results.json.gz").read_bytes()))
        rows = list(csv.DictReader(io.StringIO(metrics)))
        runs[algo, order].append(Run(int(seed.removeprefix("seed")), results, rows))
    return runs


def read_authors(path: Path) -> dict[tuple[str, str, str, int], list[Authors]]:
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
    for row, (mode, (_, zeroing)) in zip(grid, MODES.items(), strict=True):
        for axes, (order, name) in zip(row, ORDERS.items(), strict=True):
            for (algo, start), colour in zip(STARTS.items(), COLOURS, strict=False):
                _band(axes, authors[algo, order, mode, STEP], colour)
                for run in runs[algo, order]:
                    axes.plot(*zip(*run.curve(mode), strict=True), color=colour, linewidth=1.2, marker=".", ms=5)
                    scores = run.results["test"][mode]
                    at = run.results["best_iteration"]
                    axes.errorbar(at, scores["accuracy"][STEP], scores["ci95"][STEP], color=colour, marker="o", ms=4)
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
    heads = [f"{MODES[mode][1]}, step {step}" for mode, step in columns]
    final = [["", "", *heads, "best at", "processor seconds"]]
    curve = [["", "", *(f"{iteration:,}" for iteration in SHARED)]]
    for algo, order in SETTINGS:
        ours, name = runs[algo, order], f"{ORDERS[order]}, {STARTS[algo]}"
        last = [next(p for p in authors[algo, order, *column] if p.iteration == THEIR_LAST) for column in columns]
        shared = [p for p in authors[algo, order, "zeroing_on", STEP] if p.iteration in SHARED]
        theirs = f"released code, {last[0].seeds} seed{'s' * (last[0].seeds > 1)}"
        rows = [_final(run, columns) for run in ours] or [["not run yet"] + [""] * 6]
        final += _named(name, [*rows, [f"{theirs}, at {THEIR_LAST:,}", *map(_theirs, last), "", ""]])
        rows = [_on_curve(run) for run in ours] or [["not run yet"] + [""] * len(SHARED)]
        curve += _named(name, [*rows, [theirs, *map(_theirs, shared)]])
    return (
        f"The final test, of the model that validated best, ± its 95% interval over tasks:\n\n{_markdown(final)}\n"
        f"The test curve on the way, test zeroing on, after step {STEP}:\n\n{_markdown(curve)}"
    )


def _final(run: Run, columns: list[tuple[str, int]]) -> list[str]:
    test = run.results["test"]
    cells = [
        f"{_fraction(test[mode]['accuracy'][step])} ± {_fraction(test[mode]['ci95'][step])}" for mode, step in columns
    ]
    seconds = run.results["seconds"]["processor"]
    return [
        f"seed {run.seed}",
        *cells,
        f"{run.results['best_iteration']:,}",
        f"{seconds:,.0f}" if seconds else "not known",
    ]


def _on_curve(run: Run) -> list[str]:
    points = dict(run.curve("zeroing_on"))
    cells = [_fraction(points[iteration]) if iteration in points else "" for iteration in SHARED]
    return [f"seed {run.seed}", *cells]


def _theirs(point: Authors) -> str:
    return _fraction(point.mean) + (f" ± {_fraction(point.ci95)}" if point.ci95 is not None else "")


def _named(name: str, rows: list[list[str]]) -> list[list[str]]:
    """The rows of one setting, whose name stands in the first."""
    return [[name if number == 0 else "", *row] for number, row in enumerate(rows)]


def _fraction(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def insert(page: Path, text: str) -> None:
    """Puts the text between the page's two markers."""
    before, rest = page.read_text(encoding="utf-8").split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    page.write_text("".join([before, MARKERS[0], text, MARKERS[1], after]), encoding="utf-8")


def main(folders: list[str], here: Path = HERE) -> None:
    kept = here / "panel1"
    for folder in folders:
        collect(Path(folder), kept)
    runs, authors = read_runs(kept), read_authors(here / "omniglot_1shot_curves.csv")
    write_file(here.parent / "panel1_full_length.png", png(draw(runs, authors), dpi=110))
    insert(here.parent / "reproduction.md", tables(runs, authors))


if __name__ == "__main__":
    main(sys.argv[1:])
