"""What a run says of itself: its first line, scores, metrics.csv, splits.json, results.json, the table at the end."""

import csv
import io
import json
import logging
import math
import os
import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from fewshot.config import stored
from fewshot.config.kinds import Flag, from_zero, integer, must_be, only, optional
from fewshot.config.schema import Config
from fewshot.config.stored import KEY, NAME, NUMBER, as_knobs, check, check_config, form, many, read_json, read_text
from fewshot.config.tree import MODES, STATISTICS, settings, statistics
from fewshot.errors import UserError, printable
from fewshot.files import write_file
from fewshot.inner_loop import InnerLoop
from fewshot.processes import ranks

log = logging.getLogger(__name__)

PACKAGES = ("fewshot", "torch", "pytorch-lightning", "learn2learn", "hydra-core", "wandb", "torchmetrics")
PACKAGES += ("kornia", "numpy")
SHARE = must_be("a number from 0 to 1", NUMBER, refused=lambda value: not 0 <= value <= 1)
CURVE = many(SHARE)
COUNTED = dict.fromkeys(("confidence", "accuracy"), many(many(optional(NUMBER))))
CALIBRATION = form({"error": CURVE, "confidence": CURVE, "bins": form({"queries": many(many(integer(0)))} | COUNTED)})
MODE = form({"accuracy": CURVE, "ci95": many(from_zero()), "calibration?": CALIBRATION})
BY_MODE = dict.fromkeys(MODES, MODE)
BY_STATISTICS = form({f"{whose}?": form(BY_MODE) for whose in STATISTICS})
SCORES = form({"tasks": integer(2), **BY_MODE, "statistics?": BY_STATISTICS})
RESULTS = form(
    {
        "test": SCORES,
        "val": SCORES,
        "iterations?": integer(0),
        "best_iteration": integer(0),
        "config": form({"fit": Flag} | as_knobs(Config, "select? evaluation?")),  # and what check_config says
        "versions?": dict[KEY, NAME],
    }
)
# Of a test on many datasets: it has no validation, and with other ways than in training perhaps one mode alone.
TESTED = form(
    {
        "test": form({"tasks": integer(2), "zeroing_off?": MODE, "zeroing_on": MODE}),
        "config": form({"fit": only(False, "only a test has no val")}),
        "versions?": dict[KEY, NAME],
    }
)


class Scores(NamedTuple):
    """Query accuracy after every inner step: mean over the tasks and half width of its 95% confidence interval."""

    tasks: int
    accuracy: list[float]
    ci95: list[float]
    calibration: dict[str, Any] | None = None  # see training/evaluation.py

    @classmethod
    def of(cls, accuracies: Any) -> "Scores":
        """accuracies: (B, T + 1), for B tasks and T inner steps of the evaluation."""
        import numpy as np  # takes half a second, which the first line of a run does not wait for

        values = np.asarray(accuracies, dtype=np.float64)
        mean, ci95 = values.mean(axis=0), 1.96 * values.std(axis=0, ddof=1) / len(values) ** 0.5
        accuracy, half_width = ([round(value, 6) for value in numbers.tolist()] for numbers in (mean, ci95))
        return cls(len(values), accuracy, half_width)


def diverged(results: dict[str, Scores], inner_steps: int, start: str) -> str | None:
    """After which inner step the logits of some task were not finite, and what would help; None: after none.

    start: what would help if they were not finite even before the first inner step.
    """
    bad = [step for scores in results.values() for step, accuracy in enumerate(scores.accuracy) if math.isnan(accuracy)]
    if not bad:
        return None
    remedy = "lower inner_lr" if min(bad) else start
    remedy += f", or use test_steps={min(bad) - 1}" if min(bad) > inner_steps else ""
    return f"the logits of some task are not finite numbers after inner step {min(bad)}; {remedy}"


def percent(accuracy: float, ci95: float) -> str:
    """E.g. "81.25 ± 0.43", in %; without an interval where none is known."""
    return f"{100 * accuracy:.2f}" + ("" if math.isnan(ci95) else f" ± {100 * ci95:.2f}")


def title(config: dict[str, Any], algorithm: bool = True) -> str:
    """E.g. "FOMAML + zeroing, glyphs 5-way 1-shot"."""
    task = f"{config['dataset']['name']} {config['ways']}-way {config['shots']}-shot"
    return printable(f"{InnerLoop.of(config).name}, {task}" if algorithm else task)


