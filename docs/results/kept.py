"""Measured rows that tables of the docs are made of: NAME.json beside this file, one row a line."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from fewshot.files import write_file
from fewshot.predict.find import find
from fewshot.results.record_files import versions
from fewshot.training.checkpoint import read

HERE = Path(__file__).parent


def rows(name: str) -> list[dict[str, Any]]:
    path = HERE / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def keep(name: str, measured: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    """Adds rows; one that agrees in all of `key` is replaced."""
    place = {tuple(row[k] for k in key): row for row in [*rows(name), *measured]}
    lines = ",\n".join(f"  {json.dumps(row)}" for _, row in sorted(place.items(), key=lambda item: str(item[0])))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    about = {"versions": versions(), "machine": machine}
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in about.items())
    write_file(HERE / f"{name}.json", f'{{\n{head} "rows": [\n{lines}\n ]\n}}\n')


def called(model: str) -> str:
    """A model's name in a table: that of the model that comes with the program, or of its run's folder."""
    path = Path(model)
    return path.parents[1].name if path.suffix == ".ckpt" else path.name


def training(model: str) -> dict[str, Any]:
    """How long a checkpoint was trained; nulls: of a model that comes with the program, see models/README.md."""
    path = find(model)
    content = {} if path.is_dir() else read(path)
    tasks = content["fewshot"]["config"]["meta_batch_size"] if content else None
    return {"updates": content.get("global_step"), "tasks_per_update": tasks}
