"""The meta-steps that meta_step.py times: networks, tasks and inner loops, and a contestant in torch that takes one."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fewshot.data.task import Task
from fewshot.models.network import conv4_pooled, conv4_strided

QUERIES = 15  # per class


@dataclass(frozen=True)
class Setting:
    """One row of the benchmark: a network, the tasks of a meta-batch and the inner loop."""

    name: str
    network: Callable[..., nn.Module]
    channels: int
    size: int
    tasks: int
    ways: int
    shots: int
    inner_steps: int
    inner_lr: float
    first_order: bool

    @property
    def knobs(self) -> dict:
        return {"inner_lr": self.inner_lr, "inner_steps": self.inner_steps, "first_order": self.first_order}

    def start(self, device: torch.device) -> tuple[nn.Module, Task]:
        """The initial weights and the tasks, which are always the same. An image is its class's random image and noise.

        Images of noise alone could only be learnt by heart, and their gradients would have sizes that no use has.
        """
        torch.manual_seed(0)
        network = self.network(channels=self.channels, size=self.size, ways=self.ways)
        centres = torch.randn(self.tasks, self.ways, 1, self.channels, self.size, self.size)

        def images(per_class: int) -> Tensor:
            shape = (self.tasks, self.ways, per_class, *centres.shape[3:])
            return (centres + 0.5 * torch.randn(shape)).flatten(1, 2)

        def labels(per_class: int) -> Tensor:
            return torch.arange(self.ways).repeat_interleave(per_class).repeat(self.tasks, 1)

        tasks = Task(images(self.shots), labels(self.shots), images(QUERIES), labels(QUERIES))
        return network.to(device), Task(*(field.to(device) for field in tasks))


def settings() -> list[Setting]:
    """Twelve: Omniglot and photos as the paper's released code trains on them, in both orders."""
    omniglot, photos = (conv4_strided, 1, 28), (partial(conv4_pooled, width=32), 3, 84)
    shapes = [
        ("omniglot 5w1s", *omniglot, 32, 5, 1, 1, 0.4),
        ("omniglot 5w1s", *omniglot, 32, 5, 1, 2, 0.4),
        ("omniglot 5w1s", *omniglot, 32, 5, 1, 5, 0.4),
        ("omniglot 20w1s", *omniglot, 16, 20, 1, 5, 0.4),
        ("photos84 5w1s", *photos, 4, 5, 1, 5, 0.01),
        ("photos84 5w5s", *photos, 4, 5, 5, 5, 0.01),
    ]
    return [
        Setting(f"{name} {shape[-2]} step{'s' * (shape[-2] > 1)} {order}", *shape, first_order=order == "first")
        for name, *shape in shapes
        for order in ("first", "second")
    ]


class Torch:
    """A contestant in torch: an engine with its own copy of the weights."""

    def __init__(self, engine: Callable, network: nn.Module, tasks: Task, **knobs) -> None:
        self._engine, self._network, self._tasks, self._knobs = engine, copy.deepcopy(network), tasks, knobs

    def __call__(self) -> None:
        self._network.zero_grad()
        self._engine(self._network, self._tasks, **self._knobs)

    def gradients(self) -> dict[str, Tensor]:
        """The outer gradient of the last step, by the parameters' names."""
        return {name: p.grad for name, p in self._network.named_parameters()}
