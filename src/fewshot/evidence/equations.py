"""Equations of docs/method.md, each as a number on this very model: how far its two sides are apart.

The sides are computed apart: by the program itself (its inner loop, automatic differentiation) and by a closed form, or
by what the theory says must come out. `identities` must hold; `limits` are easily believed and do not.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewshot.evidence import page
from fewshot.evidence.model import Model
from fewshot.theory.features import Features

NONE = 0.0  # counts, and products with an exact zero: nothing is rounded
GRADIENT = 1e-10  # relative; what rounding becomes through convolutions and BatchNorm, as between the engines


class Equation(NamedTuple):
    """It holds where the number, how far its sides are apart, is at most the bound."""

    name: str  # in evidence.json
    says: str
    apart: Callable[[Model], float | None]  # None: the model has nothing that it could speak of
    bound: float
    number: str  # what it is
    why_not: str = ""  # for an equation that does not hold
    parts: tuple[str, ...] = ()  # of the model's own head: where all classes have the same, it says nothing


def equation(bound: float, number: str, why_not: str = "", parts: tuple[str, ...] = ()) -> Callable[..., Equation]:
    """Makes an Equation of the function that measures it: its name is the function's, what it says the docstring."""
    return lambda apart: Equation(apart.__name__, apart.__doc__, apart, bound, number, why_not, parts)


def measured(equations: list[Equation], model: Model) -> dict[str, dict[str, Any]]:
    numbers = ((equation, equation.apart(model)) for equation in equations)
    return {equation.name: measured_one(apart, equation.bound) for equation, apart in numbers if apart is not None}


def measured_one(apart: float, bound: float) -> dict[str, Any]:
    """As in evidence.json; nan is above every bound."""
    return {"value": apart, "bound": bound, "pass": apart <= bound}


def verdict_on(check: dict[str, Any]) -> page.Verdict:
    """check: as in evidence.json, where None is no finite number."""
    value, bound = page.short(check["value"]), page.short(check["bound"])
    if check["pass"]:
        return page.Verdict("holds", f"holds exactly ({value} ≤ {bound})")
    return page.Verdict("fails", f"does not hold ({value if check['value'] is None else f'{value} > {bound}'})")


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def worst(values: list[float]) -> float:
    """The largest; unlike max, nan where there is one."""
    return torch.tensor(values, dtype=torch.double).max().item()


def relative(value: Tensor, expected: Tensor) -> float:
    difference, size = (value - expected).norm().item(), expected.norm().item()
    return difference / size if size else math.inf if difference else 0.0


def noise_of(c: Tensor, features: Features, q: Tensor) -> Tensor:
    """What coefficients (..., B, Q, S) are besides 1[t=u] - q_t; q (B, Q, K)."""
    q_t = q.gather(-1, features.support_labels[:, None].expand(-1, q.shape[1], -1))
    return c - (features.same_class().double() - q_t)
