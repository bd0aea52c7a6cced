"""Keeps the numbers of finished runs in this folder: python docs/results/collect.py NAME RUN...

NAME.csv.gz gets a row for each accuracy: those of the validations and of the test curve, and, with an interval, those
of the final test at the iteration of the best model. NAME.json says of each run what was called, its settings without
the paths of the machine, versions, seconds, and the commit and machine on which it was kept. A run that is kept
already is replaced. A run's folder is called SETTING-seedSEED, or SETTING if its setting has one seed.
"""

import csv
import gzip
import io
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fewshot.files import write_file

HERE = Path(__file__).parent
CURVES = {  # beginnings of the columns of metrics.csv
    "val": ("val", "zeroing_off"),
    "val_zeroed": ("val", "zeroing_on"),
    "test": ("test", "zeroing_off"),
    "test_zeroed": ("test", "zeroing_on"),
}


class Row(NamedTuple):
    """ci95: half width of the interval over tasks, None on a curve, where it is not logged."""

    setting: str
    seed: int
    iteration: int
    split: str  # val or test
    mode: str  # zeroing_off or zeroing_on
    step: int
    accuracy: float
    ci95: float | None
    tasks: int


def rows(name: str, here: Path = HERE, **wanted: Any) -> list[Row]:
    """The kept rows that have these values, as in rows("panel1", split="test", step=1)."""
    text = gzip.decompress((here / f"{name}.csv.gz").read_bytes()).decode()
    kept = [_row(*line) for line in list(csv.reader(io.StringIO(text)))[1:]]
    return [row for row in kept if wanted.items() <= row._asdict().items()]


def _row(setting: str, seed: str, iteration: str, split: str, mode: str, step: str, *numbers: str) -> Row:
    accuracy, ci95, tasks = numbers
    place = (setting, int(seed), int(iteration), split, mode, int(step))
    return Row(*place, float(accuracy), float(ci95) if ci95 else None, int(tasks))


def facts(name: str, here: Path = HERE) -> dict[str, Any]:
    """What is kept of each run besides, by SETTING-seedSEED."""
    return json.loads((here / f"{name}.json").read_text(encoding="utf-8"))


def collect(name: str, runs: list[Path], here: Path = HERE) -> None:
    """Writes both files; the same runs give the same bytes of accuracies."""
    kept = rows(name, here) if (here / f"{name}.csv.gz").exists() else []
    about = facts(name, here) if (here / f"{name}.json").exists() else {}
    for run in runs:
        if not (run / "results.json").exists():
            raise SystemExit(f"{run}: no results.json, so this run has not finished")
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        setting, seed = re.sub(r"-seed\d+$", "", run.name), results["config"]["seed"]
        kept = [row for row in kept if (row.setting, row.seed) != (setting, seed)]
        kept += _accuracies(setting, seed, results, (run / "metrics.csv").read_text(encoding="utf-8"))
        about[f"{setting}-seed{seed}"] = _about(run, results)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Row._fields, *sorted(kept, key=_place)])
    write_file(here / f"{name}.csv.gz", gzip.compress(text.getvalue().encode(), mtime=0))
    write_file(here / f"{name}.json", json.dumps(dict(sorted(about.items())), indent=1) + "\n")


def _place(row: Row) -> tuple[Any, ...]:
    return (*row[:6], row.ci95 is not None)


def _accuracies(setting: str, seed: int, results: dict[str, Any], metrics: str) -> list[Row]:
    tasks = {"val": results["val"]["tasks"], "test": results["config"]["callbacks"]["record"]["test_curve_tasks"]}
    made = []
    for line in csv.DictReader(io.StringIO(metrics)):
        for column, value in line.items():
            if value and (match := re.fullmatch(r"(\w+)/query_accuracy/step_(\d+)", column)) and match[1] in CURVES:
                split, mode = CURVES[match[1]]
                place = (setting, seed, int(line["iteration"]), split, mode, int(match[2]))
                made.append(Row(*place, float(value), None, tasks[split]))
    for mode in ("zeroing_off", "zeroing_on"):
        scores = results["test"][mode]
        for step, (accuracy, ci95) in enumerate(zip(scores["accuracy"], scores["ci95"], strict=True)):
            place = (setting, seed, results["best_iteration"], "test", mode, step)
            made.append(Row(*place, accuracy, ci95, results["test"]["tasks"]))
    return made


def _about(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    overrides = run / ".hydra" / "overrides.yaml"
    words = yaml.safe_load(overrides.read_text(encoding="utf-8")) if overrides.exists() else None
    words = words and [word for word in words if not re.search("=(/|~)", word)]
    longer = f"iterations={results['config']['iterations']}"  # a later call may have asked for more
    words = words and [longer if word.startswith("iterations=") else word for word in words]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "command": None if words is None else " ".join(["python train.py", *words]),
        "iterations": results["iterations"],
        "best_iteration": results["best_iteration"],
        "threads": results["config"]["threads"],
        "seconds": {"processor": processor_seconds(run), **results["seconds"]},
        "peak_mb": peak_mb(run),
        "versions": results.get("versions"),
        "kept": {"commit": commit.stdout.strip() or None, "machine": machine()},
        "images": results.get("splits", {}).get("sha256"),
        "config": without_paths(results["config"]),
    }


def machine() -> str:
    """Such as Linux x86_64, Intel(R) Xeon(R) Processor, 2 cores; of which speed is known, no name of a host."""
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpus.read_text(), re.MULTILINE) if cpus.exists() else []
    processor = names[0] if names else platform.processor() or "unknown processor"
    return f"{platform.system()} {platform.machine()}, {processor}, {os.cpu_count()} cores"


def without_paths(value: Any) -> Any:
    """Settings less those that say where something lies on a machine."""
    if not isinstance(value, dict):
        return value
    absolute = {key for key, entry in value.items() if isinstance(entry, str) and re.match(r"/|~|[A-Z]:\\", entry)}
    return {key: without_paths(entry) for key, entry in value.items() if key not in absolute}


def processor_seconds(run: Path) -> float | None:
    """User and system time of all calls of a run, if RUN.time lies beside it; None where that of some is not known.

    `/usr/bin/time -a -o RUN.time -f "%U user %S system %M kB"` writes it.
    """
    times, log = run.with_name(f"{run.name}.time"), run.with_name(f"{run.name}.log")
    calls = re.findall(r"([\d.]+) user ([\d.]+) system", times.read_text()) if times.exists() else []
    stops = len(re.findall(r"^stopped by SIG", log.read_text(), re.MULTILINE)) if log.exists() else 0
    return round(sum(float(user) + float(system) for user, system in calls), 1) if len(calls) > stops else None


def peak_mb(run: Path) -> float | None:
    """The largest resident memory of any of its calls, of which the same file knows."""
    times = run.with_name(f"{run.name}.time")
    peaks = re.findall(r"([\d.]+) kB", times.read_text()) if times.exists() else []
    return max(round(1.024 * float(peak) / 1000, 1) for peak in peaks) if peaks else None


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("python docs/results/collect.py NAME RUN...")
    collect(sys.argv[1], [Path(run) for run in sys.argv[2:]])
