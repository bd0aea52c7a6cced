"""Accuracies of tasks as a mean with its confidence interval.

Shapes: B tasks, T inner steps of the evaluation.
"""

import math
from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Query accuracy after every inner step: mean over the tasks and half width of its 95% confidence interval."""

    tasks: int
    accuracy: list[float]
    ci95: list[float]

    @classmethod
    def of(cls, accuracies: Tensor) -> "Scores":
        """accuracies: (B, T + 1)"""
        values = accuracies.cpu().double()
        ci95 = 1.96 * values.std(dim=0) / len(values) ** 0.5
        return cls(len(values), *([round(value, 6) for value in each.tolist()] for each in (values.mean(dim=0), ci95)))


def diverged(results: dict[str, Scores], inner_steps: int, start: str) -> str | None:
    """After which inner step the logits of some task were not finite, and what would help; None: after none.

    start: what would help where they were not before any inner step.
    """
    bad = [step for scores in results.values() for step, each in enumerate(scores.accuracy) if math.isnan(each)]
    if not bad:
        return None
    remedy = "lower inner_lr" if min(bad) else start
    remedy += f", or use test_steps={min(bad) - 1}" if min(bad) > inner_steps else ""
    return f"the logits of some task are not finite numbers after inner step {min(bad)}; {remedy}"
