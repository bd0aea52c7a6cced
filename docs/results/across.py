"""A table of docs/evaluation.md: python docs/results/across.py MODEL ... datasets=A,B [KNOB=VALUE ...]

MODEL and the knobs are those of `fewshot test MODEL datasets=A,B`, whose folders go into outputs/across/.
"""

import csv
import sys
from pathlib import Path

from fewshot.across.__main__ import main

models, knobs = ([word for word in sys.argv[1:] if ("=" in word) == is_knob] for is_knob in (False, True))
print("| model | test | zeroing off | zeroing on |\n| --- | --- | --- | --- |")
for model in models:
    folder = Path("outputs") / "across" / Path(model).name
    if not (folder / "across.csv").exists():
        main([model, *knobs, f"hydra.run.dir={folder}"])
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    with open(folder / "across.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["step"] and row["step"] == row["inner_steps"]:
                accuracy = f"{100 * float(row['accuracy']):.1f} ± {100 * float(row['ci95']):.1f}"
                cells.setdefault((row["dataset"], row["ways"], row["shots"]), {})[row["test_zeroing"]] = accuracy
    for (dataset, ways, shots), modes in cells.items():
        off, on = (modes.get(mode, "–") for mode in ("off", "on"))
        print(f"| `{Path(model).name}` | {dataset}, {ways}-way {shots}-shot | {off} | {on} |", flush=True)
