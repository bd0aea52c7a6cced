"""The tables of docs/evaluation.md: of transductive.json and across.json."""

import json
import statistics
from pathlib import Path
from typing import Any

from tables import markdown

STATISTICS = ("task", "support", "each")  # the words of evaluation.statistics


def transductive(*datasets: str) -> str:
    """What is lost where the queries of a task are not normalised together; measured in percent."""
    rows = []
    for row in _kept("transductive", datasets):
        head = {"zeroing_off": "as trained", "zeroing_on": "zero"}[row["mode"]]
        cells = [_percent(row[words]) if words in row else "" for words in STATISTICS]
        gains = [
            f"{100 * row[words]['first_has_more']:+.1f} ± {100 * row[words]['more_ci95']:.1f}" if words in row else ""
            for words in STATISTICS[1:]
        ]
        rows.append([_called(row), head, *cells, *gains])
    heads = [*("model", "head"), *(f"`{words}`" for words in STATISTICS)]
    return markdown([*heads, *(f"`task` - `{words}`" for words in STATISTICS[1:])], rows)


def seconds_of_statistics() -> str:
    """Processor milliseconds of a task, medians over models; in brackets as multiples of `task`."""
    whole = [row for row in _kept("transductive") if all(words in row for words in STATISTICS)]
    rows = []
    for dataset, shots in dict.fromkeys((row["dataset"], row["shots"]) for row in whole):
        of_them = [row for row in whole if (row["dataset"], row["shots"]) == (dataset, shots)]
        columns = [[row[words]["processor_milliseconds"] for row in of_them] for words in STATISTICS]
        first, *others = map(statistics.median, columns)
        called = f"{dataset}, {shots}-shot, {of_them[0]['inner_steps']} inner steps"
        rows.append([called, f"{first:.0f}", *(f"{time:.0f} ({time / first:.1f})" for time in others)])
    return markdown(["", *(f"`{words}`" for words in STATISTICS)], rows)


def across(*datasets: str, ways: int = 5) -> str:
    """The models that were tested on all of these datasets, which are the columns; measured in percent."""
    rows = [row for row in _kept("across", datasets) if row["ways"] == ways]
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        cells = [[row for row in of_model if row["dataset"] == dataset] for dataset in datasets]
        if all(cells):
            lines.append([_called(of_model[0]), *map(_off_and_on, cells)])
    return markdown(["model", *datasets], lines)


def _kept(name: str, datasets: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The rows of NAME.json in this folder that are of these datasets; none: all."""
    rows = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if not datasets or row["dataset"] in datasets]


def _called(row: dict[str, Any]) -> str:
    """The model; if it does not come with the program, with its updates x tasks."""
    return f"`{row['model']}`" + (f", {row['updates']} x {row['tasks_per_update']}" if row["updates"] else "")


def _off_and_on(modes: list[dict[str, Any]]) -> str:
    """One number where both modes have the same."""
    numbers = {row["mode"].removeprefix("zeroing_"): _percent(row) for row in modes}
    if len(numbers) == 2 and len({*numbers.values()}) == 1:
        return numbers["on"]
    return ", ".join(f"{mode} {number}" for mode, number in sorted(numbers.items()))


def _percent(cell: dict[str, float]) -> str:
    return f"{100 * cell['accuracy']:.1f} ± {100 * cell['ci95']:.1f}"
