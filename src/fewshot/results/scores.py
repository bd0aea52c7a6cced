"""Accuracies of tasks as a mean with its confidence interval.

Shapes: B tasks, T inner steps of the evaluation.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Scores(NamedTuple):
    """Query accuracy after every inner step: mean over the tasks and half width of its 95% confidence interval."""

    tasks: int
    accuracy: list[float]
    ci95: list[float]

    @classmethod
    def of(cls, accuracies: ArrayLike) -> "Scores":
        """accuracies: (B, T + 1)"""
        values = np.asarray(accuracies, dtype=np.float64)
        mean, ci95 = values.mean(axis=0), 1.96 * values.std(axis=0, ddof=1) / len(values) ** 0.5
        return cls(len(values), *([round(value, 6) for value in numbers.tolist()] for numbers in (mean, ci95)))


def diverged(results: dict[str, Scores], inner_steps: int, start: str) -> str | None:
    """After which inner step the logits of some task were not finite, and what would help; None: after none.

    start: what would help if they were not even before the first inner step.
    """
    bad = [step for scores in results.values() for step, accuracy in enumerate(scores.accuracy) if math.isnan(accuracy)]
    if not bad:
        return None
    remedy = "lower inner_lr" if min(bad) else start
    remedy += f", or use test_steps={min(bad) - 1}" if min(bad) > inner_steps else ""
    return f"the logits of some task are not finite numbers after inner step {min(bad)}; {remedy}"
