"""Equations of docs/method.md, each as a number on this very model: how far its two sides are apart.

The sides are computed apart: by the program itself (its inner loop, automatic differentiation) and by a closed form, or
by what the theory says must come out. `identities` must hold; `limits` are easily believed and do not.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewshot.evidence.model import Model
from fewshot.evidence.section import Verdict, short
from fewshot.theory.features import Features

NONE = 0.0  # counts, and products with an exact zero: nothing is rounded
GRADIENT = 1e-10  # relative; what rounding becomes through convolutions and BatchNorm, as between the engines


class Equation(NamedTuple):
    """It holds where the number, how far its sides are apart, is at most the bound."""

    says: str
    number: str  # what it is
    bound: float
    apart: Callable[[Model], float | None]  # None: the model has nothing that it could speak of


def measured(equations: dict[str, Equation], model: Model) -> dict[str, dict[str, Any]]:
    numbers = ((name, equation.bound, equation.apart(model)) for name, equation in equations.items())
    return {name: measured_one(apart, bound) for name, bound, apart in numbers if apart is not None}


def measured_one(apart: float, bound: float) -> dict[str, Any]:
    """As in evidence.json; nan is above every bound."""
    return {"value": apart, "bound": bound, "pass": apart <= bound}


def verdict_on(check: dict[str, Any]) -> Verdict:
    """check: as in evidence.json, where None is no finite number."""
    value, bound = short(check["value"]), short(check["bound"])
    if check["pass"]:
        return Verdict("holds", f"holds exactly ({value} ≤ {bound})")
    return Verdict("fails", f"does not hold ({value if check['value'] is None else f'{value} > {bound}'})")


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def worst(values: list[float]) -> float:
    """The largest; unlike max, nan where there is one."""
    return torch.tensor(values, dtype=torch.double).max().item()


def relative(value: Tensor, expected: Tensor) -> float:
    difference, size = (value - expected).norm().item(), expected.norm().item()
    return difference / size if size else math.inf if difference else 0.0


def without_noise(features: Features, q: Tensor) -> Tensor:
    """1[t=u] - q_t, (B, Q, S); q (B, Q, K)."""
    return features.same_class().double() - q.gather(-1, features.support_labels[:, None].expand(-1, q.shape[1], -1))
