"""What a run leaves for its reader: metrics.csv, results.json, the table on the terminal."""

import csv
import io
import json
import logging
import platform
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import rich.console
import rich.table

from fewshot.config import stored
from fewshot.config.stored import read_text
from fewshot.config.tree import MODES, settings
from fewshot.errors import UserError
from fewshot.files import write_atomically
from fewshot.processes import ranks

if TYPE_CHECKING:  # python -m fewshot.sweep reads metrics.csv, and does not need torch for that
    from matplotlib.figure import Figure
    from pytorch_lightning.loggers import Logger

    from fewshot.results.scores import Scores
    from fewshot.training.checkpoint import Start

log = logging.getLogger(__name__)

PACKAGES = (
    "fewshot",
    "torch",
    "pytorch-lightning",
    "learn2learn",
    "hydra-core",
    "wandb",
    "torchmetrics",
    "kornia",
    "numpy",
)


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """metrics.csv: one row per logged iteration, first column `iteration`, empty where a metric was not logged."""
    columns = ["iteration", *sorted({key for row in rows for key in row if key != "iteration"}, key=_column_order)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _column_order(name: str) -> tuple[int, str, int]:
    """train, then val, then test, then probe; steps as numbers."""
    stem, _, step = name.partition("/step_")
    return ("train", "val", "test", "probe").index(stem.split("/")[0].split("_")[0]), stem, int(step or 0)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.csv as {metric: [(iteration, value), ...]}.

    Raises:
        UserError: it cannot be read, or is not of that form.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path, 2**28), newline="")):
            if "iteration" not in row or None in row:
                raise ValueError("a row of another length than the first, or no column of that name")
            iteration = int(row.pop("iteration") or "")
            for name, value in row.items():
                if value:
                    curves.setdefault(name, []).append((iteration, float(value)))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return curves


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # wandb under logger=none, for example
            found[name] = version(name)
    return found


def read(folder: Path) -> dict[str, Any]:
    """results.json of a finished run.

    Raises:
        UserError: it cannot be read, or lacks something.
    """
    path = folder / "results.json"
    results = stored.read_results(path)
    stored.check(str(path), results, {"val": stored.SCORES, "best_iteration": stored.integer(0)})
    return results


def over(results: dict[str, Any]) -> bool:
    """Whether a run went to its last iteration or to its accuracy; not if trainer.max_time ended it before."""
    config = results["config"]
    target, at_the_end = config.get("stop_at_accuracy"), results.get("iterations", config["iterations"])
    reached = target is not None and "val" in results and validation_accuracy(results) >= target
    return not config["fit"] or at_the_end >= config["iterations"] or reached


def finished(folder: Path, start: "Start") -> dict[str, Any] | None:
    """The results of this very configuration that the folder holds, shown again; None where there are none.

    Those of a run that a limit ended before its last iteration are none either: it goes on.

    Raises:
        UserError: they are of another configuration.
    """
    from fewshot.training.checkpoint import refuse_difference

    path = folder / "results.json"
    if not path.exists():
        return None
    results, asked = read(folder), settings(start.cfg)
    if results["config"]["fit"] and asked["fit"]:
        refuse_difference(start.cfg, results["config"], path)
        reached = results["iterations"] if start.content else results["config"]["iterations"]
        if reached < asked["iterations"] and not start.trained:
            return None
    elif results["config"] | {"recompute_steps": asked["recompute_steps"]} != asked:  # older results have none
        raise UserError(f"hydra.run.dir={folder}: holds the results of another call; name another folder")
    show(results, folder)
    return results


def write(
    folder: Path,
    results: dict[str, dict[str, "Scores"]],
    *,
    iterations: int,
    best_iteration: int,
    seconds: dict[str, float],
    config: dict[str, Any],
    splits: dict[str, Any],
    loggers: list["Logger"],
) -> dict[str, Any]:
    """results.json, which is returned, the figures, the logger's summary; then the table on the terminal.

    Accuracies are fractions in [0, 1], ci95 half widths over tasks; iterations counts outer updates. Rank 0 writes.
    """
    from fewshot.results import figures
    from fewshot.training.wandb_run import summarise

    content = {
        **{split: _scores(results[split]) for split in ("test", "val")},
        "iterations": iterations,
        "best_iteration": best_iteration,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "config": config,
        "versions": versions(),
        "splits": splits,
    }
    if ranks.rank():
        return content
    if (folder / "metrics.csv").exists():
        curves = read_metrics(folder / "metrics.csv")
        picture = figures.accuracy_over_iterations(curves, config)
        write_atomically(folder / "figures" / "accuracy_over_iterations.png", partial(write_png, picture))
        if any(name.startswith("probe/") for name in curves):
            write_atomically(folder / "figures" / "probes.png", partial(write_png, figures.probes(curves, config)))
    picture = figures.accuracy_over_steps(content, config)
    write_atomically(folder / "figures" / "accuracy_over_steps.png", partial(write_png, picture))
    text = json.dumps({**content, "splits": None}, indent=2)
    text = text.replace('"splits": null', f'"splits": {_line_by_line(splits)}')
    write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    for logger in loggers:
        summarise(logger, content)
    show(content, folder)
    return content


def write_splits(folder: Path, splits: dict[str, Any]) -> None:
    """splits.json: which classes the run uses for what."""

    if not ranks.rank():
        write_atomically(folder / "splits.json", lambda file: file.write(_line_by_line(splits).encode()))


def _line_by_line(splits: dict[str, Any]) -> str:
    """One line for each split: a thousand class names are not to be a thousand lines."""
    lines = [f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in splits.items()]
    return "{\n" + ",\n".join(lines) + "\n  }"


def validation_accuracy(results: dict[str, Any]) -> float:
    """Of the best model, after inner_steps; by what a search goes."""
    return results["val"]["zeroing_off"]["accuracy"][results["config"]["inner_steps"]]


def write_png(figure: "Figure", file: BinaryIO) -> None:
    figure.savefig(file, format="png", dpi=150)


def _scores(modes: dict[str, "Scores"]) -> dict[str, Any]:
    tasks = next(iter(modes.values())).tasks
    return {"tasks": tasks, **{mode: {"accuracy": s.accuracy, "ci95": s.ci95} for mode, s in modes.items()}}


def show(results: dict[str, Any], folder: Path) -> None:
    """Query accuracy per inner step with its confidence interval, both test-time zeroing modes; in train.log too."""
    if ranks.rank():
        return
    test, config = results["test"], results["config"]
    title = (
        f"{config['dataset']['name']} {config['ways']}-way {config['shots']}-shot: query accuracy in % on "
        f"{test['tasks']} test tasks, model of iteration {results['best_iteration']}"
    )
    table = rich.table.Table()
    table.add_column("inner step", justify="right")
    for heading in ("test zeroing off", "test zeroing on"):
        table.add_column(heading, justify="right")
    for step in range(len(test["zeroing_off"]["accuracy"])):
        cells = (f"{100 * test[mode]['accuracy'][step]:.2f} ± {100 * test[mode]['ci95'][step]:.2f}" for mode in MODES)
        table.add_row(str(step), *cells)
    console = rich.console.Console(color_system=None, width=80)
    with console.capture() as drawn:
        console.print(table)
    log.info("%s\n%sWritten to %s", title, drawn.get(), folder)
