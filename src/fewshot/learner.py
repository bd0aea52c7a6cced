"""The inner loop on learn2learn's MAML, one task at a time.

Shapes: B tasks, K ways, S support and Q query images per task, N inner steps.
"""

import torch
import torch.nn.functional as F
from learn2learn.algorithms import MAML
from torch import Tensor, nn

from fewshot.models import zero_head
from fewshot.tasks import Task, query_accuracy


def meta_gradient(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float,
    inner_steps: int,
    first_order: bool,
    adapted: str = "all",
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    adapted: what the inner loop adapts, "all" or the "head" alone (EFIL, method.md section 1).
    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    losses, logits = [], []
    for task in _each(tasks):
        learner, task = _clone(network, task, inner_lr, first_order, adapted)  # theta_n <- theta
        for _ in range(inner_steps):
            learner.adapt(_support_loss(learner, task))  # theta_n <- theta_n - eta grad L(theta_n, S_n)
        prediction = learner(task.query)
        loss = F.cross_entropy(prediction, task.query_labels)
        (loss / len(tasks.support)).backward()  # grad_theta L(theta_n, Q_n); one task's graph at a time
        losses.append(loss.detach())
        logits.append(prediction.detach())
    return torch.stack(losses), query_accuracy(torch.stack(logits), tasks.query_labels)


def step_accuracies(
    network: nn.Module, tasks: Task, *, inner_lr: float, steps: int, zeroing: bool, adapted: str = "all"
) -> Tensor:
    """Query accuracy after every inner step 0 .. steps, (B, steps + 1); with zeroing, adapted from a zeroed head.

    First-order adaptation (the adapted parameters are the same); the network is left as it is.
    """
    logits = step_logits(network, tasks, inner_lr=inner_lr, steps=steps, zeroing=zeroing, adapted=adapted)
    return torch.stack([query_accuracy(each, tasks.query_labels) for each in logits.unbind(1)], dim=1)


def step_logits(
    network: nn.Module, tasks: Task, *, inner_lr: float, steps: int, zeroing: bool, adapted: str = "all"
) -> Tensor:
    """The queries' logits after every inner step, (B, steps + 1, Q, K), from which `step_accuracies` are."""
    logits = []
    for task in _each(tasks):
        learner, task = _clone(network, task, inner_lr, True, adapted)
        if zeroing:
            zero_head(learner.module if adapted == "head" else learner.module.head)
        for step in range(steps + 1):
            if step > 0:
                learner.adapt(_support_loss(learner, task))
            with torch.no_grad():
                logits.append(learner(task.query))
    return torch.stack(logits).unflatten(0, (-1, steps + 1))


def _clone(network: nn.Module, task: Task, inner_lr: float, first_order: bool, adapted: str) -> tuple[MAML, Task]:
    """What adapts, and to what: the network to images, or the head to features."""
    if adapted == "head":
        task = task._replace(support=network.encoder(task.support), query=network.encoder(task.query))
        network = network.head
    # With allow_nograd=False its adapt() prints a RuntimeError, out of memory among them, and goes on.
    return MAML(network, lr=inner_lr, first_order=first_order, allow_nograd=True, allow_unused=False).clone(), task


def _each(tasks: Task) -> list[Task]:
    return [Task(*fields) for fields in zip(*tasks, strict=True)]


def _support_loss(learner: MAML, task: Task) -> Tensor:
    return F.cross_entropy(learner(task.support), task.support_labels)
