"""A trained model, the test tasks on which it is measured in float64, and the equations that are measured on it.

An equation of docs/method.md is a number on this very model: how far its two sides are apart. The sides are computed
apart, by the program itself (its inner loop, automatic differentiation) and by what the theory says must come out.
Shapes: B tasks, S support and Q query images per task, d features, K ways, N inner steps, T steps of the evaluation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewshot.batched.execution import copied
from fewshot.data.task import Task
from fewshot.inner_loop import InnerLoop
from fewshot.maml import explicit_loss, sequential
from fewshot.models.head import zero_head
from fewshot.models.network import Network
from fewshot.theory.features import Features, centred

GRADIENT = 1e-10  # relative; what rounding becomes through convolutions and BatchNorm, as between the engines


@dataclass(frozen=True, eq=False)
class Model:
    network: Network
    initial: Network  # before training
    loop: InnerLoop  # of training
    test_steps: int  # T
    tasks: Task
    gradient_tasks: int  # the first of the tasks, on which gradients are taken, again and again
    tested: dict[str, Tensor]  # accuracies of the test by mode, (tasks, T + 1)

    @cached_property
    def features(self) -> Features:
        """The features of the unadapted encoder, and the head."""
        with torch.no_grad():
            features = Features.of(self.network, self.tasks)
        detached: Any = [field if field is None else field.detach() for field in features]
        return Features(*detached)

    @property
    def knobs(self) -> dict[str, Any]:
        return {"inner_lr": self.loop.inner_lr, "inner_steps": self.loop.inner_steps}

    @property
    def heads(self) -> dict[str, Features]:
        return {"this_head": self.features, "zeroed_head": self.features.zeroed()}

    @property
    def by_head(self) -> dict[str, "Model"]:
        return {"this_head": self, "zeroed_head": self.zeroed}

    @property
    def same_for_all(self) -> dict[str, bool]:
        """Whether all classes have one weight vector, and one bias: then they have no effect, as if they were zero."""
        w, b = self.features.weight, self.features.bias
        return {"weight": not centred(w).any().item(), "bias": b is None or not centred(b[:, None]).any().item()}

    @cached_property
    def zeroed(self) -> "Model":
        """The same model with a zero head."""
        network = copied(self.network)
        zero_head(network.head)
        return replace(self, network=network)

    @cached_property
    def on_few_tasks(self) -> "Model":
        """The same model on the tasks for gradients alone."""
        return replace(self, tasks=Task(*(field[: self.gradient_tasks] for field in self.tasks)))

    def maml(self, **fields: Any) -> InnerLoop:
        """One inner step of all parameters with this model's inner_lr, in first order, but for the fields given."""
        return replace(InnerLoop(1, self.loop.inner_lr, first_order=True), **fields)

    def logits(self, **fields: Any) -> Tensor:
        """What the program computes for the queries after the last inner step, (B, Q, K)."""
        loop = self.maml(**fields)
        return sequential.step_logits(self.network, self.tasks, [loop], first=loop.inner_steps)[0, :, 0]

    def predictions(self, **fields: Any) -> Tensor:
        return self.logits(**fields).softmax(-1)

    def gradient(self, **fields: Any) -> Tensor:
        """The program's outer gradient as one vector, the head's part last; with noise=... of the explicit loss."""
        loop = self.maml(**fields)
        if loop not in self._gradients:
            engine = explicit_loss if loop.explicit else sequential
            self.network.zero_grad(set_to_none=True)
            engine.meta_gradient(self.network, self.tasks, loop)
            self._gradients[loop] = self.taken_gradient()
        return self._gradients[loop]

    @cached_property
    def _gradients(self) -> dict[InnerLoop, Tensor]:
        return {}

    def encoder_gradient(self, **fields: Any) -> Tensor:
        return self.gradient(**fields)[: -sum(p.numel() for p in self.network.head.parameters())]

    def taken_gradient(self) -> Tensor:
        """What is in the parameters' .grad, which is emptied."""
        modules = (self.network.encoder, self.network.head)
        parts = [p.grad.flatten() for module in modules for p in module.parameters() if p.grad is not None]
        self.network.zero_grad(set_to_none=True)
        return torch.cat(parts)


def plain(numbers: Tensor) -> list:
    """A matrix as lists, to six digits."""
    return [[float(f"{value:.6g}") for value in row] for row in numbers.tolist()]


class Equation(NamedTuple):
    """It holds where the number is at most the bound."""

    name: str  # in evidence.json
    says: str
    apart: Callable[[Model], float | None]  # the number; None: the model has nothing that it could speak of
    bound: float  # 0: of counts, and of products with an exact zero, where nothing is rounded
    number: str  # what it is, in words
    why_not: str = ""  # for an equation that does not hold
    parts: tuple[str, ...] = ()  # of the model's own head: where all classes have the same, it says nothing


def equation(among: list[Equation], bound: float, number: str, *why_not_and_parts: Any) -> Callable[..., Equation]:
    """Makes an Equation of the function that measures it: its name is the function's, what it says the docstring."""

    def made(apart: Callable[[Model], float | None]) -> Equation:
        among.append(Equation(apart.__name__, apart.__doc__ or "", apart, bound, number, *why_not_and_parts))
        return among[-1]

    return made


def measured(equations: list[Equation], model: Model) -> dict[str, dict[str, Any]]:
    """The equations as evidence.json has them; a nan is above every bound."""
    numbers = {equation: equation.apart(model) for equation in equations}
    return {
        equation.name: {"value": apart, "bound": equation.bound, "pass": apart <= equation.bound}
        for equation, apart in numbers.items()
        if apart is not None
    }


def largest(numbers: Tensor | list[float]) -> float:
    """The largest absolute value; unlike max, nan where there is one."""
    return torch.as_tensor(numbers, dtype=torch.double).abs().max().item()


def relative(value: Tensor, expected: Tensor) -> float:
    difference, size = (value - expected).norm().item(), expected.norm().item()
    return difference / size if size else math.inf if difference else 0.0