def tested_on(config: dict[str, Any]) -> str:
    """The tasks of a run's final test, in words; a run on one task is tested on tasks of the same split."""
    return "tasks of the split of its one task" if config["dataset"].get("tasks") == "one_task" else "test tasks"


def steps_of_training(config: dict[str, Any]) -> int:
    """The inner steps with which a model was trained; a test may have others as its inner_steps."""
    return config.get("trained", {}).get("inner_steps", config["inner_steps"])


def steps_that_matter(config: dict[str, Any], last: int) -> list[int]:
    """The steps among 0 .. last that a table shows; all of them if they are few."""
    matter = {0, 1, config["inner_steps"], min(steps_of_training(config), last), last}
    return [*range(last + 1)] if last < 5 else sorted(matter)


def announce(folder: Path, cfg: DictConfig) -> None:
    """The first line of a run, before torch is imported: what is done, with what, and where its results go."""
    if ranks.rank() or ranks.PARENT in os.environ:
        return
    there = cfg.checkpoint is not None or any(
        (folder / name).exists() for name in ("results.json", "checkpoints/last.ckpt")
    )
    if not cfg.fit:
        line = f"Testing {cfg.checkpoint}; the results go to {folder}"
    elif there:
        line = f"Going on with the run in {folder}; if it is finished, its results are shown"
    else:
        line = f"Training {title(settings(cfg))}, {cfg.iterations} iterations; the results go to {folder}"
    log.info(printable(line))


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as CSV; names of files keep their bytes, also those that are no UTF-8."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """metrics.csv: one row per logged iteration, first column `iteration`, empty where a metric was not logged."""
    columns = ["iteration", *sorted({key for row in rows for key in row if key != "iteration"}, key=_column_order)]
    write_csv(path, [columns, *([row.get(column, "") for column in columns] for row in rows)])


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
            if not 0 <= iteration <= 10**9:
                raise ValueError("an iteration that no run has")
            for name, text in row.items():
                if text:
                    curves.setdefault(name, []).append((iteration, value := float(text)))
                    if "/query_accuracy" in name and not abs(value - 0.5) <= 0.51:  # 1 may be rounded; NaN is none
                        raise ValueError(f"an accuracy of {text[:20]}")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return curves


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that decide what a run computes."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # wandb under logger=none, for example
            installed[name] = version(name)
    return installed


def read(folder: Path, of_run: bool = True) -> dict[str, Any]:
    """results.json of a finished run; of_run=False: it may also be TESTED.

    Raises:
        UserError: it cannot be read, or is not of the form that is written there.
    """
    path = folder / "results.json"
    results = read_json(path)
    tested = not of_run and isinstance(results, dict) and "val" not in results
    check(str(path), results, TESTED if tested else RESULTS)
    check_config(str(path), results["config"])
    results["config"] = stored.to_today(results["config"])
    modes = [results["test"][mode] for mode in MODES if mode in results["test"]]
    lengths = {len(mode[curve]) for mode in modes for curve in ("accuracy", "ci95")}
    if len(lengths) > 1 or 0 in lengths:
        raise UserError(f"{path}: test must have as many accuracies as intervals in both modes, one for each step")
    steps = results["config"]["inner_steps"]
    if not tested and len(results["val"][results["config"].get("select", "zeroing_off")]["accuracy"]) <= steps:
        raise UserError(f"{path}: val has no accuracy after inner_steps={steps}")
    return results


def over(results: dict[str, Any]) -> bool:
    """Whether a run reached its last iteration or stop_at_accuracy; False if trainer.max_time ended it before."""
    config = results["config"]
    if not config.get("fit", True):
        return True
    target, at_the_end = config.get("stop_at_accuracy"), results.get("iterations", config["iterations"])
    reached = target is not None and validation_accuracy(results) >= target
    return at_the_end >= config["iterations"] or reached


def content(
    results: dict[str, dict[str, dict[str, Scores]]],
    *,
    iterations: int,
    best_iteration: int,
    seconds: dict[str, float],
    config: dict[str, Any],
    splits: dict[str, Any],
) -> dict[str, Any]:
    """What results.json holds: accuracies as fractions in [0, 1], ci95 as half widths over tasks.

    results: by statistics, split and mode; the first statistics lead, and of several all are written besides.
    iterations: the outer updates that were done.
    """
    return {
        **{split: _scores({whose: splits[split] for whose, splits in results.items()}) for split in ("test", "val")},
        "iterations": iterations,
        "best_iteration": best_iteration,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "config": config,
        "versions": versions(),
        "splits": splits,
    }


def write(folder: Path, results: dict[str, Any]) -> None:
    """results.json, by which a run is known to have finished."""
    write_file(folder / "results.json", _as_json(results))


def write_splits(folder: Path, splits: dict[str, Any]) -> None:
    """splits.json: which classes the run uses for what."""
    if not ranks.rank():
        write_file(folder / "splits.json", _as_json(splits))


def _as_json(value: Any, indent: str = "") -> str:
    """A line for each entry of a dictionary. A list is one line, because a split may have a thousand classes."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    inside = f"{indent}  "
    lines = [f"{inside}{json.dumps(key)}: {_as_json(entry, inside)}" for key, entry in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def validation_accuracy(results: dict[str, Any]) -> float:
    """The best model's validation accuracy after inner_steps, in the mode that chose it; a search maximises it."""
    return results["val"][results["config"].get("select", "zeroing_off")]["accuracy"][results["config"]["inner_steps"]]


def _scores(results: dict[str, dict[str, Scores]]) -> dict[str, Any]:
    def written(scores: Scores) -> dict[str, Any]:
        values = scores._asdict()
        return {name: value for name, value in values.items() if name != "tasks" and value is not None}

    all_of_them = {whose: {mode: written(s) for mode, s in modes.items()} for whose, modes in results.items()}
    first, *others = results
    tasks = next(iter(results[first].values())).tasks
    return {"tasks": tasks, **all_of_them[first], **({"statistics": all_of_them} if others else {})}


def show(results: dict[str, Any], folder: Path) -> None:
    """Query accuracy per inner step with its confidence interval, both test-time zeroing modes; in train.log too.

    Where there are several statistics, those of a step are side by side.
    """
    if ranks.rank():
        return
    import rich.console  # takes its time, like NumPy
    import rich.table

    test, config = results["test"], results["config"]
    heading = (
        f"{title(config, algorithm=False)}: query accuracy in % on {test['tasks']} {tested_on(config)}, "
        f"model of iteration {results['best_iteration']}"
    )
    of_training = config | config.get("trained", {"file": "best.ckpt"})  # a test may name last.ckpt
    if of_training["file"] == "best.ckpt":
        heading += f", chosen by validation with test {of_training.get('select', 'zeroing_off').replace('_', ' ')}"
    if (first := statistics(results["config"])[0]) != STATISTICS[0]:
        heading += f", queries normalised by evaluation.statistics={first}"
    several = test.get("statistics", {})
    table = rich.table.Table()
    table.add_column("inner step", justify="right")
    if several:
        table.add_column("statistics")
    for mode in MODES:
        table.add_column(f"test {mode.replace('_', ' ')}", justify="right")
    calibrated = "calibration" in test["zeroing_off"]
    if calibrated:
        table.add_column("calibration error\noff and on", justify="right")
    last = len(test["zeroing_off"]["accuracy"]) - 1
    shown, trained = steps_that_matter(config, last), steps_of_training(config)
    for step in shown:
        mark = "*" * (step == trained)
        for whose, scores in (several or {"": test}).items():
            cells = (percent(scores[mode]["accuracy"][step], scores[mode]["ci95"][step]) for mode in MODES)
            errors = (
                " ".join(f"{scores[mode]['calibration']['error'][step]:.4f}" for mode in MODES) if calibrated else ""
            )
            table.add_row(f"{step}{mark}", *[whose] * bool(several), *cells, *[errors] * calibrated)
    console = rich.console.Console(color_system=None, width=80)
    with console.capture() as drawn:
        console.print(table)
    folded = f"; results.json has all {last + 1} steps" * (len(shown) <= last)
    marked = "*: as many steps as in training. " * (trained in shown)
    note = f"{marked}±: 95% confidence interval over tasks{folded}"
    log.info("%s\n%s%s\nWritten to %s", heading, drawn.get(), note, folder)


def tell_result(results: dict[str, Any]) -> None:
    """The result in one line, by which train.log ends."""
    if ranks.rank():
        return
    test, config = results["test"], results["config"]
    step = config["inner_steps"]
    words = [
        f"{percent(test[mode]['accuracy'][step], test[mode]['ci95'][step])} ({mode.replace('_', ' ')})"
        for mode in MODES
    ]
    log.info(f"{title(config)}: query accuracy in % after inner step {step}: {', '.join(words)}")
