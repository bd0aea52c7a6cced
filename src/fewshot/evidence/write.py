"""What was measured becomes evidence.json, figures and report.html."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fewshot.data.task import Task
from fewshot.evidence import figures, page, sections
from fewshot.files import write_file
from fewshot.results.figures import accuracy_over_steps, png
from fewshot.results.record_files import versions
from fewshot.results.scores import Scores
from fewshot.training.resume import Start


def write(
    folder: Path,
    found: dict[str, Any],
    tested: dict[str, Tensor],
    tasks: Task,
    *,
    start: Start,
    gradient_tasks: int,
    seconds: float,
    config: dict[str, Any],
) -> None:
    """Numbers, then pictures, then the page that shows both.

    found: by `identities`, `limits` and `measure`; tested: accuracies of each mode and task, (tasks, T + 1); tasks:
    those that found was measured on, of which the first is shown.
    """
    scores = {mode: Scores.of(each) for mode, each in tested.items()}
    test = {mode: {"accuracy": each.accuracy, "ci95": each.ci95} for mode, each in scores.items()}
    gain = Scores.of(tested["zeroing_on"] - tested["zeroing_off"])  # on the same tasks, so paired
    checks = {
        group: {
            name: {"value": each.value, "bound": each.bound, "pass": each.passed} for name, each in found[group].items()
        }
        for group in ("identities", "limits")
    }
    content = {
        **found,
        **checks,
        "test": {"tasks": gain.tasks, **test, "gain": {"accuracy": gain.accuracy, "ci95": gain.ci95}},
        "tasks": {"features": len(tasks.support), "gradients": gradient_tasks},
        "model": {
            "checkpoint": str(start.path),
            "iteration": start.iteration,
            "trained_with": start.content["fewshot"]["config"],
        },
        "seconds": round(seconds, 2),
        "config": config,
        "versions": versions(),
    }
    content = finite(content)
    pictures = {name: png(figure) for name, figure in draw(content, _shown(tasks, config)).items()}
    files = {
        "evidence.json": json.dumps(content, indent=2, allow_nan=False),
        **{f"{name}.png": picture for name, picture in pictures.items()},
        "report.html": page.page(content, pictures),
    }
    for name, data in files.items():
        write_file(folder / name, data)
    held = sum(each.passed for each in found["identities"].values())
    print(f"{held} of {len(found['identities'])} identities hold. Read {folder / 'report.html'}")


def draw(content: dict[str, Any], shown: figures.Shown) -> dict[str, Figure]:
    head_is_zero = sections.head_is_zero(content)
    return {
        "motivating_example": figures.motivating_example(content["motivating_example"], shown),
        "outer_step": figures.outer_step(content["outer_step"], shown, head_is_zero),
        "coefficients": figures.coefficients(content["coefficients"], shown, head_is_zero),
        "similarity": figures.similarity(content["similarity"], shown),
        "memory": figures.memory(content["memory"], shown, head_is_zero),
        "prototypes": figures.prototypes(content["prototypes"], shown.ways, head_is_zero),
        "accuracy": accuracy_over_steps(content, content["config"]),
    }


def finite(content: Any) -> Any:
    """JSON has no nan and no infinity; they become null."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _shown(tasks: Task, config: dict[str, Any]) -> figures.Shown:
    """The first task, its images as they were before they were normalised."""
    mean, std = (np.array(config["dataset"][name])[:, None, None] for name in ("mean", "std"))

    def images(normalised: Tensor) -> np.ndarray:
        pixels = (normalised.numpy() * std + mean).clip(0, 1)  # (I, C, H, W)
        return pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)

    support, support_labels, query, query_labels = (field[0] for field in tasks)
    return figures.Shown(images(support), support_labels.numpy(), images(query), query_labels.numpy())
