"""Tests models on many datasets and keeps the accuracies: python docs/results/across.py MODEL... datasets=A,B [KNOB=..]

MODEL and the knobs are those of `fewshot test MODEL datasets=A,B`, whose folders go into outputs/across/. Rows go into
across.json, of which the tables of docs/evaluation.md are made.
"""

import csv
import sys
from pathlib import Path

from kept import called, keep, training

from fewshot.across.__main__ import main

KEY = ("model", "dataset", "ways", "shots", "mode")


def measured(model: str, knobs: list[str]) -> list[dict]:
    """A row for each setting and mode, after as many inner steps as in training."""
    folder = Path("outputs") / "across" / called(model)
    if not (folder / "across.csv").exists():
        main([model, *knobs, f"hydra.run.dir={folder}"])
    with open(folder / "across.csv", newline="") as file:
        lines = [row for row in csv.DictReader(file) if row["step"] and row["step"] == row["inner_steps"]]
    names = ("dataset", "images", "ways", "shots", "queries", "inner_steps", "tasks")
    return [
        {
            **{"model": called(model), **training(model)},
            **{name: int(row[name]) if row[name].isdigit() else row[name] for name in names},
            **{"mode": f"zeroing_{row['test_zeroing']}"},
            **{name: float(row[name]) for name in ("accuracy", "ci95")},
        }
        for row in lines
    ]


if __name__ == "__main__":
    models, words = ([word for word in sys.argv[1:] if ("=" in word) == is_knob] for is_knob in (False, True))
    for model_name in models:
        keep("across", measured(model_name, words), KEY)
