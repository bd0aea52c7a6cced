"""Which runs can be compared, and the differences of their settings to the first, task by task."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fewshot.errors import UserError, shown
from fewshot.files import user_path
from fewshot.results.task_scores import read_tasks
from fewshot.sweep.settings import Job, Setting, group
from fewshot.sweep.statistics import Difference, holm, paired

SAME = ("dataset.name", "dataset.tasks", "ways", "shots", "queries")


class Row(NamedTuple):
    """A setting beside the first one, in one mode of the test and after one inner step.

    accuracy: the mean over its seeds and tasks. difference: None for the first setting itself. p: Holm's, of all rows.
    """

    setting: Setting
    mode: str
    step: int
    accuracy: float
    difference: Difference | None
    p: float | None

    @property
    def larger_than_noise(self) -> bool:
        return self.p is not None and self.p < 0.05


def folders(words: Iterable[str]) -> list[Path]:
    """The folders that the words name; of a pattern such as multirun/2026-11-*/* those that match, and no files."""
    places = []
    for word in words:
        path = user_path("RUN", word)
        matches = [] if os.path.exists(path) else map(Path, sorted(glob.glob(str(path))))
        places += [match for match in matches if match.is_dir()] or [path]
    return places


def test_tasks(job: Job) -> dict[str, Any]:
    """All that decides which tasks a run was tested on: {the knob or file that says it: its value}."""
    values: dict[str, Any] = {}
    for knob in SAME:
        value: Any = job.config
        for key in knob.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        values[knob] = value
    if values["dataset.tasks"] != "fixed_blocks":
        values["dataset.tasks"] = "any classes"  # all other kinds are of training
    assert job.results is not None  # only finished runs are compared
    values["the test's images (splits.sha256)"] = (job.results.get("splits") or {}).get("sha256")
    values["test_tasks"] = job.results["test"]["tasks"]
    return values


def comparable(jobs: list[Job]) -> tuple[list[tuple[Job, dict[str, np.ndarray]]], list[str]]:
    """The finished runs with the test tasks of the first of them, and a line for each of the others.

    A run comes with its accuracies, {mode: (tasks, T + 1)}.
    """
    kept: list[tuple[Job, dict[str, np.ndarray]]] = []
    left_out, first = [], None
    for job in jobs:
        if job.results is None:
            left_out.append(f"{job.folder}: {job.error or 'has no results, or was ended before its last update'}")
            continue
        try:
            accuracies = read_tasks(job.folder)
        except UserError as problem:
            left_out.append(str(problem))
            continue
        tasks = test_tasks(job)
        first = first or tasks
        if other := [key for key in tasks if tasks[key] != first[key]]:
            there, here = shown(tasks[other[0]]), shown(first[other[0]])
            differs = f"{other[0]} is {there} there and {here} in the first run"
            left_out.append(f"{job.folder}: was tested on other tasks ({differs})")
        elif len(next(iter(accuracies.values()))) != tasks["test_tasks"]:
            left_out.append(f"{job.folder}: its results.json and its tasks.csv.gz are not of one test")
        else:
            kept.append((job, accuracies))
    return kept, left_out


def rows(
    runs: list[tuple[Job, dict[str, np.ndarray]]], modes: Iterable[str], step: int | None
) -> tuple[list[Row], list[str]]:
    """Every setting in every mode beside the setting of the first run; and what was left out.

    step: the inner step; None: each setting's own inner_steps.

    Raises:
        UserError: there is one setting alone, or none that has a seed of the first one.
    """
    accuracies = {id(job): by_mode for job, by_mode in runs}
    settings = group([job for job, _ in runs])
    settings.sort(key=lambda setting: not any(job is runs[0][0] for job in setting.jobs))  # a stable sort
    table: list[Row] = []
    left_out: list[str] = []
    for mode in modes:
        without = [setting for setting in settings if not all(mode in accuracies[id(job)] for job in setting.jobs)]
        left_out += [f"{one.label()}: was not tested with test {mode.replace('_', ' ')}" for one in without]
        if settings[0] in without:
            continue
        first, *others = [setting for setting in settings if setting not in without]
        seeds, values = _values(first, accuracies, mode, step)
        table.append(Row(first, mode, _step(first, step), float(values.mean()), None, None))
        for other in others:
            own_seeds, own = _values(other, accuracies, mode, step)
            shared = [seed for seed in own_seeds if seed in seeds]
            if not shared:
                left_out.append(f"{other.label()}: has seeds {own_seeds}, none of which {first.label()} has ({seeds})")
                continue
            if alone := sorted({*seeds} ^ {*own_seeds}):
                both = f"{other.label()} and {first.label()}"
                left_out.append(f"in the difference of {both}, the seeds {alone}, which only one of them has")
            pairs = own[[own_seeds.index(s) for s in shared]] - values[[seeds.index(s) for s in shared]]
            table.append(Row(other, mode, _step(other, step), float(own.mean()), paired(pairs), None))
    differences = {place: row.difference for place, row in enumerate(table) if row.difference}
    if not differences:
        raise UserError(
            left_out[0] if left_out else "FOLDER...: all runs are of one setting; give those of another too"
        )
    for place, p in zip(differences, holm([d.p for d in differences.values()]), strict=True):
        table[place] = table[place]._replace(p=p)
    return table, list(dict.fromkeys(left_out))


def _step(setting: Setting, step: int | None) -> int:
    return setting.config["inner_steps"] if step is None else step


def _values(
    setting: Setting, accuracies: dict[int, dict[str, np.ndarray]], mode: str, step: int | None
) -> tuple[list[int], np.ndarray]:
    """The seeds of a setting, and the accuracies (S, T) of its runs."""
    after = _step(setting, step)
    arrays = [accuracies[id(job)][mode] for job in setting.jobs]
    if short := [array for array in arrays if array.shape[1] <= after]:
        raise UserError(f"step={after}: {setting.label()} was tested after inner steps 0 to {short[0].shape[1] - 1}")
    return [job.config["seed"] for job in setting.jobs], np.stack([array[:, after] for array in arrays])
