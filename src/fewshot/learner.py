"""The inner loop on learn2learn's MAML, one task at a time.

Shapes: B tasks, K ways, S support and Q query images per task, N inner steps, T steps of an evaluation.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from learn2learn import clone_module
from learn2learn.algorithms import MAML, MetaSGD
from torch import Tensor, nn

from fewshot.models import prototype_head, zero_head
from fewshot.tasks import Task, query_accuracy


def meta_gradient(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float | Sequence[Tensor],
    inner_steps: int,
    first_order: bool,
    adapted: str = "all",
    prototypes: bool = False,
    step_losses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    Args:
        inner_lr: eta, or one tensor for each parameter that adapts, whose .grad is added to as well (Meta-SGD).
        adapted: what the inner loop does: "all", the "head" (EFIL, method.md section 1) or the "encoder" alone (BOIL).
        prototypes: each task begins with the head of models.prototype_head, in place of the network's.
        step_losses: v_1 .. v_N, by which the query losses after each inner step count (MAML++); None: the last alone.

    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    losses, logits = [], []
    for task in _each(tasks):
        learner, theta_n, task = _start(network, task, inner_lr, first_order, adapted, prototypes)  # theta_n <- theta
        outer = 0.0
        for step in range(inner_steps):
            learner.adapt(_support_loss(theta_n, task))  # theta_n <- theta_n - eta grad L(theta_n, S_n)
            if step_losses is not None or step == inner_steps - 1:
                prediction = theta_n(task.query)
                loss = F.cross_entropy(prediction, task.query_labels)
                outer = loss if step_losses is None else outer + step_losses[step] * loss
        (outer / len(tasks.support)).backward()  # grad_theta L(theta_n, Q_n); one task's graph at a time
        losses.append(loss.detach())
        logits.append(prediction.detach())
    for parameter in network.parameters():  # a head that prototypes stand in for has no part in the loss
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return torch.stack(losses), query_accuracy(torch.stack(logits), tasks.query_labels)


def step_accuracies(network: nn.Module, tasks: Task, **knobs: Any) -> Tensor:
    """Query accuracy after every inner step 0 .. T, (B, T + 1); knobs: of step_logits."""
    logits = step_logits(network, tasks, **knobs)
    return torch.stack([query_accuracy(each, tasks.query_labels) for each in logits.unbind(1)], dim=1)


def step_logits(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float | Sequence[Tensor],
    steps: int,
    zeroing: bool,
    adapted: str = "all",
    prototypes: bool = False,
    first: int = 0,
) -> Tensor:
    """The queries' logits after inner steps first .. T, (B, T + 1 - first, Q, K).

    With zeroing, adapted from a zeroed head. First-order adaptation (the adapted parameters are the same); the network
    is left as it is.
    """
    logits = []
    for task in _each(tasks):
        learner, theta_n, task = _start(network, task, inner_lr, True, adapted, prototypes, zeroing)
        for step in range(steps + 1):
            if step > 0:
                learner.adapt(_support_loss(theta_n, task))
            if step >= first:
                with torch.no_grad():
                    logits.append(theta_n(task.query))
    return torch.stack(logits).unflatten(0, (-1, steps + 1 - first))


def _start(
    network: nn.Module,
    task: Task,
    inner_lr: float | Sequence[Tensor],
    first_order: bool,
    adapted: str,
    prototypes: bool,
    zeroing: bool = False,
) -> tuple[MAML | MetaSGD, nn.Module, Task]:
    """What adapts, what it is a part of, and the latter's task: images, or features where the head alone adapts."""
    initial, network = network, clone_module(network)
    if zeroing:
        zero_head(network.head)
    elif prototypes:  # of theta, of which theta_n is a copy: no inner gradient goes through them
        start = prototype_head(initial.encoder(task.support), task.support_labels, network.head.out_features)
        network.head._parameters.update({name: start[name] for name, _ in network.head.named_parameters()})
    if adapted == "head":
        task = task._replace(support=network.encoder(task.support), query=network.encoder(task.query))
        network = network.head
    part = network.encoder if adapted == "encoder" else network
    if isinstance(inner_lr, float | int):
        # With allow_nograd=False its adapt() prints a RuntimeError, out of memory among them, and goes on.
        return MAML(part, lr=inner_lr, first_order=first_order, allow_nograd=True, allow_unused=False), network, task
    return MetaSGD(part, lrs=inner_lr, first_order=first_order), network, task


def _each(tasks: Task) -> list[Task]:
    return [Task(*fields) for fields in zip(*tasks, strict=True)]


def _support_loss(network: nn.Module, task: Task) -> Tensor:
    return F.cross_entropy(network(task.support), task.support_labels)
